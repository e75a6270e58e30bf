# SPDX-License-Identifier: Apache-2.0
"""Models named by their id: the local cache first, else a download from Hugging Face or ModelScope.

A path that exists is never taken for an id, so no network is tried for it. huggingface_hub reads
HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN; it resumes what was cut off, and its file locks
let the processes of a host wait for one download.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from gptneox.config.errors import ConfigError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# What a checkpoint needs beside its weights, as patterns of names at the top of the repository.
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # bin only where there is no safetensors
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_NUM_NEAREST = 5


class HubError(RuntimeError):
    """A model cannot be downloaded; the message says why and what to do."""


def is_model_id(text: str) -> bool:
    """Whether a word names a model of a hub: OWNER/NAME, where no folder OWNER exists."""
    return (
        bool(_ID.fullmatch(text))
        and not Path(text).exists()
        and not Path(text.partition("/")[0]).exists()
    )


def find_checkpoint(text: str, revision: str = "", *, from_modelscope: bool = False) -> Path:
    """The folder of a checkpoint: of a path as it is, of an id from the cache or after a download.

    Args:
        text: a path, or OWNER/NAME.
        revision: branch, tag or commit; empty: main.
        from_modelscope: ask ModelScope instead of Hugging Face.

    Raises:
        ConfigError: a revision is given for a path, or modelscope is not installed.
        HubError: there is no such model, or it cannot be downloaded.
    """
    if not is_model_id(text):
        if revision:
            raise ConfigError(
                f"--revision {revision} is for a model on a hub, but "
                f"{text or 'the embedded checkpoint'} is a path; leave it out"
            )
        return Path(text).expanduser()
    if from_modelscope:
        return _from_modelscope(text, revision)
    return _cached(text, revision) or _download(text, revision)


def is_complete(folder: Path) -> bool:
    """Whether config.json and all weights are there."""
    if not (folder / "config.json").is_file():
        return False
    for name in _INDEXES:
        with suppress(OSError, ValueError, KeyError, AttributeError):
            parts = set(json.loads((folder / name).read_text("utf-8"))["weight_map"].values())
            if all((folder / part).is_file() for part in parts):
                return True
    return any(
        path.is_file() and "-of-" not in path.name
        for pattern in _WEIGHTS
        for path in folder.glob(pattern)
    )


# -- Hugging Face --------------------------------------------------------------------------------


def _cached(model_id: str, revision: str) -> Path | None:
    """The folder in the cache, if it is whole.

    Source: the layout of huggingface_hub's cache. Its own look-up asks for every file of the
    repository.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    model = _place(Path(HF_HUB_CACHE), model_id)
    commit = revision or "main"
    with suppress(OSError):
        commit = (model / "refs" / commit).read_text("utf-8").strip()
    folder = model / "snapshots" / commit
    return folder if is_complete(folder) else None


def _place(cache: Path, model_id: str) -> Path:
    return cache / f"models--{model_id.replace('/', '--')}"


def _download(model_id: str, revision: str) -> Path:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # OSError, also the errors of requests (huggingface_hub 0), and the common class of httpx's
    network_errors = cast("tuple[type[Exception], ...]", (OSError, *HfHubHTTPError.__bases__))
    api, place = HfApi(), f"{model_id} at {constants.ENDPOINT}"
    try:
        return _fetch(api, model_id, revision, place)
    except GatedRepoError as error:
        raise HubError(
            f"{place} asks for consent: accept its terms in a browser, and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"'{model_id}' is no folder here, and {constants.ENDPOINT} shows no such model"
            f"{_nearest(api, model_id, network_errors)}; for a private one set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{place} has no revision {revision!r}; see its branches") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise HubError(
            f"'{model_id}' is no folder here and not in the cache, and the hub cannot be asked: "
            f"{_line(error)}"
        ) from error
    except network_errors as error:
        raise HubError(
            f"{place} cannot be downloaded: {_line(error)}; start it again, what has come is kept"
        ) from error


