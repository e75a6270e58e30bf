# SPDX-License-Identifier: Apache-2.0
"""The real torch_npu in a folder of its own, and the emulated machines it is run on.

torch_npu never enters the main environment: with it there a bare `import torch` fails unless CANN
is installed too.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
# ignored by git through a file of its own; another folder for another torch beside it
SITE = Path(os.environ.get("FAKE_NPU_SITE") or REPO / ".npu_site")


@dataclass(frozen=True)
class Machine:
    """An emulated machine, as the environment of a process."""

    name: str
    soc: str
    libraries: Path

    def environment(self, **extra: str) -> dict[str, str]:
        dropped = ("FAKE_NPU", "ASCEND", "RANK", "LOCAL_RANK", "WORLD_SIZE", "PYTEST_")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
        return inherited | {
            "FAKE_NPU_SOC": self.soc,
            "FAKE_NPU_COUNT": "2",
            "LD_LIBRARY_PATH": str(self.libraries),
            "PYTHONPATH": os.pathsep.join(map(str, (HERE / "emulator/site", SITE))),
            "PYTHON": sys.executable,
            "PYTHONWARNINGS": "ignore",
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
            "TASK_QUEUE_ENABLE": "0",  # the emulator writes a result right after the launch
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            **extra,
        }

    def run(self, *command: str | Path, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env=self.environment(**extra),
            cwd=REPO,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time: tests run side by side."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def install_torch_npu() -> str:
    """Fill SITE with the torch_npu of this torch; returns why that is not possible, or ""."""
    version = torch.__version__.split("+")[0]
    SITE.mkdir(exist_ok=True)
    (SITE / ".gitignore").write_text("*\n", encoding="ascii")
    with locked(SITE / ".lock"):
        if list(SITE.glob(f"torch_npu-{version}*.dist-info/RECORD")):
            return ""
        command = ("pip", "install", "--no-deps", "--upgrade", "--target", str(SITE))
        done = subprocess.run(
            [sys.executable, "-m", *command, f"torch_npu=={version}"],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        return f"torch_npu {version} cannot be had: {done.stderr.strip().splitlines()[-1:]}"
    return ""


def build_stubs() -> Path:
    """The stand-in libraries, built once for a state of the emulator's sources."""
    sources = [HERE / "emulator/build.py", HERE / "emulator/runtime.c"]
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources))
    digest.update(torch.__version__.encode())
    folder = SITE / f"stubs-{digest.hexdigest()[:12]}"
    with locked(SITE / ".lock"):
        if not (folder / "complete").exists():
            subprocess.run([sys.executable, sources[0], folder, SITE], check=True)
            without_atb = folder / "without_atb"
            without_atb.mkdir(exist_ok=True)
            for library in folder.glob("*.so"):
                if library.name != "libatb.so":
                    shutil.copy(library, without_atb)
            (folder / "complete").touch()
    return folder


@pytest.fixture(scope="session")
def stubs() -> Path:
    """Folder of the stand-in libraries; skips when torch_npu or a tool is not to be had."""
    if missing := [tool for tool in ("gcc", "nm", "readelf") if not shutil.which(tool)]:
        pytest.skip(f"no {', '.join(missing)} to build the emulator with")
    if reason := install_torch_npu():
        pytest.skip(reason)
    return build_stubs()


@pytest.fixture(scope="session")
def machines(stubs: Path) -> dict[str, Machine]:
    """Every emulated machine by its name."""
    found = [
        Machine("910B4", "Ascend910B4", stubs),
        Machine("310P3", "Ascend310P3", stubs),
        Machine("310P3-without-ATB", "Ascend310P3", stubs / "without_atb"),
    ]
    return {machine.name: machine for machine in found}
