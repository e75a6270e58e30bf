# SPDX-License-Identifier: Apache-2.0
"""Every row of docs/environments.md: its environment is built, and the main job runs in it.

    python -m pytest -m environments                              all rows, and offline installation
    python -m pytest -m environments -k 2.5.1                     one row
    python -m pytest -m environments --basetemp /large/disk       the folder that all is written to
    ENVIRONMENTS=/large/disk python -m pytest -m environments     rows stay there for the next call

Each row downloads its releases with pip and removes them afterwards: torch's builds with the CUDA
libraries take 6 GB of disk, its builds for the CPU 1 GB (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.processes import REPO, clean_environment

from gptneox import interpreter

PAGE = REPO / "docs/environments.md"
PROMPT = "What's deep learning?"
MINI = REPO / "weights/neox-mini"

# What a row runs of the tests: what touches transformers, tokenizers and huggingface_hub, each of
# which has changed between the rows.
TESTS = (
    *("test_modeling_gpt_neox_ascend.py", "test_generate.py", "test_generation_config.py"),
    *("test_detokenizer.py", "test_chat_templates.py", "test_hub.py", "test_server.py"),
)

# What transformers itself answers, in fp32.
ORACLE = """
import sys, torch
from transformers import AutoTokenizer, GPTNeoXForCausalLM
model = GPTNeoXForCausalLM.from_pretrained(sys.argv[1]).float()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer(sys.argv[2], return_tensors="pt")["input_ids"]
row = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
print(repr(tokenizer.decode(row[0, ids.shape[1]:], skip_special_tokens=True)))
"""


@dataclass(frozen=True)
class Row:
    """Releases that are used together; `torch_npu` is empty where none was run."""

    python: str
    torch: str
    torch_npu: str
    transformers: str
    date: str

    @property
    def name(self) -> str:
        return f"python-{self.python}-torch-{self.torch}-transformers-{self.transformers}"


def read_rows() -> list[Row]:
    """The table of the page."""
    pattern = r"^\| (3\.\d+) \| ([\d.]+) \| ([\w.]+|—) \| ([\d.]+) \| (\d{4}-\d\d-\d\d) \|"
    found = re.findall(pattern, PAGE.read_text("utf-8"), re.M)
    return [Row(p, t, n.strip("—"), f, d) for p, t, n, f, d in found]


ROWS = read_rows()
THIS = f"{sys.version_info[0]}.{sys.version_info[1]}"


def key(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.split("+")[0]))


# -- the page and what pip is told ----------------------------------------------------------------


def test_the_lower_bounds_are_the_oldest_rows() -> None:
    text = (REPO / "pyproject.toml").read_text("utf-8")
    assert len(ROWS) >= 2
    for name in ("torch", "transformers"):
        bound = re.search(rf'"{name}>=([\d.]+)', text)
        assert bound
        oldest = min(key(getattr(row, name)) for row in ROWS)
        assert oldest[:2] == key(bound[1])[:2], name
    python = re.search(r'requires-python = ">=([\d.]+)"', text)
    assert python
    assert min(key(row.python) for row in ROWS) == key(python[1])


def test_the_constraints_are_a_row() -> None:
    text = (REPO / "constraints.txt").read_text("utf-8")
    pins = dict(re.findall(r"^(\w+)==([\d.]+)", text, re.M))
    assert (pins["torch"], pins["transformers"]) in [(row.torch, row.transformers) for row in ROWS]


# -- environments ---------------------------------------------------------------------------------


def run(*command: str | Path, timeout: float = 3600, **environ: str) -> str:
    """Run a command in the checkout; returns stdout, or fails with all that it said."""
    done = subprocess.run(
        command,
        cwd=REPO,
        env=clean_environment() | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environ,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    said = f"{shlex.join(map(str, command))}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    assert done.returncode == 0, said
    return done.stdout


def find_python(version: str) -> str:
    """A Python of this version that can make environments."""
    for name in (sys.executable, shutil.which(f"python{version}")):
        code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
        if name:
            done = subprocess.run([name, "-c", code], capture_output=True, text=True, check=False)
            if done.stdout.strip() == version:
                return name
    pytest.skip(f"there is no python{version} on PATH")


def make_venv(folder: Path, version: str) -> Path:
    """A new environment without packages; returns its interpreter."""
    run(find_python(version), "-m", "venv", folder)
    return folder / "bin/python"


def requirements(key: str) -> list[str]:
    """Of one list in pyproject.toml, without torch and transformers, which a row names itself."""
    text = (REPO / "pyproject.toml").read_text("utf-8")
    found = re.search(rf"^{key} = \[\n(.*?)^\]", text, re.M | re.S)
    assert found
    return re.findall(r'^  "(?!torch|transformers)(.+)",$', found[1], re.M)


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: f"torch-{row.torch}")
def row(request: pytest.FixtureRequest) -> Row:
    return request.param


@pytest.fixture(scope="module")
def python(row: Row, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The interpreter of a row's environment, which is removed afterwards, or kept for later."""
    kept = os.environ.get("ENVIRONMENTS")
    folder = (Path(kept) if kept else tmp_path_factory.mktemp("environment")) / row.name
    if not (folder / "complete").exists():
        made = make_venv(folder, row.python)
        wanted = [f"torch=={row.torch}", f"transformers=={row.transformers}", "setuptools"]
        wanted += [*requirements("dependencies"), *requirements("serve")]
        wanted += [text for text in requirements("dev") if text.startswith(("pytest", "hypo"))]
        run(made, "-m", "pip", "install", "--no-cache-dir", "--quiet", *wanted)
        (folder / "complete").touch()
    yield folder / "bin/python"
    if not kept:
        shutil.rmtree(folder)


