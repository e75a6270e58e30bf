# SPDX-License-Identifier: Apache-2.0
"""Write config.ini and docs/settings.md from the dataclasses of the settings.

`python -m gptneox.config.documents` writes both in the checkout that this module is part of.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

from gptneox.config.arguments import GROUPS, Arguments, Generation
from gptneox.config.environment import LAUNCHER_VARIABLES, Environment
from gptneox.config.schema import Setting, settings_of
from gptneox.config.settings import SECTIONS, QuantizeOptions

COMMAND = "python -m gptneox.config.documents"

INI_HEAD = """\
; Settings of main.py. Precedence: command-line flag > environment variable > this file > default.
; Every key is listed with its default. Lines that start with ; or # are comments; so is the rest of
; a line after a blank and one of them. An unknown key or section is an error, never ignored.
"""

PAGE_HEAD = f"""\
# Settings

Precedence: command-line flag > environment variable > config.ini > default. The effective settings
are printed once. An unknown flag, key or section is an error; an empty value counts as unset. Every
flag may be written with `-` instead of `_`, and `python main.py --help` lists them all.

`{COMMAND}` makes this page and [config.ini](../config.ini) from the
dataclasses in `gptneox/config`; defaults and texts are changed there.
"""

ENVIRONMENT_HEAD = """\
## Environment variables without a key

What is exported goes before what the launchers set. A variable that is true or false is on when it
is 1.
"""


def config_ini() -> str:
    """The text of config.ini: every key with its default and a comment."""
    parts = [INI_HEAD]
    for name, cls in SECTIONS.items():
        parts.append(f"[{name}]\n; {cls.__doc__}\n")
        lines = []
        for each in settings_of(cls):
            lines += textwrap.wrap(
                _explain(each) + (f" Environment: {each.env}." if each.env else ""),
                width=100,
                initial_indent="; ",
                subsequent_indent="; ",
                break_on_hyphens=False,
            )
            lines.append(f"{each.name} = {each.shown_default}".rstrip())
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def settings_page() -> str:
    """The text of docs/settings.md: every key, flag and variable."""
    parts = [PAGE_HEAD, "## Keys of config.ini\n"]
    for name, cls in SECTIONS.items():
        parts += [f"### [{name}]\n\n{cls.__doc__}\n"]
        parts += [_table(("key", "flag", "environment", "default", "meaning"), settings_of(cls))]
    parts.append("## Flags without a key\n")
    flags = [each for cls in (Arguments, QuantizeOptions, Generation) for each in settings_of(cls)]
    for group in GROUPS:
        if rows := [each for each in flags if each.group == group and not each.is_hidden]:
            parts += [f"### {group}\n", _table(("flag", "default", "meaning"), rows)]
    parts += [ENVIRONMENT_HEAD]
    parts += [_table(("environment", "default", "meaning"), settings_of(Environment))]
    parts.append("The launchers read these besides:\n")
    names = {_code(*words.split(", ")): text for words, text in LAUNCHER_VARIABLES.items()}
    return "\n".join([*parts, _lines(("environment", "meaning"), names.items())])


def _explain(each: Setting) -> str:
    return " ".join(filter(None, (each.accepted, each.help, each.details)))


def _table(columns: Iterable[str], settings: list[Setting]) -> str:
    """The settings as a table without its empty columns."""
    rows = [_cells(each) for each in settings]
    kept = [name for name in columns if any(row[name] for row in rows)]
    return _lines(kept, ([row[name] for name in kept] for row in rows))


def _cells(each: Setting) -> dict[str, str]:
    flag, kind, low = each.flag, type(each.default), each.minimum
    if flag and (kind is not bool or each.parse):
        flag += f" {each.metavar}" + (" …" if kind is tuple else "")
    limit = "" if not low or each.accepted else f" At least {low}."
    return {
        "key": _code(each.name),
        "flag": _code(flag),
        "environment": _code(each.env),
        "default": _code(each.shown_default),
        "meaning": (_explain(each) + limit).replace("|", "\\|"),
    }


def _code(*words: str) -> str:
    return ", ".join(f"`{word}`" for word in words if word)


def _lines(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    head = list(columns)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


FILES: dict[str, Callable[[], str]] = {
    "config.ini": config_ini,
    "docs/settings.md": settings_page,
}


def main() -> None:
    """Write the files that have changed, and name them."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file():
        raise SystemExit(f"{root} is not a checkout; run it in one: {COMMAND}")
    for name, make in FILES.items():
        path, text = root / name, make()
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            sys.stdout.write(f"{name} is written\n")


if __name__ == "__main__":
    main()
