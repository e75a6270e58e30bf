# SPDX-License-Identifier: Apache-2.0
"""The errors for what a user gave, and the exit status of each."""

from __future__ import annotations

from typing import Any

FAILED, WRONG_USAGE = 1, 2


class ConfigError(ValueError):
    """A setting is wrong; the message names the key, its value and what is accepted."""


class NoSuchPath(ConfigError, FileNotFoundError):
    """A path that the user named is not there."""


class FileError(ValueError):
    """A file holds something else than it should; the message names it."""


def exit_status(error: BaseException) -> int:
    """The status of a program that ends with this error, whichever part of it found it.

    Whoever calls the program can mend what is wrong usage: a flag, a key, a path that is not there.
    """
    return WRONG_USAGE if isinstance(error, ConfigError) else FAILED


def one_of(section: str, key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise ConfigError unless `value` of a key is one of those allowed."""
    if value not in allowed:
        choices = ", ".join(str(a) for a in allowed)
        raise ConfigError(f"[{section}] {key} is {value!r}; use one of {choices}")
