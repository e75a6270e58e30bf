# SPDX-License-Identifier: Apache-2.0
"""The user's side of the prompt loop on a terminal: editing, history, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.processes import REPO, Terminal, clean_environ

# Shows every line as Python writes it, until the input ends.
ECHO = (
    f"import sys; sys.path.insert(0, {str(REPO)!r}); import logging; "
    "from gptneox.config.environment import Environment; "
    "from gptneox.terminal import Interrupts, LineEditor; "
    "logging.basicConfig(level='INFO', stream=sys.stdout); "
    "editor = LineEditor(Environment.read().state_home); print('READY')\n"
    "with Interrupts() as interrupts:\n"
    "    while (line := interrupts.read_line(editor)) is not None:\n"
    "        print('GOT', len(line), ascii(line[:60]))\n"
)
UP, LEFT, PASTE, PASTE_END = "\x1b[A", "\x1b[D", "\x1b[200~", "\x1b[201~"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Start ECHO on a terminal; the home folder is an empty one."""
    started: list[Terminal] = []
    home = {"HOME": str(tmp_path), "XDG_STATE_HOME": ""}

    def run(program: str = ECHO, **environ: str) -> Terminal:
        started.append(Terminal("-c", program, cwd=tmp_path, **(home | environ)))
        started[-1].wait_for("> ")
        return started[-1]

    yield run
    for terminal in started:
        terminal.close()


def ask(terminal: Terminal, text: str | bytes) -> str:
    """What the program got, after its GOT."""
    terminal.type(text)
    terminal.wait_for("GOT ")
    return terminal.wait_for("\r\n> ")


def leave(terminal: Terminal) -> None:
    terminal.type(b"\x04")
    assert terminal.process.wait(timeout=30) == 0


@pytest.mark.parametrize("term", ["dumb", "xterm-256color"])
def test_long_lines_arrow_keys_and_pasted_lines(start: Callable[..., Terminal], term: str) -> None:
    terminal = start(TERM=term)
    assert ask(terminal, "日本 é\n") == "4 '\\u65e5\\u672c \\xe9'"
    assert ask(terminal, f"ac{LEFT}b\n") == "3 'abc'"
    assert ask(terminal, f"{UP}{UP}!\n") == "5 '\\u65e5\\u672c \\xe9!'"
    assert ask(terminal, f"{PASTE}two\nlines{PASTE_END}\n") == "9 'two\\nlines'"
    number = 20_000
    for _ in range(number // 1000):
        terminal.type("x" * 1000)
    assert ask(terminal, "\n") == f"{number} '{'x' * 60}'"
    leave(terminal)


def test_the_history_outlives_the_program(start: Callable[..., Terminal], tmp_path: Path) -> None:
    path = tmp_path / ".local/state/gptneox-ascend/history.jsonl"
    terminal = start()
    for text in ("first", "first", "  ", f"{PASTE}two\nlines{PASTE_END}", "日本"):
        ask(terminal, text + "\n")
    leave(terminal)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert kept == ["first", "two\nlines", "日本"]
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    path.chmod(0o644)
    with path.open("a") as file:
        file.write('damaged\n["no text"]\n"a\\u0000b"\n"last"\n')
    terminal = start()
    assert ask(terminal, f"{UP}\n") == "4 'last'"
    assert ask(terminal, f"{UP}{UP}\n") == "2 '\\u65e5\\u672c'"
    assert ask(terminal, f"{UP}{UP}{UP}{UP}\n") == "9 'two\\nlines'"
    leave(terminal)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [json.loads(line) for line in path.read_text().splitlines()[-2:]] == [
        "日本",
        "two\nlines",
    ]


def test_where_the_history_is(start: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = start(XDG_STATE_HOME=str(tmp_path / "state"), HOME="/nonexistent")
    ask(terminal, "one\n")
    leave(terminal)
    assert (tmp_path / "state/gptneox-ascend/history.jsonl").read_text() == '"one"\n'


def test_a_place_that_cannot_be_had_is_said_and_no_error(
    start: Callable[..., Terminal], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "null/gptneox-ascend").mkdir(parents=True)
    (tmp_path / "null/gptneox-ascend/history.jsonl").symlink_to("/dev/null")
    mode = Path("/dev/null").stat().st_mode
    for environ in (
        {"HOME": "/nonexistent"},
        {"HOME": "/nonexistent", "XDG_STATE_HOME": "relative"},
        {"XDG_STATE_HOME": str(tmp_path / "file")},
        {"XDG_STATE_HOME": str(tmp_path / "null")},
    ):
        terminal = start(**environ)
        assert ask(terminal, "one\n") == "3 'one'"
        assert ask(terminal, f"{UP}\n") == "3 'one'"
        leave(terminal)
    assert not (tmp_path / "relative").exists()
    assert not Path("/nonexistent").exists()
    assert Path("/dev/null").stat().st_mode == mode


WITHOUT_READLINE = "import sys; sys.modules['readline'] = None\n"


@pytest.mark.parametrize("output", ["terminal", "file"])
def test_a_line_that_the_terminal_cuts_is_refused(tmp_path: Path, output: str) -> None:
    """Without readline, which is also so when the output goes elsewhere."""
    out = tmp_path / "out"
    program = f"import sys; sys.stdout = open({str(out)!r}, 'w')\n" + ECHO
    if output == "terminal":
        program = f"import sys; sys.modules['readline'] = None; sys.stderr.close()\n{ECHO}"
    terminal = Terminal("-c", program, cwd=tmp_path)
    try:
        for _ in range(5):
            terminal.type("x" * 1000)
        terminal.type("\nshort\n")
        if output == "terminal":
            shown = terminal.wait_for("GOT 5 'short'")
            assert "no readline: no arrow keys" in shown
        terminal.type(b"\x04")
        assert terminal.process.wait(timeout=30) == 0
        if output == "file":
            shown = out.read_text()
            assert "GOT 5 'short'" in shown
        assert "is cut by the terminal; use --input_texts FILE" in shown
        assert "GOT 4" not in shown
    finally:
        terminal.close()


@pytest.mark.parametrize("text", ["one\ntwo\n", "\ufeffone\n\ufefftwo\n"])
def test_lines_of_a_file(tmp_path: Path, text: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ECHO],
        input=text.encode() + b"z" * 9000,
        env=clean_environ(HOME=str(tmp_path)),
        capture_output=True,
        check=True,
        timeout=60,
    )
    second = ascii(text.split("\n")[1])  # a mark is one only before the text
    found = [line.split("GOT ")[1] for line in done.stdout.decode().splitlines() if "GOT" in line]
    assert found == ["3 'one'", f"{len(text.split(chr(10))[1])} {second}", f"9000 '{'z' * 60}'"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("by_key", [True, False])
def test_no_interrupt_is_lost(start: Callable[..., Terminal], by_key: bool) -> None:
    """From the keyboard and from elsewhere, about when the wait for a line begins."""
    terminal = start()
    for i in range(300):
        if by_key and i % 3 == 0:
            terminal.type("half a line")  # goes with the interrupt
        if by_key:
            terminal.type(b"\x03")
        else:
            os.kill(terminal.process.pid, signal.SIGINT)
            if i % 2:
                time.sleep(i * 1e-6)  # a second one while the first is on its way
                os.kill(terminal.process.pid, signal.SIGINT)
        assert "/exit or Ctrl-D ends" in terminal.wait_for("\r\n> ")
    time.sleep(0.2)  # the second of the last two may have an answer of its own
    assert ask(terminal, "whole\n").endswith("5 'whole'")
    leave(terminal)
