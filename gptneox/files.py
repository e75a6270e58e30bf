# SPDX-License-Identifier: Apache-2.0
"""What every writer of files shares: results that destroy nothing, locks, names, output streams."""

from __future__ import annotations

import errno
import fcntl
import functools
import logging
import os
import re
import secrets
import stat
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)

# In a folder that a cut or a joining fills; gone when it is finished.
UNFINISHED = ".gptneox-unfinished"
# A folder or a mount that lets no file be put in the place of another: the file itself is written.
_NOT_REPLACEABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV)


# -- results -------------------------------------------------------------------------------------


def check_writable(path: Path) -> None:
    """Find out before the work whether `write_file` will succeed; nothing is left behind.

    Raises:
        OSError: it will not; the message says why.
    """
    try:
        target, status = _stat_target(path)
        if status is None:
            _try_folder(target.parent)
        elif not os.access(target if stat.S_ISREG(status.st_mode) else path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(
            f"the result file {path} cannot be written: {reason}; name another one"
        ) from error


def write_file(path: Path, content: str | bytes) -> None:
    """Write a result. A reader of a regular file sees the old content or the new one, no mixture.

    A link stays, its target is written. A device or a pipe is written to; so is what is open here
    already, as /dev/stdout is. Folders that are missing are made.

    Raises:
        OSError: a folder, a disk or a socket has that name, or the writing failed.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    target, status = _stat_target(path)
    if status is None:
        target.parent.mkdir(parents=True, exist_ok=True)
        _replace(target, None, data)
    elif (descriptor := _open_descriptor(status)) is not None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(data)
    elif stat.S_ISREG(status.st_mode):
        _replace(target, status, data)
    else:
        with path.open("wb") as file:
            file.write(data)


def is_regular(path: Path) -> bool:
    """Whether it is a file of its own, or will be one, so that others can lie beside it."""
    _, status = _stat_target(path)
    return status is None or (stat.S_ISREG(status.st_mode) and _open_descriptor(status) is None)


def _stat_target(path: Path) -> tuple[Path, os.stat_result | None]:
    """Where `path` leads, and what is there; None: nothing yet."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return Path(os.path.realpath(path)), None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(f"{path} is a folder, a file is expected")
    if stat.S_ISBLK(status.st_mode) or stat.S_ISSOCK(status.st_mode):
        raise OSError(f"{path} is a disk or a socket, a file is expected")
    return Path(os.path.realpath(path)), status


def _try_folder(folder: Path) -> None:
    """Make a file in `folder`, or where `folder` would be made, and remove it."""
    while not folder.exists():
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder):
        pass


def _open_descriptor(status: os.stat_result) -> int | None:
    """A descriptor of this process that writes to the file: to replace it would lose the rest."""
    for name in os.listdir("/dev/fd"):  # noqa: PTH208 - numbers, not paths
        try:
            is_same = os.path.samestat(os.fstat(int(name)), status)
            mode = fcntl.fcntl(int(name), fcntl.F_GETFL) & os.O_ACCMODE
        except OSError:  # the descriptor of the listing itself
            continue
        if is_same and mode != os.O_RDONLY:
            return int(name)
    return None


def _replace(target: Path, status: os.stat_result | None, data: bytes) -> None:
    """Through a temporary sibling with the mode of what it replaces."""
    temporary = target.with_name(f".gptneox-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
        if status:
            temporary.chmod(stat.S_IMODE(status.st_mode))
        temporary.replace(target)
    except OSError as error:
        if status is None or error.errno not in _NOT_REPLACEABLE:
            raise
        with target.open("r+b") as file:
            file.write(data)
            file.truncate()
    finally:
        temporary.unlink(missing_ok=True)


def safe_name(text: str) -> str:
    """Part of a file name: letters, digits, `.`, `_` and `-`; a run of others becomes one `_`."""
    return re.sub(r"[^\w.-]+", "_", text)


# -- locks ---------------------------------------------------------------------------------------


def lock(file: IO[Any], *, wait: bool = False) -> bool:
    """Lock an open file until it is closed; False where another process holds the lock.

    Some network file systems have no locks. There the work goes on, which is said once.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # the second on network file systems
            return False
        _say_no_locks(os.path.dirname(os.path.abspath(file.name)), str(error.strerror))  # noqa: PTH100, PTH120
    return True


@functools.cache
def _say_no_locks(folder: str, reason: str) -> None:
    logger.warning(
        "%s has no file locks (%s): start nothing else that writes there meanwhile", folder, reason
    )


# -- folders of cuts -----------------------------------------------------------------------------


def is_unused(folder: Path) -> bool:
    """Whether there is nothing: no folder, an empty one, or only what an interrupted cut left."""
    if not folder.is_dir():
        return not folder.exists()
    return all(path.name == UNFINISHED for path in folder.iterdir())


# -- standard streams ----------------------------------------------------------------------------


def prepare_streams() -> None:
    """Characters that the terminal cannot show are escaped; a closed stream takes no other's place.

    Raises:
        OSError: standard output is closed.
    """
    had_output = sys.stdout is not None
    while True:  # a file opened later must not get the number of a closed stream
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            break
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if not had_output:
        raise OSError("standard output is closed; send it to a file or to /dev/null")
