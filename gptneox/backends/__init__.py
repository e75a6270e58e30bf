# SPDX-License-Identifier: Apache-2.0
"""Devices. `select` is the only place that knows their names; each is imported on first use."""

from __future__ import annotations

import importlib
import logging

from gptneox.backends.base import Backend

logger = logging.getLogger(__name__)

# In the order that "auto" tries; each is a module of this package with a function `create`.
BACKENDS = ("npu", "cuda", "cpu")


def create(name: str) -> Backend:
    """The backend called `name`, whether or not its device is present.

    Raises:
        ConfigError: GPTNEOX_CPU_KERNELS=on, and the kernels cannot be had.
    """
    backend = importlib.import_module(f"gptneox.backends.{name}").create()
    assert isinstance(backend, Backend)
    return backend


def select(name: str = "auto") -> Backend:
    """Choose a device.

    Args:
        name: "auto" takes the first usable of `BACKENDS`; any other name is that device or an
            error, never a silent replacement.

    Raises:
        RuntimeError: the named device cannot be used; the message says why.
    """
    if name != "auto":
        if name not in BACKENDS:
            raise RuntimeError(
                f"device {name!r} is not built yet; use one of auto, {', '.join(BACKENDS)}"
            )
        backend = create(name)
        if reason := backend.why_unusable():
            raise RuntimeError(f"device {name!r} cannot be used: {reason}")
        return backend
    reasons: list[str] = []
    for candidate in BACKENDS:
        backend = create(candidate)
        reason = backend.why_unusable()
        if not reason:
            logger.debug("device auto: %s (%s)", candidate, "; ".join(reasons) or "first choice")
            return backend
        reasons.append(f"{candidate}: {reason}")
        if backend.is_installed():
            logger.warning("device %s is passed over: %s", candidate, reason)
    raise RuntimeError(f"no usable device: {'; '.join(reasons)}")
