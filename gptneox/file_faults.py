# SPDX-License-Identifier: Apache-2.0
"""Explains why a checkpoint file cannot be used, from its place on disk and its content."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable
from pathlib import Path

_HEAD_BYTES = 4096
# Error texts that a server may have sent instead of the file.
_REFUSALS = (
    "entry not found",
    "not found",
    "repository not found",
    "invalid username or password",
    "access denied",
    "forbidden",
    "unauthorized",
    "too many requests",
    "access to model",
)
# First bytes of formats that are often saved under a wrong extension.
_FORMATS = {
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"BZh": "a bzip2 archive; unpack it",
    b"\xfd7zXZ\x00": "an xz archive; unpack it",
    b"\x28\xb5\x2f\xfd": "a zstd archive; unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"Rar!": "a rar archive; unpack it",
    b"GGUF": "a GGUF file; take the checkpoint's safetensors files",
    b"\x89HDF": "an HDF5 file (Keras); take the checkpoint's safetensors files",
}
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80\x02"


def explain(path: Path) -> str:
    """Why `path` cannot be read or parsed, and what to do; "" if the reason is unknown.

    The result continues a sentence that begins with the path.
    """
    return explain_place(path) or _explain_content(path)


def explain_first(paths: Iterable[Path]) -> str:
    """The first explanation that `explain` gives for one of the files, with its path."""
    for path in paths:
        if is_there(path) and (reason := explain(path)):
            return f"{path} {reason}"
    return ""


def is_there(path: Path) -> bool:
    """Whether the directory entry exists, even as a dangling link."""
    try:
        path.lstat()
    except OSError:
        return False
    return True


def explain_place(path: Path) -> str:
    """Why `path` is not a readable file; "" if it can be opened or does not exist."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            with path.open("rb"):
                return ""
    except PermissionError:
        return "may not be read by this user; change its permissions (chmod a+r)"
    except OSError as error:
        return _explain_link(path, error)
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    kind = next((name for test, name in kinds.items() if test(mode)), "a device")
    return f"is {kind}, not a file; put the file there"


def _explain_link(path: Path, error: OSError) -> str:
    if not path.is_symlink():
        is_absent = isinstance(error, (FileNotFoundError, NotADirectoryError))
        return "" if is_absent else f"cannot be read: {error.strerror}"
    target = path.readlink()
    if isinstance(error, FileNotFoundError):
        return f"is a link to {target}, which does not exist; download the file again"
    return f"is a link to {target} that cannot be followed ({error.strerror}); download it again"


def _explain_content(path: Path) -> str:
    """What the file contains instead; "" if that is not recognized."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if not head:
        return "is empty; download it again"
    if not head.strip(b"\0") and not _has_data(path):
        return "holds zeros only, an interrupted download; download it again"
    for magic, kind in _FORMATS.items():
        if head.startswith(magic):
            return f"is {kind}"
    return _explain_weights(path, head) or _explain_text(head)


def _has_data(path: Path) -> bool:
    """Whether the file has a nonzero byte."""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            if block.strip(b"\0"):
                return True
    return False


def _explain_weights(path: Path, head: bytes) -> str:
    """Recognizes weights saved under the other format's extension."""
    if path.suffix == ".safetensors" and head.startswith((_ZIP, _PICKLE)):
        return "is a PyTorch file, not safetensors; name it pytorch_model.bin"
    if path.suffix == ".bin" and head[8:9] == b"{":
        return "is a safetensors file; name it model.safetensors"
    return ""


def _explain_text(head: bytes) -> str:
    """Recognizes a pointer file, a web page or a server's error text."""
    text = head.decode("utf-8-sig", errors="replace").strip()
    low = text.lower()
    if low.startswith("version https://git-lfs.github.com/"):
        return "is a git-lfs pointer, not the file itself; type `git lfs pull` in its folder"
    if "annex/objects/" in low[:300]:
        return "is a git-annex pointer, not the file itself; type `git annex get` in its folder"
    if low.startswith(("<!doctype html", "<html", "<head", "<body", "<!--")):
        return "is a web page (HTML), not the file itself; download it again"
    if low.startswith(("<?xml", "<error")):
        return "is a server's answer in XML, not the file itself; download it again"
    if low.startswith(_REFUSALS) or _is_json_error(text):
        return f"is a server's answer ({' '.join(text.split())[:60]}); download it again"
    return ""


def _is_json_error(text: str) -> bool:
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return False
    keys = ("error", "message", "detail")
    return isinstance(answer, dict) and any(isinstance(answer.get(key), str) for key in keys)
