# SPDX-License-Identifier: Apache-2.0
"""Terminal input of the prompt loop: a line editor with history, and Ctrl-C handling."""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import json
import logging
import os
import select
import signal
import stat
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from gptneox.config.environment import USER_FOLDER

logger = logging.getLogger(__name__)

PROMPT = "> "
HISTORY_FILE = "history.jsonl"  # one JSON string per prompt, since a pasted one may have newlines
MAX_HISTORY = 1000  # prompts loaded from the history file
# The longest line that Linux passes on when the terminal edits it (N_TTY_BUF_SIZE).
MAX_TERMINAL_LINE = 4094
# Interrupts a system call. Ignored by default, so a late one is harmless.
NUDGE = signal.SIGURG
_HANDLED = b"\0"  # not a signal number


class LineTooLong(ValueError):
    """The terminal may have cut a line."""


class LineEditor:
    """Reads lines from standard input; on a terminal with editing keys and a history."""

    def __init__(self, state_home: str) -> None:
        """Load the editor and the history.

        Args:
            state_home: XDG_STATE_HOME; empty for ~/.local/state.
        """
        self._readline: ModuleType | None = None
        self._history: Path | None = None
        self._is_first = True
        self._is_terminal = sys.stdin.isatty()
        if self._is_terminal and sys.stdout.isatty():
            try:
                import readline
            except ImportError:
                logger.warning(
                    "this Python has no readline: no arrow keys and no history, and lines end "
                    "after %d bytes",
                    MAX_TERMINAL_LINE,
                )
                return
            self._readline = readline
            readline.set_auto_history(False)
            self._history = _history_file(state_home)
            for line in _read_history(self._history):
                with contextlib.suppress(ValueError):  # not encodable in this locale
                    readline.add_history(line)

    def read(self) -> str:
        """The next line, without the newline.

        Raises:
            EOFError: the input has ended.
            LineTooLong: the terminal may have cut the line.
            UnicodeDecodeError: the line is not UTF-8.
        """
        if self._readline:
            with _keep_typed_keys():
                line = input(PROMPT)
            self._remember(line)
            return line
        print(PROMPT, end="", flush=True)  # input(PROMPT) would write to stderr, between log lines
        line = input()
        if self._is_terminal and len(line.encode(errors="replace")) >= MAX_TERMINAL_LINE:
            raise LineTooLong(
                f"a line of {MAX_TERMINAL_LINE} bytes or more is cut by the terminal; use "
                "--input_texts FILE"
            )
        if self._is_first and not self._is_terminal:
            line = line.removeprefix("\ufeff")  # byte order mark of a file saved on Windows
        self._is_first = False
        return line

    def _remember(self, line: str) -> None:
        assert self._readline
        last = self._readline.get_current_history_length()
        if not line.strip() or (last and self._readline.get_history_item(last) == line):
            return
        self._readline.add_history(line)
        if self._history is None:
            return
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        try:
            file = os.open(self._history, flags, 0o600)
            try:
                if stat.S_IMODE(os.fstat(file).st_mode) != 0o600:
                    os.fchmod(file, 0o600)
                os.write(file, (json.dumps(line) + "\n").encode())
            finally:
                os.close(file)
        except OSError as error:
            logger.info("the history is not kept any more: %s", error)
            self._history = None


@contextlib.contextmanager
def _keep_typed_keys() -> Iterator[None]:
    """Discard typed keys on Ctrl-C here, instead of letting the terminal do it.

    Otherwise the terminal may discard a key after select() has announced it to readline, which
    then blocks in read() and delays the interrupt until the next key.
    """
    attributes = termios.tcgetattr(sys.stdin)
    try:
        no_flush = [*attributes[:3], attributes[3] | termios.NOFLSH, *attributes[4:]]
        termios.tcsetattr(sys.stdin, termios.TCSANOW, no_flush)
        yield
    except (KeyboardInterrupt, SystemError) as error:
        termios.tcflush(sys.stdin, termios.TCIFLUSH)
        # If a second signal comes while the exception of the first propagates through `input`,
        # Python raises SystemError.
        if isinstance(error, SystemError) and isinstance(error.__cause__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, attributes)


