# SPDX-License-Identifier: Apache-2.0
"""The user's side of the prompt loop: lines with an editor and a history, and Ctrl-C."""

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
HISTORY_FILE = "history.jsonl"  # one JSON string per prompt: a pasted one may have several lines
MAX_HISTORY = 1000  # prompts that the arrow keys reach
# What a terminal hands over at most when it edits the line itself (N_TTY_BUF_SIZE of Linux).
MAX_TERMINAL_LINE = 4094
# Ignored where nobody handles it, so one that comes late does nothing.
NUDGE = signal.SIGURG
_HANDLED = b"\0"  # no signal has this number


class LineTooLong(ValueError):
    """The terminal has cut a line."""


class LineEditor:
    """Lines from standard input; on a terminal with arrow keys, any length and a history."""

    def __init__(self, state_home: str) -> None:
        """Load the editor and the history.

        Args:
            state_home: the user's folder of program states; empty: below the home folder.
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
                with contextlib.suppress(ValueError):  # no text in this locale
                    readline.add_history(line)

    def read(self) -> str:
        """The next line, without its end.

        Raises:
            EOFError: there is none.
            LineTooLong: it may have been cut.
            UnicodeDecodeError: it is not UTF-8.
        """
        if self._readline:
            with _keep_typed_keys():
                line = input(PROMPT)
            self._remember(line)
            return line
        print(PROMPT, end="", flush=True)  # input() itself would ask on stderr, among the log
        line = input()
        if self._is_terminal and len(line.encode(errors="replace")) >= MAX_TERMINAL_LINE:
            raise LineTooLong(
                f"a line of {MAX_TERMINAL_LINE} bytes or more is cut by the terminal; use "
                "--input_texts FILE"
            )
        if self._is_first and not self._is_terminal:
            line = line.removeprefix("\ufeff")  # of a file that a Windows program saved
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
    """Ctrl-C takes the keys typed before it away only here, not in the terminal.

    Else a key that readline was promised may be gone when it reads, and it would wait for the
    next one and keep the interrupt until then.
    """
    before = termios.tcgetattr(sys.stdin)
    try:
        keeping = [*before[:3], before[3] | termios.NOFLSH, *before[4:]]
        termios.tcsetattr(sys.stdin, termios.TCSANOW, keeping)
        yield
    except (KeyboardInterrupt, SystemError) as error:
        termios.tcflush(sys.stdin, termios.TCIFLUSH)
        # `input` lets the handler of a second signal run while the exception of the first is on
        # its way, and Python takes what the handler calls for broken.
        if isinstance(error, SystemError) and isinstance(error.__cause__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def _history_file(state_home: str) -> Path | None:
    """Where prompts are kept between runs, in a folder that is there now; None: nowhere."""
    try:
        home = Path(state_home)
        # A relative one is invalid. Source: XDG Base Directory Specification.
        if not home.is_absolute():
            home = Path.home() / ".local" / "state"
            if not Path.home().is_dir():
                raise FileNotFoundError(f"there is no home folder {Path.home()}")
        path = home / USER_FOLDER / HISTORY_FILE
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise FileExistsError(f"{path} is no file")
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows the home folder
        logger.info("no history is kept: %s", error)
        return None
    return path


def _read_history(path: Path | None) -> list[str]:
    """The last prompts of earlier runs; lines that hold none are left out."""
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
    """Ctrl-C during the prompt loop: it ends the reading of a line, anything else only notes it.

    So a step is never torn in the middle, and no moment of the loop lets it end the program.

    Python runs a handler between two steps of Python code. One whose signal comes just before the
    wait for a key begins would run only after that wait. Every signal therefore also writes to a
    pipe, and a thread that reads it nudges the main thread out of its wait until the handler,
    which writes to the pipe, too, has run.
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
        # A signal that ends a wait without a handler in Python: that one would run while the
        # KeyboardInterrupt is on its way, which `input` does not survive.
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
        """One line from the user; None at the end of the input."""
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
