# SPDX-License-Identifier: Apache-2.0
"""What all tests share: offline, one thread, a tiny checkpoint, every usable backend."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"  # before transformers

import pytest
import torch
import transformers
import twins

from gptneox.backends import BACKENDS, create
from gptneox.backends.base import Backend

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tests run side by side; some code under test sets the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random fp32 checkpoint without a tokenizer (the Pythia-14M twin); do not write into it."""
    directory = tmp_path_factory.mktemp("tiny") / "checkpoint"
    twins.write_checkpoint(directory, twins.FAMILY["pythia-14m"])
    return directory


@pytest.fixture(params=sorted(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every backend that can be used on this machine."""
    made = create(request.param)
    if reason := made.why_unusable():
        pytest.skip(f"device {request.param} cannot be used: {reason}")
    return made