def _history_file(state_home: str) -> Path | None:
    """The path of the history file; creates its folder. None if there can be no history."""
    try:
        home = Path(state_home)
        # Relative paths are invalid. Source: XDG Base Directory Specification.
        if not home.is_absolute():
            home = Path.home() / ".local" / "state"
            if not Path.home().is_dir():
                raise FileNotFoundError(f"there is no home folder {Path.home()}")
        path = home / USER_FOLDER / HISTORY_FILE
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise FileExistsError(f"{path} is not a file")
    except (OSError, RuntimeError) as error:  # RuntimeError: the home folder is unknown
        logger.info("no history is kept: %s", error)
        return None
    return path


def _read_history(path: Path | None) -> list[str]:
    """The last prompts of earlier runs; malformed lines are skipped."""
    if path is None or not path.exists():
        return []
    prompts = []
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = collections.deque(file, MAX_HISTORY)
    except OSError as error:
        logger.info("the history cannot be read: %s", error)
        return []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, str):
            prompts.append(value)
    return prompts


class Interrupts:
    """Ctrl-C handling of the prompt loop.

    While a line is read, Ctrl-C raises KeyboardInterrupt; otherwise it only sets `pending`, so
    that it never interrupts an engine step or ends the program.

    Python runs signal handlers between bytecodes. If a signal arrives just before the main thread
    blocks in a read, its handler would run only after that read. Therefore every signal also
    writes to a pipe (`signal.set_wakeup_fd`), and a thread that reads the pipe interrupts the main
    thread with NUDGE until the handler has run, which the handler reports through the same pipe.
    """

    def __init__(self) -> None:
        self.pending = False
        self._reading = False
        self._previous_handler: Any = None
        self._wake_read_fd = self._wake_write_fd = -1  # the two ends of the pipe
        self._previous_wakeup_fd = -1
        self._null_file: Any = None
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Interrupts:
        self._wake_read_fd, self._wake_write_fd = os.pipe()
        os.set_blocking(self._wake_write_fd, False)
        self._null_file = Path(os.devnull).open("w", encoding="ascii")
        # faulthandler handles NUDGE in C. A Python handler would run while KeyboardInterrupt
        # propagates, which breaks `input`.
        faulthandler.register(NUDGE, self._null_file, all_threads=False)
        self._previous_handler = signal.signal(signal.SIGINT, self._handle)
        self._previous_wakeup_fd = signal.set_wakeup_fd(
            self._wake_write_fd, warn_on_full_buffer=False
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._previous_wakeup_fd)
        signal.signal(signal.SIGINT, self._previous_handler)
        os.close(self._wake_write_fd)
        self._thread.join()
        os.close(self._wake_read_fd)
        faulthandler.unregister(NUDGE)
        self._null_file.close()

    def _handle(self, *_: object) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write_fd, _HANDLED)
        if self._reading:
            self._reading = False
            raise KeyboardInterrupt
        self.pending = True

    def _watch(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        is_pending = False
        while True:
            if select.select([self._wake_read_fd], [], [], 0.02 if is_pending else None)[0]:
                if not (signals := os.read(self._wake_read_fd, 4096)):
                    return
                is_pending = signals.rfind(signal.SIGINT) > signals.rfind(_HANDLED)
            elif self._reading:
                signal.pthread_kill(main, NUDGE)

    def read_line(self, editor: LineEditor) -> str | None:
        """One line from the user; None at the end of input."""
        while True:
            try:
                self._reading = True
                if self.pending:
                    raise KeyboardInterrupt
                return editor.read()
            except UnicodeDecodeError as error:
                self._reading = False
                print(f"error: the line is not UTF-8: {error.reason} at byte {error.start}")
            except LineTooLong as error:
                self._reading = False
                print(f"error: {error}")
            except EOFError:
                self._reading = False
                print()
                return None
            except KeyboardInterrupt:
                self._reading = self.pending = False
                print("\n(/exit or Ctrl-D ends)")
            finally:
                self._reading = False
