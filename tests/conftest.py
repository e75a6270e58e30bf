# SPDX-License-Identifier: Apache-2.0
"""What all tests share: offline, one thread, a tiny checkpoint, every usable device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"  # before transformers

import pytest
import torch
import transformers
from support import checkpoints
from support.processes import without_new_handlers

from gptneox.config.settings import DEVICES
from gptneox.devices import create
from gptneox.devices.cpu.device import CpuDevice
from gptneox.devices.device import Device
from gptneox.devices.operators import Operators

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)


# The engine's own tests know no device: of these alone the default run repeats on plain torch.
ENGINE_TESTS_ON_PLAIN_CPU = (
    "test_batch_equals_hf_one_by_one",
    "test_alone_is_near_batch_in_half_precision",
    "test_undefined_cache_content_is_never_read",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The others are for -m slow."""
    for item in items:
        engine_test = item.path.name == "test_paged.py" and "cpu-plain" in item.name
        if engine_test and not item.name.startswith(ENGINE_TESTS_ON_PLAIN_CPU):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tests run side by side; some code under test sets the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random fp32 checkpoint without a tokenizer (the Pythia-14M twin); do not write into it."""
    directory = tmp_path_factory.mktemp("tiny") / "checkpoint"
    checkpoints.write_checkpoint(directory, checkpoints.FAMILY["pythia-14m"])
    return directory


@pytest.fixture(autouse=True)
def _no_handlers_stay() -> Iterator[None]:
    """main() logs to the stream of its test, which is closed in the next one."""
    with without_new_handlers():
        yield


@pytest.fixture(params=[*sorted(DEVICES), "cpu-plain"])
def device(request: pytest.FixtureRequest) -> Device:
    """Every device that can be used on this machine; a CPU also without its kernels."""
    name, _, form = request.param.partition("-")
    made = CpuDevice() if form == "plain" else create(name)
    if reason := made.why_unusable():
        pytest.skip(f"device {name} cannot be used: {reason}")
    if name == "cpu" and not form and type(made) is CpuDevice:
        pytest.skip("there are no CPU kernels: cpu-plain is the same")
    return made


@pytest.fixture
def ops(device: Device) -> Operators:
    """Operators of a fresh model on each device."""
    return device.operators()
