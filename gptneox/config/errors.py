# SPDX-License-Identifier: Apache-2.0
"""The error for a wrong setting."""

from __future__ import annotations

from typing import Any


class ConfigError(ValueError):
    """A setting is wrong; the message names the key, its value and what is accepted."""


def one_of(section: str, key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise ConfigError unless `value` of a key is one of those allowed."""
    if value not in allowed:
        choices = ", ".join(str(a) for a in allowed)
        raise ConfigError(f"[{section}] {key} is {value!r}; use one of {choices}")
