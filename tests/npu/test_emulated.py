# SPDX-License-Identifier: Apache-2.0
"""The checks of `on_device`, run on each emulated machine in a process of their own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).resolve().parent / "on_device"


@pytest.mark.parametrize("name", ["910B4", "310P3", "310P3-without-ATB"])
@pytest.mark.parametrize("part", sorted(p.stem for p in CHECKS.glob("check_*.py")))
def test_on_device(machines, name, part, tmp_path):
    run_checks(machines[name], part, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["910B4", "310P3", "310P3-without-ATB"])
def test_every_twin(machines, name, tmp_path):
    """Whole family, 64 decode steps each."""
    run_checks(machines[name], "check_parity", tmp_path, "-m", "")


def run_checks(machine, part, tmp_path, *options):
    trace = tmp_path / "trace"
    done = machine.run(
        *(sys.executable, "-m", "pytest", "-q", "-x", "--tb=short", "-p", "no:cacheprovider"),
        *("-o", "python_files=check_*.py", "--basetemp", tmp_path / "inner"),
        *options,
        CHECKS / f"{part}.py",
        FAKE_NPU_TRACE=str(trace),
    )
    assert done.returncode in (0, 5), done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout or "deselected" in done.stdout, done.stdout
