# SPDX-License-Identifier: Apache-2.0
"""Who imports whom, where device names and the environment may be mentioned, file headers."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes import REPO

# From the front door to the foundation: a module imports from its own line or one further down.
COLUMNS = (
    {"main", "cut_model_util", "modeling_gpt_neox_ascend", "setup", "tools"},
    {"__main__", "launch", "start_ranks"},
    {"tasks", "server", "cluster"},
    {"chat", "evaluation", "output"},
    {"session", "prompts", "terminal", "chat_templates"},
    {"cli"},
    {"engine"},
    {"adapter"},  # to transformers' generate, which the flash path uses
    {"model", "weights"},
    {"layers", "kv_cache"},
    {"devices", "parallel"},
    {"config", "files", "hub", "interpreter"},
    {"file_faults", "lifeline"},
)
WITHOUT_TORCH = ("engine/sequence.py", "engine/block_manager.py", "engine/scheduler.py")
# Settings have to name the devices one can choose.
MAY_NAME_DEVICES = {
    *("gptneox/config/settings.py", "gptneox/config/environment.py", "gptneox/cli.py"),
    "gptneox/interpreter.py",  # the line that installs torch and its plugin as a pair
}
DEVICE_WORDS = re.compile(r"\b(npu|cuda|torch_npu|hccl|nccl|aclnn|ascend)\b", re.IGNORECASE)


def sources(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((REPO / folder).rglob("*.py"))]
    return found + sorted(REPO.glob("*.py"))


PRODUCT = sources("gptneox")


def name_of(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), name_of(path))


def imported(tree: ast.Module) -> Iterator[str]:
    """Full names of all imported modules, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module
            yield node.module
            if node.module == "gptneox":  # from gptneox import inference
                yield from (f"gptneox.{alias.name}" for alias in node.names)


def column(module: str) -> int | None:
    """Index in COLUMNS of one of our modules, None for anything else."""
    parts = module.split(".")
    if parts[0] == "gptneox":
        if len(parts) == 1 or parts[1] == "__version__":
            return len(COLUMNS)  # the package itself: its version
        name = parts[1]
    else:
        name = parts[0]
    for i, names in enumerate(COLUMNS):
        if name in names:
            return i
    assert parts[0] != "gptneox", f"{module} is in no column: decide who may import it"
    return None


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    own = column(module_of(path))
    assert own is not None, f"{name_of(path)} is in no column: decide who may import it"
    for module in imported(tree_of(path)):
        other = column(module)
        assert other is None or other >= own, f"{name_of(path)} imports {module} above it"


def test_the_rule_bites() -> None:
    assert (
        column("gptneox.config") > column("gptneox.devices.cpu.device") > column("gptneox.layers")
    )
    assert column("gptneox.model") > column("gptneox.engine.paged") > column("gptneox.cli")
    assert column("torch.nn") is None
    with pytest.raises(AssertionError):
        column("gptneox.brand_new")
    lazy = ast.parse("def f():\n    from gptneox import inference\n    import torch.nn as nn\n")
    assert set(imported(lazy)) == {"gptneox", "gptneox.inference", "torch.nn"}
    assert list(device_mentions(ast.parse("x = torch.cuda.is_available()")))
    assert list(device_mentions(ast.parse("import torch_npu")))
    assert list(device_mentions(ast.parse("x.to('npu:0')")))
    assert not list(device_mentions(ast.parse("def f():\n    'Runs on cuda.'\n    input_ids")))
    assert list(environment_uses(ast.parse("os.environ['A']")))
    assert list(environment_uses(ast.parse("from os import getenv")))


