# SPDX-License-Identifier: Apache-2.0
"""A setting is written once, as a dataclass field, which says all that is known about it.

Flags, `--help`, config.ini and docs/settings.md are made from it (`gptneox.cli`,
`gptneox.config.documents`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Setting:
    """A setting: a dataclass field that was made by `setting`."""

    name: str
    default: Any
    help: str  # sentences for --help, config.ini and the docs
    details: str = ""  # more sentences, for config.ini and the docs alone
    choices: tuple[Any, ...] = ()
    minimum: float | None = None
    maximum: float | None = None  # goes with a minimum
    env: str = ""  # environment variable
    flag_name: str | None = None  # None: the name; empty: there is no flag
    group: str = ""  # of flags in --help; empty: there is no flag
    placeholder: str = ""  # for the flag's value; empty: by the type
    nargs: str = ""  # for argparse, where the type does not say it
    parse: Callable[[str], Any] | None = None  # text to value, where the type does not say it
    is_hidden: bool = False  # the flag is for our own launchers

    @property
    def flag(self) -> str:
        """Such as --block_size; empty where the setting has none."""
        name = self.name if self.flag_name is None else self.flag_name
        return f"--{name}" if name and self.group else ""

    @property
    def metavar(self) -> str:
        """The placeholder of the flag's value."""
        by_type = {int: "N", float: "X", bool: "BOOL"}
        return self.placeholder or by_type.get(type(self.default), "NAME")

    @property
    def shown_default(self) -> str:
        """The default as config.ini writes it; empty where nothing is set."""
        if isinstance(self.default, bool):
            return str(self.default).lower()
        return "" if self.default is None or self.default == () else str(self.default)

    @property
    def accepted(self) -> str:
        """Choices, or a range with two ends, as a sentence."""
        if self.choices:
            return " | ".join(map(str, self.choices)) + "."
        return "" if self.maximum is None else f"{self.minimum} to {self.maximum}."


def setting(default: Any, text: str, details: str = "", **options: Any) -> Any:
    """A dataclass field; `text` is the help, and `options` are fields of `Setting`."""
    return field(default=default, metadata={"help": text, "details": details, **options})


def settings_of(cls: type) -> list[Setting]:
    """The settings of a dataclass, in order; its attribute `group` is that of their flags."""
    group = getattr(cls, "group", "")
    return [Setting(f.name, f.default, **{"group": group, **f.metadata}) for f in fields(cls)]
