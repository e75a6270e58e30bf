# SPDX-License-Identifier: Apache-2.0
"""Compiles `cpu_kernels/` once per machine and loads it; without a compiler there is plain torch.

The result is kept in the user's cache folder, under a name made of everything it depends on, so
another torch, Python, processor or source compiles its own. A failed attempt is remembered too.
`python -m gptneox.backends.cpu_build` compiles ahead of the first run.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import logging
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import torch

from gptneox.config import ConfigError, Environment

logger = logging.getLogger(__name__)

NAME = "gptneox_cpu_kernels"
SOURCES = Path(__file__).parent / "cpu_kernels"
LOSS = "products of few rows, fp16 and attention are slower in plain torch"

# What this process runs in the compiler's process.
_BUILD = """
import json, sys
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension
name, source, target, flags = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
setup(
    name=name,
    ext_modules=[CppExtension(name, [source], extra_compile_args=flags)],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=False)},
    script_args=["-q", "build_ext", "--build-lib", target, "--build-temp", target + "/objects"],
)
"""


def compile_flags(capability: str, processor_flags: str) -> list[str]:
    """Options for the instruction set that torch itself uses on this processor."""
    flags = [
        "-O3",
        "-std=c++20",
        "-fopenmp",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-Wno-psabi",
    ]
    chosen = "DEFAULT"
    if platform.machine() in ("x86_64", "AMD64"):
        if capability == "AVX512":
            chosen = "AVX512"
            flags += [
                f"-m{n}" for n in ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "f16c")
            ]
            if "avx512_bf16" in processor_flags.split():
                flags.append("-mavx512bf16")
        elif capability == "AVX2":
            chosen = "AVX2"
            flags += ["-mavx2", "-mfma", "-mf16c"]
    else:
        flags.append("-mcpu=native")
    return [*flags, f"-DCPU_CAPABILITY={chosen}", f"-DCPU_CAPABILITY_{chosen}"]


def _processor_flags() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    lines = (line for line in text.splitlines() if line.startswith(("flags", "Features")))
    return next(lines, "").partition(":")[2].strip()


@functools.cache
def load(wanted: str = "") -> ModuleType | None:
    """The compiled module, made on first use; None where it cannot be had, after one warning.

    Args:
        wanted: "off" never loads it, "on" refuses to go without; GPTNEOX_CPU_KERNELS by default.

    Raises:
        ConfigError: "on", and it cannot be had.
    """
    environment = Environment.read()
    wanted = wanted or environment.cpu_kernels
    if wanted == "off":
        return None
    try:
        return _import(_built(environment))
    except (OSError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
        if wanted == "on":
            raise ConfigError(f"the CPU kernels cannot be had: {reason}") from error
        logger.warning("no CPU kernels (%s): %s", reason, LOSS)
        return None


def _built(environment: Environment) -> Path:
    """The compiled library, compiled now if it is not there."""
    flags = compile_flags(torch.backends.cpu.get_cpu_capability(), _processor_flags())
    parts = [torch.__version__, sys.version, sysconfig.get_platform(), _processor_flags(), *flags]
    key = hashlib.sha256("\0".join(parts).encode())
    for source in sorted(SOURCES.iterdir()):
        key.update(source.name.encode() + source.read_bytes())
    cache = Path(environment.cache_home or "~/.cache").expanduser()
    folder = cache / "gptneox-ascend" / "cpu_kernels" / key.hexdigest()[:16]
    library = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if library.is_file():
        return library
    compiler = environment.cxx or "c++"
    if shutil.which(compiler.split()[0]) is None:
        raise RuntimeError(f"there is no compiler {compiler!r}; install one (Debian: g++)")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.is_file():
            _compile(folder, library, flags)
    return library


def _compile(folder: Path, library: Path, flags: list[str]) -> None:
    log = folder / "compiler.log"
    if log.is_file():
        raise RuntimeError(f"they did not compile before; see {log}, delete it to try again")
    logger.warning("compiling the CPU kernels, once only, about a minute …")
    with tempfile.TemporaryDirectory(dir=folder) as target:
        command = [sys.executable, "-c", _BUILD, NAME, str(SOURCES / "ops.cpp"), target]
        done = subprocess.run(
            [*command, "[" + ", ".join(f'"{flag}"' for flag in flags) + "]"],
            capture_output=True,
            text=True,
            errors="replace",
            cwd=target,
            check=False,
        )
        made = list(Path(target).glob(f"{NAME}*.so"))
        if done.returncode or not made:
            log.write_text(done.stdout + done.stderr, encoding="utf-8")
            raise RuntimeError(f"the compiler failed; see {log}")
        made[0].replace(library)  # whole or not at all


def _import(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> int:
    """Compile now; exit status 0 also where it cannot be done, for nothing depends on it."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    load()
    return 0


if __name__ == "__main__":
    sys.exit(main())
