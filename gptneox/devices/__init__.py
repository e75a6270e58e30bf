# SPDX-License-Identifier: Apache-2.0
"""Devices. `select` is the only place that knows their names; each is imported on first use."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch is needed by a device alone
    from gptneox.devices.device import Device

logger = logging.getLogger(__name__)

# In the order that "auto" tries; the module `device` of each package has a function `create`.
DEVICES = ("npu", "cuda", "cpu")


def create(name: str) -> Device:
    """The device called `name`, whether or not its device is present.

    Raises:
        ConfigError: GPTNEOX_CPU_KERNELS=on, and the kernels cannot be had.
    """
    device: Device = importlib.import_module(f"gptneox.devices.{name}.device").create()
    return device


def select(name: str = "auto") -> Device:
    """Choose a device.

    Args:
        name: "auto" takes the first usable of `DEVICES`; any other name is that device or an
            error, never a silent replacement.

    Raises:
        RuntimeError: the named device cannot be used; the message says why.
    """
    if name != "auto":
        if name not in DEVICES:
            raise RuntimeError(
                f"device {name!r} is not built yet; use one of auto, {', '.join(DEVICES)}"
            )
        device = create(name)
        if reason := device.why_unusable():
            raise RuntimeError(f"device {name!r} cannot be used: {reason}")
        return device
    reasons: list[str] = []
    for candidate in DEVICES:
        device = create(candidate)
        reason = device.why_unusable()
        if not reason:
            logger.debug("device auto: %s (%s)", candidate, "; ".join(reasons) or "first choice")
            return device
        reasons.append(f"{candidate}: {reason}")
        if device.is_installed():
            logger.warning("device %s is passed over: %s", candidate, reason)
    raise RuntimeError(f"no usable device: {'; '.join(reasons)}")
