# SPDX-License-Identifier: Apache-2.0
"""Errors that the user can fix."""

from __future__ import annotations


class UsageError(ValueError):
    """A flag is wrong or something it needs is missing; the command ends with status 2."""


class WorkerError(RuntimeError):
    """An engine's process failed, died or did not answer."""

    def __init__(self, reason: str, details: str = "") -> None:
        """`reason` is fit for a result that others read; `details` are of this machine."""
        super().__init__(f"{reason}; {details}" if details else reason)
        self.reason = reason
