# SPDX-License-Identifier: Apache-2.0
"""The checks of `on_device`, run on each emulated machine in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).resolve().parent / "on_device"


@pytest.mark.parametrize("name", ["910B4", "310P3", "310P3-without-ATB"])
def test_on_device(machines, name, tmp_path):
    """All in one process: to import torch_npu takes longer than many a check."""
    run_checks(machines[name], sorted(CHECKS.glob("check_*.py")), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["910B4", "310P3", "310P3-without-ATB"])
def test_every_twin(machines, name, tmp_path):
    """Whole family, 64 decode steps each."""
    run_checks(machines[name], [CHECKS / "check_parity.py"], tmp_path, "-m", "")


def run_checks(machine, files, tmp_path, *options):
    trace = tmp_path / "trace"
    done = machine.run(
        *(sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"),
        *("-o", "python_files=check_*.py", "--basetemp", tmp_path / "inner"),
        *options,
        *files,
        FAKE_NPU_TRACE=str(trace),
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout
