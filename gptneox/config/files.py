# SPDX-License-Identifier: Apache-2.0
"""Read JSON and text files that users' programs wrote."""

from __future__ import annotations

import codecs
import io
import json
from pathlib import Path
from typing import Any

from gptneox.config.errors import FileError, NoSuchPath
from gptneox.file_faults import explain, explain_place


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object; errors name the file.

    A byte order mark, which editors on Windows put at the start, is skipped.

    Raises:
        FileNotFoundError: the file does not exist; if its directory does not, NoSuchPath.
        OSError: the path exists, but is not a readable file.
        FileError: the content is not a JSON object.
    """
    if reason := explain_place(path):
        raise OSError(f"{path} {reason}")
    if not path.is_file():
        error = FileNotFoundError if path.parent.is_dir() else NoSuchPath
        raise error(
            f"no {path.name} in {path.parent}: the path {_without_json(path)}; give the directory "
            "of a GPT-NeoX checkpoint"
        )
    try:
        data = path.read_bytes()
        raw = json.loads(data.decode(json.detect_encoding(data)))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, too deep, too long numbers
        reason = explain(path) or f"is not valid JSON: {error}; download it again"
        raise FileError(f"{path} {reason}") from error
    if not isinstance(raw, dict):
        raise FileError(f"{path} holds {type(raw).__name__}; a JSON object is expected")
    return raw


def _without_json(path: Path) -> str:
    """Why the folder of this path has no such file."""
    if path.parent.is_file():
        return "exists, but is not a directory"
    if not path.parent.exists():
        return "does not exist"
    if snapshots := sorted(path.parent.glob(f"snapshots/*/{path.name}")):
        return f"is a folder of the hub's cache, which has it in {snapshots[-1].parent}"
    return "holds none"


# Byte order marks. UTF-32 comes first: its mark begins with that of UTF-16.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_text(path: Path, *, newline: str | None = None) -> str:
    """Read a UTF-8 text file, without its byte order mark if it has one.

    Args:
        path: a file or a pipe.
        newline: as for `open`: None turns every line end into a line feed, "" keeps them.

    Raises:
        FileError: the text is not UTF-8; the message names its encoding where that is clear.
        NoSuchPath: there is no such file.
        OSError: the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise NoSuchPath(f"{path} does not exist") from error
    return decode_text(data, str(path), newline=newline)


def decode_text(data: bytes, origin: str, *, newline: str | None = None) -> str:
    """`read_text` for bytes that are already read; errors name `origin`."""
    name = next((n for mark, n in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), "")
    head = data[:4096]
    if len(data) % 2 == 0 and max(head[::2].count(0), head[1::2].count(0)) > len(head) / 5:
        name = name or "UTF-16"  # in Latin text every second byte is zero
    if name:
        raise FileError(
            f"{origin} is {name}; UTF-8 is expected: save it as UTF-8, or convert it with "
            f"iconv -f {name} -t UTF-8"
        )
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(
            f"{origin} is not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8, or "
            "convert it with iconv -f ENCODING -t UTF-8 (such as LATIN1, GB18030 or SHIFT_JIS)"
        ) from error
    return io.StringIO(text, newline=newline).getvalue()