def docstrings(tree: ast.Module) -> set[int]:
    """Identities of the string nodes that only explain."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = set()
    for node in ast.walk(tree):
        first = node.body[0] if isinstance(node, kinds) and node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            found.add(id(first.value))
    return found


def device_mentions(tree: ast.Module) -> Iterator[str]:
    """Names, attributes, imports and strings of the program that name a device."""
    explaining = docstrings(tree)
    for module in imported(tree):
        if DEVICE_WORDS.search(module):
            yield f"import {module}"
    for node in ast.walk(tree):
        text = ""
        if isinstance(node, ast.Attribute):
            text = node.attr
        elif isinstance(node, ast.Name):
            text = node.id
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = "" if id(node) in explaining else node.value
        if DEVICE_WORDS.search(text):
            yield f"line {node.lineno}: {text[:60]}"


def test_no_task_imports_another() -> None:
    """What several tasks use is on a lower floor."""
    crossing = [
        f"{name_of(path)} imports {module}"
        for path in sorted((REPO / "gptneox" / "tasks").rglob("*.py"))
        for module in imported(tree_of(path))
        if module.startswith("gptneox.tasks.")
    ]
    assert not crossing


# Imports inside functions that close a circle on purpose. A device makes operators, which refer to
# their device; `gptneox modeltest` launches, and with one process the launcher is the run itself.
DEFERRED = {
    ("gptneox.launch", "gptneox.__main__"),
    ("gptneox.devices.device", "gptneox.devices.operators"),
    ("gptneox.devices.cpu.device", "gptneox.devices.cpu.compiled"),
}


def import_graph(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """The modules among `trees` that each of them imports when it runs, in functions too."""
    graph = {}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
        modules = set(imported(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):  # from package import module
                modules |= {f"{node.module}.{alias.name}" for alias in node.names}
        graph[name] = (modules & trees.keys()) - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Sets of modules that import each other, directly or through others."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    reach = {name: reachable(name) for name in graph}
    return {
        frozenset(other for other in reach[name] if name in reach[other])
        for name in graph
        if name in reach[name]
    }


def test_no_module_imports_itself_through_others() -> None:
    graph = import_graph({module_of(path): tree_of(path) for path in PRODUCT})
    for importing, other in DEFERRED:
        assert other in graph[importing], f"{importing} does not import {other} any more"
        graph[importing].discard(other)
    assert not circles(graph)


def test_the_search_for_circles_bites() -> None:
    trees = {
        "p.a": ast.parse("from p import b"),
        "p.b": ast.parse("def f():\n    from p.c import x"),
        "p.c": ast.parse("import p.a"),
        "p.d": ast.parse("import p.a"),
        "p.e": ast.parse("if TYPE_CHECKING:\n    import p.f"),
        "p.f": ast.parse("import p.e"),
    }
    assert circles(import_graph(trees)) == {frozenset({"p.a", "p.b", "p.c"})}


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_devices_are_named_in_their_package_only(path: Path) -> None:
    if name_of(path).startswith("gptneox/devices/") or name_of(path) in MAY_NAME_DEVICES:
        return
    descriptions = {"GPT-NeoX on Ascend NPU, CUDA and CPU"}
    found = [m for m in device_mentions(tree_of(path)) if not any(d in m for d in descriptions)]
    assert not found, f"{name_of(path)}: {found}"


def test_no_test_file_imports_another() -> None:
    """What several of them use is in tests/support."""
    found = [
        f"{name_of(path)} imports {module}"
        for kind in ("test_*", "check_*", "conftest", "support/*")
        for path in sorted((REPO / "tests").rglob(f"{kind}.py"))
        for module in imported(tree_of(path))
        if module.startswith(("test_", "check_", "conftest"))
    ]
    assert not found, found


def environment_uses(tree: ast.Module) -> Iterator[str]:
    words = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in words:
            if isinstance(node.value, ast.Name) and node.value.id == "os":
                yield f"line {node.lineno}: os.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (f"from os import {a.name}" for a in node.names if a.name in words)


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_the_environment_is_read_in_config_only(path: Path) -> None:
    found = list(environment_uses(tree_of(path)))
    assert bool(found) == (name_of(path) == "gptneox/config/environment.py"), found


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_the_schedule_knows_no_tensors(name: str) -> None:
    modules = set(imported(tree_of(REPO / "gptneox" / name)))
    allowed = set(sys.stdlib_module_names)
    foreign = {m for m in modules if m.split(".")[0] not in allowed}
    foreign -= {"gptneox.config.errors"}  # the classes alone
    assert all(m.startswith("gptneox.engine.") for m in foreign), foreign


def test_settings_and_schedule_load_without_torch() -> None:
    """Usage errors and --help answer at once; nothing heavy comes in through the back door."""
    names = "gptneox.cli, gptneox.engine.scheduler, gptneox.engine.detokenizer, main"
    code = (
        f"import sys\nimport {names}\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True, timeout=60)


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_every_module_has_a_licence_line_and_a_docstring(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n", 2)
    first = lines[1] if text.startswith("#!") else lines[0]
    assert first == "# SPDX-License-Identifier: Apache-2.0"
    assert ast.get_docstring(tree_of(path)), "no docstring"


def test_no_path_of_a_developers_machine() -> None:
    """Nothing that is or will be committed names a directory of the machine it was made on."""
    if not (REPO / ".git").exists():
        pytest.skip("not a git checkout")
    pattern = "|".join(f"/{name}/" for name in ("work", "home/[a-z]+", "Users", "root"))
    done = subprocess.run(
        ["git", "grep", "-nIE", "--untracked", f"(^|[^a-zA-Z0-9_./])({pattern})"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout == ""


# An interface of a device's operators, whose methods are the operators.
MAY_BE_LARGER = {"Operators": 27}


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_classes_stay_small(path: Path) -> None:
    """At most 20 public methods; functions of at most 8 parameters are ruff's to check."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ClassDef):
            methods = [n.name for n in node.body if isinstance(n, ast.FunctionDef)]
            public = [name for name in methods if not name.startswith("_")]
            assert len(public) <= MAY_BE_LARGER.get(node.name, 20), f"{node.name}: {public}"
