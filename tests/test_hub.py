# SPDX-License-Identifier: Apache-2.0
"""Models named by their id: downloaded by the real client from a hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from support.hub import COMMIT, Hub, files_of, serve
from support.processes import REPO

from gptneox import hub as product
from gptneox.config.errors import ConfigError

MODEL = "EleutherAI/pythia-1m"
SCRIPT = """
import sys
from gptneox.hub import HubError, find_checkpoint
try:
    print(find_checkpoint(*sys.argv[1:]))
except HubError as error:
    sys.exit(f"HubError: {error}")
"""


def find(hub: Hub, home: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-c", SCRIPT, *(words or (MODEL,))], hub, home, **environ)


def run(
    command: list[str], hub: Hub, home: Path, **environ: str
) -> subprocess.CompletedProcess[str]:
    ours = ("HF_", "OFFLINE", "MODELSCOPE")
    clean = {k: v for k, v in os.environ.items() if not any(word in k for word in ours)}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run(
        command, env=clean | own | environ, cwd=REPO, capture_output=True, text=True, check=False
    )


@pytest.fixture
def hub(tiny_checkpoint: Path):
    with serve(Hub(MODEL, files_of(tiny_checkpoint))) as hub:
        yield hub


def test_what_is_needed_is_downloaded_once(hub: Hub, tmp_path: Path) -> None:
    done = find(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.name == COMMIT
    needed = {name for name in hub.files if name.endswith((".json", ".safetensors", ".txt"))}
    needed.discard("a/b.json")
    assert {path.name for path in folder.iterdir()} == needed
    assert all((folder / name).read_bytes() == hub.files[name] for name in needed)
    assert len(hub.downloads) == len(needed)
    hub.requests.clear()
    for environ in ({}, {"HF_HUB_OFFLINE": "1"}):
        again = find(hub, tmp_path, **environ)
        assert again.stdout == done.stdout
    assert find(hub, tmp_path, MODEL, COMMIT).stdout == done.stdout
    assert not hub.requests


def test_a_run_by_id_equals_one_by_path(hub: Hub, tmp_path: Path, tiny_checkpoint: Path) -> None:
    command = [sys.executable, "main.py", "--task", "inference", "--input_ids", "1,2,3"]
    command += ["--load_tokenizer", "False", "--max_output_length", "4", "--attention", "paged"]
    by_id = run([*command, "--model_path", MODEL], hub, tmp_path)
    by_path = run([*command, "--model_path", str(tiny_checkpoint)], hub, tmp_path)
    assert by_id.returncode == by_path.returncode == 0, by_id.stderr
    answers = [
        [line for line in done.stdout.splitlines() if "ms" not in line and "tok" not in line]
        for done in (by_id, by_path)
    ]
    assert answers[0] == answers[1]


@pytest.mark.skipif(
    huggingface_hub.__version__.startswith("0."),
    reason="huggingface_hub 0 ends with the connection; the next start goes on",
)
def test_a_download_goes_on_where_it_was_cut(hub: Hub, tmp_path: Path) -> None:
    written = 10 << 20  # the client writes so much at once
    hub.files = {"config.json": b"{}", "model.safetensors": os.urandom(written + 2000)}
    hub.cut_after = written + 1000
    done = find(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    content = (Path(done.stdout.strip()) / "model.safetensors").read_bytes()
    assert content == hub.files["model.safetensors"]
    ranges = [requested for name, requested in hub.downloads if name == "model.safetensors"]
    assert len(ranges) == 2
    assert ranges[1].startswith(f"bytes={written}-")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_wrong_hash_is_found_and_removed(name: str, hub: Hub, tmp_path: Path) -> None:
    hub.damaged = name
    done = find(hub, tmp_path)
    assert done.returncode == 1
    assert f"{name} arrived damaged" in done.stderr
    assert "start the download again" in done.stderr
    hub.damaged = ""
    done = find(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert (folder / name).read_bytes() == hub.files[name]


def test_refusals_say_what_to_do(hub: Hub, tmp_path: Path) -> None:
    wrong = find(hub, tmp_path, "EleutherAI/pythia-1n")
    assert wrong.returncode == 1
    assert f"near it: {MODEL}" in wrong.stderr
    assert "HF_TOKEN" in wrong.stderr
    revision = find(hub, tmp_path, MODEL, "step9")
    assert "has no revision 'step9'" in revision.stderr
    offline = find(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert "not in the cache" in offline.stderr
    hub.announced_size = 1 << 60
    assert "GiB left; set HF_HOME" in find(hub, tmp_path).stderr
    hub.announced_size = 0
    hub.is_gated = True
    assert "accept its terms" in find(hub, tmp_path).stderr
    hub.is_gated = False
    hub.token = "secret"
    private = find(hub, tmp_path)
    assert "HF_TOKEN" in private.stderr
    assert "secret" not in private.stderr
    assert find(hub, tmp_path, HF_TOKEN="secret").returncode == 0


def test_a_hub_that_is_not_there(hub: Hub, tmp_path: Path) -> None:
    done = find(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    assert f"{MODEL} at http://127.0.0.1:9 cannot be downloaded" in done.stderr


def test_weights_that_no_run_reads(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"config.json": b"{}", "flax_model.msgpack": b"x"}
    assert "has neither *.safetensors nor pytorch_model*.bin" in find(hub, tmp_path).stderr


def test_no_path_is_taken_for_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    for path in ("weights/neox-mni", "weights", "./a/b", "/a/b", "a/b/c", "a/../b", "~/a", ""):
        assert not product.is_model_id(path)
        assert product.find_checkpoint(path) == Path(path).expanduser()
    assert product.is_model_id("EleutherAI/gpt-neox-20b")
    with pytest.raises(ConfigError, match="is for a model on a hub"):
        product.find_checkpoint("weights", "main")


def test_a_folder_is_whole_when_all_its_parts_are_there(tmp_path: Path) -> None:
    assert not product.is_complete(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    part = tmp_path / "model-00001-of-00002.safetensors"
    part.touch()
    index = {"weight_map": {"a": part.name, "b": part.name.replace("00001-", "00002-")}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not product.is_complete(tmp_path)
    part.with_name(index["weight_map"]["b"]).touch()
    assert product.is_complete(tmp_path)


def test_modelscope_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ConfigError, match="pip install modelscope"):
        product.find_checkpoint(MODEL, from_modelscope=True)


def find_at_modelscope(hub: Hub, home: Path, model: str = MODEL, revision: str = ""):
    command = SCRIPT.replace("sys.argv[1:]", "sys.argv[1:], from_modelscope=True")
    environ = {"MODELSCOPE_ENDPOINT": hub.url, "MODELSCOPE_CACHE": str(home)}
    return run([sys.executable, "-c", command, model, revision], hub, home, **environ)


def test_a_model_of_modelscope(hub: Hub, tmp_path: Path) -> None:
    """By its own client, where that is installed; the second time from its cache."""
    pytest.importorskip("modelscope", reason="modelscope is not installed")
    done = find_at_modelscope(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[-1])
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert not [name for name in ("pytorch_model.bin", "flax_model.msgpack", "a")
        if (folder / name).exists()]  # fmt: skip
    hub.requests.clear()
    again = find_at_modelscope(hub, tmp_path)
    assert Path(again.stdout.splitlines()[-1]) == folder
    assert hub.downloads
    assert hub.requests == []


def test_what_modelscope_does_not_have(hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("modelscope", reason="modelscope is not installed")
    for model, revision in (("other/model", ""), (MODEL, "v9")):
        done = find_at_modelscope(hub, tmp_path, model, revision)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("HubError: ModelScope does not give "), (
            done.stderr
        )
