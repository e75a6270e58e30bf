# SPDX-License-Identifier: Apache-2.0
"""Compiles `src/` once per machine and loads it; without a compiler there is plain torch.

The result is kept in the user's cache folder, under a name made of everything it depends on, so
another torch, Python, processor or source compiles its own. A failed attempt is remembered too.
`python -m gptneox.devices.cpu.build` compiles ahead of the first run.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import logging
import os
import platform
import pwd
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import IO

from gptneox import interpreter

if __name__ == "__main__":
    interpreter.require(["-m", "gptneox.devices.cpu.build", *sys.argv[1:]])

import torch

from gptneox import files
from gptneox.config.environment import Environment
from gptneox.config.errors import ConfigError, exit_status
from gptneox.devices.cpu import blocked

logger = logging.getLogger(__name__)

NAME = "gptneox_cpu_kernels"
SOURCES = Path(__file__).parent / "src"
LOSS = "so products of few rows, fp16 and attention are slower"

# What this process runs in the compiler's process.
_BUILD = """
import json, os, sys
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension
name, source, target, compiler = sys.argv[1:5]
flags = json.loads(sys.argv[5])
os.environ.update(CC=compiler, CXX=compiler)  # setuptools takes the one or the other
setup(
    name=name,
    ext_modules=[CppExtension(name, [source], extra_compile_args=flags)],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=False)},
    script_args=["-q", "build_ext", "--build-lib", target, "--build-temp", target + "/objects"],
)
"""


def compile_flags(capability: str, processor_flags: str) -> list[str]:
    """Options for the instruction set that torch itself uses on this processor.

    On aarch64 that is NEON, with dot products of bf16 where the processor has them. SVE stays off:
    the kernels' vectors are NEON's, and GCC 12 compiles plain loops to wrong code with SVE (its bug
    117001).
    """
    flags = [
        "-O3",
        "-g0",  # Python's own options ask for debug symbols, which take half of the time
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
            if "avx512_vnni" in processor_flags.split():
                flags.append("-mavx512vnni")
        elif capability == "AVX2":
            chosen = "AVX2"
            flags += ["-mavx2", "-mfma", "-mf16c"]
    elif platform.machine() in ("aarch64", "arm64"):
        names = processor_flags.split()
        atomics = "+lse" if "atomics" in names else ""
        architecture = "armv8.2-a+bf16" if "bf16" in names else f"armv8-a{atomics}"
        flags += [f"-march={architecture}", "-mtune=native"]
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
        library = _built(environment)
        module = _import(library)
        numbers = library.with_name("products.json")
        blocked.choose(module, numbers, has_matrix_units="amx_tile" in _processor_flags().split())
        return module
    except (OSError, RuntimeError) as error:
        if wanted == "on":
            raise ConfigError(f"GPTNEOX_CPU_KERNELS is on, but {error}") from error
        logger.warning("no CPU kernels, %s: %s", LOSS, error)
        return None


def _built(environment: Environment) -> Path:
    """The compiled library, compiled now if it is not there."""
    flags = compile_flags(torch.backends.cpu.get_cpu_capability(), _processor_flags())
    parts = [torch.__version__, sys.version, sysconfig.get_platform(), _processor_flags(), *flags]
    key = hashlib.sha256("\0".join(parts).encode())
    for source in sorted(SOURCES.iterdir()):
        key.update(source.name.encode() + source.read_bytes())
    folder = _cache_folder(environment) / "gptneox-ascend" / "cpu_kernels" / key.hexdigest()[:16]
    library = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if library.is_file():
        return library
    compiler = _compiler(environment)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise RuntimeError(
            f"{folder} cannot be written: {error.strerror}; set XDG_CACHE_HOME to a folder that can"
        ) from error
    with lock:
        _wait_for(lock)
        if not library.is_file():
            _compile(library, compiler, flags)
    return library


def _cache_folder(environment: Environment) -> Path:
    """XDG_CACHE_HOME, else .cache in the home folder.

    Raises:
        RuntimeError: there is neither.

    Source: XDG Base Directory Specification 0.8, which has relative paths ignored.
    """
    chosen = Path(environment.cache_home)
    if chosen.is_absolute():
        return chosen
    if environment.cache_home:
        logger.warning("XDG_CACHE_HOME=%s is not an absolute path: ~/.cache is used", chosen)
    home = environment.home
    if not home:
        with contextlib.suppress(KeyError):  # a container may run as a number that has no name
            home = pwd.getpwuid(os.getuid()).pw_dir
    if not Path(home).is_absolute():
        raise RuntimeError(
            f"there is no folder to keep them in (HOME is {home!r}); set XDG_CACHE_HOME to one"
        )
    return Path(home) / ".cache"


def _compiler(environment: Environment) -> str:
    """The compiler's command, once nothing is missing that it needs."""
    compiler = environment.cxx.strip() or "c++"
    if shutil.which(compiler.split()[0]) is None:
        raise RuntimeError(
            f"there is no compiler {compiler!r}; install one (Debian: g++) or name one by CXX"
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        raise RuntimeError(f"{header} is missing; install Python's headers (Debian: python3-dev)")
    if importlib.util.find_spec("setuptools") is None:
        raise RuntimeError("setuptools is missing; install it with pip")
    return compiler


def _wait_for(lock: IO[str]) -> None:
    if not files.lock(lock):
        logger.info("another process is compiling the CPU kernels; waiting for it")
        files.lock(lock, wait=True)


def _compile(library: Path, compiler: str, flags: list[str]) -> None:
    """Compile to `library`, or leave a log that keeps this compiler from being tried again."""
    log = library.with_name("compiler.log")
    binary = Path(str(shutil.which(compiler.split()[0]))).resolve()
    title = f"{compiler}, {binary} of {binary.stat().st_mtime_ns}\n"
    if log.is_file() and log.read_text(encoding="utf-8").startswith(title):
        raise RuntimeError(
            f"they did not compile before, see {log}; delete it, or name another compiler by CXX, "
            "to try again"
        )
    logger.warning("compiling the CPU kernels, once only, about a minute …")
    with tempfile.TemporaryDirectory(dir=library.parent) as target:
        source = str(SOURCES / "bindings.cpp")
        done = subprocess.run(
            [sys.executable, "-c", _BUILD, NAME, source, target, compiler, json.dumps(flags)],
            capture_output=True,
            text=True,
            errors="replace",
            cwd=target,
            check=False,
        )
        made = list(Path(target).glob(f"{NAME}*.so"))
        if done.returncode or not made:
            log.write_text(title + done.stdout + done.stderr, encoding="utf-8")
            raise RuntimeError(f"{compiler} failed, see {log}; it is not tried again")
        made[0].replace(library)  # whole or not at all


def _import(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise RuntimeError(f"{error}; delete {library} to compile it anew") from error
    return module


def main() -> int:
    """Compile now; exit status 0 also where it cannot be done, unless GPTNEOX_CPU_KERNELS=on."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        module = load()
    except ConfigError as error:
        logger.error("%s", error)  # noqa: TRY400
        return exit_status(error)
    if module is not None:
        logger.info("CPU kernels: %s", module.describe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