@pytest.fixture
def cache(python: Path) -> str:
    """For the compiled kernels of a row."""
    return str(python.parents[1] / "cache")


@pytest.fixture
def inner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tests of a row write: high up, for the path of a socket has 107 bytes at most."""
    return tmp_path_factory.getbasetemp() / "t"


def answer(script: str, *options: str, output: Path, root: Path = REPO, **environ: str) -> str:
    """The text that a launcher gives in fp32."""
    flags = ("--input_texts", PROMPT, "--max_output_length", "20", "--device", "cpu")
    flags += ("--dtype", "float32", "--output_file", str(output))
    run("bash", root / script, *options, *flags, **environ)
    (line,) = output.read_text("utf-8").splitlines()
    return json.loads(line)["text"]


@pytest.mark.environments
def test_the_main_job(python: Path, cache: str, tmp_path: Path) -> None:
    """Both launchers, with the kernels and without, answer as this transformers does."""
    expected = run(python, "-c", ORACLE, MINI, PROMPT, PYTHONPATH="").strip()
    environ = {"PYTHON": str(python), "XDG_CACHE_HOME": cache}
    page = run(python, "main.py", "doctor", "--device", "cpu", **environ)
    assert page.endswith("A run would start.\n"), page
    for kernels in ("on", "off"):
        output = tmp_path / f"paged-{kernels}.jsonl"
        text = answer("run_pa.sh", output=output, GPTNEOX_CPU_KERNELS=kernels, **environ)
        assert repr(text) == expected, kernels
    environ |= {"input_dir": str(MINI), "output_dir": str(tmp_path / "parts"), "world_size_": "2"}
    text = answer("cut_model_and_run.sh", "inference", output=tmp_path / "flash.jsonl", **environ)
    assert repr(text) == expected


@pytest.mark.environments
def test_the_tests(python: Path, cache: str, inner: Path) -> None:
    files = [REPO / "tests" / name for name in TESTS]
    options = ("-q", "-p", "no:cacheprovider", "--tb=short", "--basetemp", inner)
    said = run(python, "-m", "pytest", *options, *files, XDG_CACHE_HOME=cache)
    assert re.search(r"\d+ passed", said), said


@pytest.mark.environments
def test_the_emulated_npus(row: Row, python: Path, inner: Path) -> None:
    site = python.parents[1] / "npu_site"
    if not row.torch_npu:
        pytest.skip(f"the table names no torch_npu for torch {row.torch}")
    options = ("-q", "-p", "no:cacheprovider", "--tb=short", "--basetemp", inner)
    environ = {"FAKE_NPU_SITE": str(site), "GPTNEOX_CPU_KERNELS": "off"}
    said = run(python, "-m", "pytest", *options, REPO / "tests/npu", **environ)
    assert re.search(r"\d+ passed", said), said
    assert " skipped" not in said, said
    assert (site / f"torch_npu-{row.torch_npu}.dist-info").is_dir()


# -- the service ---------------------------------------------------------------------------------

DESCRIBE = """
import json
from support.service import ask, run_with
async def go(served):
    return (await ask(served, "/openapi.json")).json
print(json.dumps(run_with(go, template="dolly-v2")))
"""


def description(**environ: str) -> dict[str, Any]:
    """What the service says of itself, less the schema that is FastAPI's own."""
    found: dict[str, Any] = json.loads(run(sys.executable, "-c", DESCRIBE, **environ))
    for name in ("ValidationError", "HTTPValidationError"):
        found["components"]["schemas"].pop(name, None)
    return found