def _fetch(api: Any, model_id: str, revision: str, place: str) -> Path:
    """Download what is needed, and check it."""
    from huggingface_hub import constants, snapshot_download

    info = api.model_info(model_id, revision=revision or None, files_metadata=True)
    sizes = {each.rfilename: each.size or 0 for each in info.siblings or []}
    names = needed_files(sizes)
    if not any(name.endswith((".safetensors", ".bin")) for name in names):
        raise HubError(f"{place} has neither *.safetensors nor pytorch_model*.bin")
    cache = Path(constants.HF_HUB_CACHE)
    known = {path: path.stat().st_size for path in (_place(cache, model_id) / "blobs").glob("*")}
    _check_room(cache, sum(sizes[name] for name in names) - sum(known.values()))
    sys.stderr.write(f"downloading {place} to {cache}\n")
    folder = Path(snapshot_download(model_id, revision=info.sha, allow_patterns=names))
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and path.resolve() not in known:
            _verify(path)
    _remember(folder, info.sha, revision or "main")
    return folder


def needed_files(names: Iterable[str]) -> list[str]:
    """Of the files of a repository, those that a run reads: safetensors before bin, no folders."""
    top = [name for name in names if "/" not in name]
    weights: list[str] = []
    for pattern in _WEIGHTS:
        weights = weights or [name for name in top if Path(name).match(pattern)]
    small = [name for name in top if any(Path(name).match(p) for p in _SMALL_FILES)]
    return sorted({*small, *weights})


def _check_room(cache: Path, num_bytes: int) -> None:
    place = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if num_bytes > free:
        raise HubError(
            f"the download takes {num_bytes / 2**30:.1f} GiB, and {cache} has {free / 2**30:.1f} "
            "GiB left; set HF_HOME to a larger disk"
        )


def _verify(path: Path) -> None:
    """Check a file against its hash, which is its name in the cache.

    Source: huggingface_hub's cache: SHA-256 of a large file, git's SHA-1 of a small one.
    """
    blob = path.resolve()
    if len(blob.name) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % blob.stat().st_size, usedforsecurity=False)
    with blob.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    if digest.hexdigest() != blob.name:
        path.unlink()
        blob.unlink()
        raise HubError(
            f"{path.name} arrived damaged: its hash is {digest.hexdigest()}, not {blob.name}; it "
            "was removed, so start the download again"
        )


def _remember(folder: Path, commit: str, revision: str) -> None:
    """Note which commit a branch or tag was, so that the next run finds it without the network."""
    if revision != commit:
        reference = folder.parents[1] / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit, "utf-8")


def _nearest(api: Any, model_id: str, network_errors: tuple[type[Exception], ...]) -> str:
    """The names that are most like an id, for a message; empty if nothing can be found."""
    owner, _, name = model_id.partition("/")
    found: set[str] = set()
    for question in ({"author": owner}, {"search": name}):
        with suppress(ValueError, *network_errors):  # a help that must not hide the error
            found.update(model.id for model in api.list_models(**question, limit=500))
    nearest = difflib.get_close_matches(model_id, sorted(found), n=_NUM_NEAREST)
    return f" (near it: {', '.join(nearest)})" if nearest else ""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


# -- ModelScope ----------------------------------------------------------------------------------


def _from_modelscope(model_id: str, revision: str) -> Path:
    try:
        from modelscope import HubApi, snapshot_download
    except ImportError as error:
        raise ConfigError(
            "USE_MODELSCOPE=1 needs the package modelscope: pip install modelscope"
        ) from error
    from modelscope.hub import errors

    # which class they have in common differs between releases
    own = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)]
    failures: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, *own)
    options: dict[str, Any] = {"revision": revision} if revision else {}
    with suppress(*failures):  # it is not in the cache
        folder = Path(snapshot_download(model_id, local_files_only=True, **options))
        if is_complete(folder):
            return folder
    try:
        found: Seq[dict[str, Any]] = HubApi().get_model_files(model_id, recursive=False, **options)
        # new releases do not say which are files; folders have none of the endings
        names = needed_files(each["Path"] for each in found if each.get("Type", "blob") == "blob")
        folder = Path(snapshot_download(model_id, allow_patterns=names, **options))
    except failures as error:
        raise HubError(f"ModelScope does not give {model_id}: {_line(error)}") from error
    if not is_complete(folder):
        raise HubError(f"{model_id} at ModelScope has no complete weights for transformers")
    return folder
