# SPDX-License-Identifier: Apache-2.0
"""Devices by their names (`DEVICES` of config/settings.py); each is imported on first use.

A new device is a package here with a module `device` that has a function `create`, and a name in
`DEVICES`. `Device` and `Operators` are complete in plain torch: it overrides what it does better.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING

from gptneox.config.settings import DEVICES

if TYPE_CHECKING:  # the import needs torch
    from gptneox.devices.device import Device

logger = logging.getLogger(__name__)


def create(name: str) -> Device:
    """The device called `name`, whether or not its hardware is present.

    Raises:
        ConfigError: GPTNEOX_CPU_KERNELS=on, but the kernels cannot be built or loaded.
    """
    device: Device = importlib.import_module(f"gptneox.devices.{name}.device").create()
    return device


def select(name: str = "auto") -> Device:
    """Choose a device.

    Args:
        name: "auto" for the first usable one of `DEVICES`. A named device is never replaced by
            another one.

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
