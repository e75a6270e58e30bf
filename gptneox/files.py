# SPDX-License-Identifier: Apache-2.0
"""Helpers for writing files: safe replacement of results, locks, file names, standard streams."""

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

# Marks a folder that is still being written; removed at the end.
UNFINISHED = ".gptneox-unfinished"
# In it, while files are moved to their place: the names of the old ones and of the new ones.
FILES_NAME = "files.json"
# The folder or mount does not allow replacing a file; write into the file itself instead.
_NOT_REPLACEABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV)


# -- results -------------------------------------------------------------------------------------


def check_writable(path: Path) -> None:
    """Check that `write_file` will succeed, without changing anything.

    Raises:
        OSError: it will fail; the message says why.
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
    """Write a result. A regular file is replaced atomically; missing folders are created.

    Links are followed. Devices, pipes and files that are already open here (such as /dev/stdout)
    are written to, not replaced.

    Raises:
        OSError: `path` is a folder, a disk or a socket, or writing failed.
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
    """Whether `path` is, or will be, a regular file that is not already open here."""
    _, status = _stat_target(path)
    return status is None or (stat.S_ISREG(status.st_mode) and _open_descriptor(status) is None)


def _stat_target(path: Path) -> tuple[Path, os.stat_result | None]:
    """The real path of `path` and its status; None if it does not exist."""
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
    """Create and remove a file in `folder`, or in its nearest existing parent."""
    while not folder.exists():
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder):
        pass


def _open_descriptor(status: os.stat_result) -> int | None:
    """A descriptor of this process that is open for writing to the file; None if there is none."""
    for name in os.listdir("/dev/fd"):  # noqa: PTH208 - numbers, not paths
        try:
            is_same = os.path.samestat(os.fstat(int(name)), status)
            mode = fcntl.fcntl(int(name), fcntl.F_GETFL) & os.O_ACCMODE
        except OSError:  # the descriptor of listdir itself, closed by now
            continue
        if is_same and mode != os.O_RDONLY:
            return int(name)
    return None


def _replace(target: Path, status: os.stat_result | None, data: bytes) -> None:
    """Replace `target` by a temporary file in the same folder, keeping its mode."""
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
    """`text` for a file name: runs of anything but letters, digits, `.`, `_`, `-` become `_`."""
    return re.sub(r"[^\w.-]+", "_", text)


# -- locks ---------------------------------------------------------------------------------------


def lock(file: IO[Any], *, wait: bool = False) -> bool:
    """Lock an open file until it is closed; False if another process holds the lock.

    On file systems without locks this warns once and returns True.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # EACCES on network file systems
            return False
        _warn_no_locks(os.path.dirname(os.path.abspath(file.name)), str(error.strerror))  # noqa: PTH100, PTH120
    return True


@functools.cache
def _warn_no_locks(folder: str, reason: str) -> None:
    logger.warning(
        "%s has no file locks (%s): start nothing else that writes there meanwhile", folder, reason
    )


# -- folders of cuts -----------------------------------------------------------------------------


def is_unused(folder: Path) -> bool:
    """Whether `folder` is absent, empty, or holds only the mark of an interrupted cut."""
    if not folder.is_dir():
        return not folder.exists()
    return all(path.name == UNFINISHED for path in folder.iterdir())


# -- standard streams ----------------------------------------------------------------------------


def prepare_streams() -> None:
    """Escape characters that the terminal cannot show; replace closed streams by /dev/null.

    Raises:
        OSError: standard output is closed.
    """
    had_output = sys.stdout is not None
    while True:  # occupy descriptors 0 to 2, so that no file opened later gets one of them
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