@pytest.mark.environments
def test_the_oldest_packages_of_the_service(tmp_path: Path, inner: Path) -> None:
    """They describe the same service as those that are here, and pass the tests of its routes."""
    bounds = re.findall(r"(\w+)>=([\d.]+)", " ".join(requirements("serve")))
    oldest = [f"{name}=={bound}.0" for name, bound in bounds]
    assert len(oldest) == 3
    run(sys.executable, "-m", "pip", "install", "--quiet", "--target", tmp_path / "old", *oldest)
    folders = {"PYTHONPATH": os.pathsep.join((str(tmp_path / "old"), str(REPO / "tests")))}
    assert description(**folders) == description(PYTHONPATH=str(REPO / "tests"))
    files = sorted((REPO / "tests").glob("test_server_[homst]*.py"))
    assert len(files) >= 6
    options = ("-q", "-p", "no:cacheprovider", "--tb=short", "--basetemp", inner)
    assert " passed" in run(sys.executable, "-m", "pytest", *options, *files, **folders)


# -- without a network ----------------------------------------------------------------------------


def download(folder: Path, number: int) -> None:
    """Run a block of code of the page, which downloads wheels, with this Python and folder."""
    text = PAGE.read_text("utf-8").split("\n## Without a network\n")[1]
    command = re.findall(r"```bash\n(.*?)```", text, re.S)[number]
    command, num_changes = re.subn(
        r"\Apython3\.\d+ -m pip download -d wheels ",
        f"{shlex.quote(sys.executable)} -m pip download -d {shlex.quote(str(folder))} ",
        command,
    )
    assert num_changes == 1, command
    run("bash", "-euc", command)


def checkout(folder: Path) -> Path:
    """A fresh clone, in a folder whose name has a blank."""
    for name in run("git", "ls-files", "-co", "--exclude-standard").splitlines():
        if (REPO / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The wheel house of this processor."""
    folder = tmp_path_factory.mktemp("house")
    download(folder, 0)
    yield folder
    shutil.rmtree(folder)


def offline(wheels: Path, tmp_path: Path) -> dict[str, str]:
    """As on a machine without a network: what tries one fails at once, and nothing is cached."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    return nowhere | {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_NO_CACHE_DIR": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "GPTNEOX_CPU_KERNELS": "off",  # a minute each, and the network is nothing to them
    }


@pytest.mark.environments
def test_a_launcher_fills_its_environment_from_the_wheel_house(wheels: Path, tmp_path: Path):
    """By pip's own variables; the Python on PATH has no packages."""
    root = checkout(tmp_path / "a checkout")
    bare = make_venv(tmp_path / "bare", THIS)
    environ = offline(wheels, tmp_path) | {"PATH": f"{bare.parent}:{os.environ['PATH']}"}
    text = answer("run_pa.sh", output=tmp_path / "out.jsonl", root=root, **environ)
    assert "learning" in text
    assert (root / ".venv/.gptneox-ascend").read_text().startswith("runtime ")


@pytest.mark.environments
def test_an_environment_that_the_user_made(wheels: Path, tmp_path: Path) -> None:
    """Named by PYTHON, filled from the wheel house: it is used, and none is made beside it."""
    root = checkout(tmp_path / "a checkout")
    mine = make_venv(tmp_path / "mine", THIS)
    environ = offline(wheels, tmp_path)
    needed = interpreter.needed()
    run(mine, "-m", "pip", "install", "--quiet", *needed, **environ)
    before = sorted(tmp_path.glob("mine/lib/*/site-packages/*"))
    environ["PYTHON"] = str(mine)
    text = answer("run_pa.sh", output=tmp_path / "out.jsonl", root=root, **environ)
    assert "learning" in text
    assert not (root / ".venv").exists()
    assert sorted(tmp_path.glob("mine/lib/*/site-packages/*")) == before


@pytest.mark.environments
def test_a_wheel_house_for_a_container_of_another_processor(tmp_path: Path) -> None:
    """Every requirement has a wheel for aarch64, and torch is none of them; none installs here."""
    download(tmp_path, 2)
    names = [path.name for path in tmp_path.iterdir()]
    assert not [name for name in names if not name.endswith(("_aarch64.whl", "-none-any.whl"))]
    found = {name.split("-")[0] for name in names}
    assert {"transformers", "safetensors", "tokenizers", "numpy", "tqdm"} <= found
    assert "torch" not in found
