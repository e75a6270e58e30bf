# SPDX-License-Identifier: Apache-2.0
"""What a word of --input_texts stands for: a text, a file, a pipe, standard input."""

from __future__ import annotations

import codecs
import io
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ranks
from support.checkpoints import write_chain_checkpoint
from support.processes import REPO, clean_environ
from support.ranks import Teams

from gptneox.cli import read_settings
from gptneox.config.errors import ConfigError, FileError
from gptneox.parallel import TensorParallelGroup
from gptneox.prompts import find_file, read_texts

TEXT = "The capital of France is\nand of 日本: "


def texts_of(*words: str) -> list[str]:
    settings = read_settings(["--input_texts", *words], Path("none.ini"))
    return read_texts(settings, TensorParallelGroup())


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pipe() -> Iterator[str]:
    """A pipe that holds TEXT and ends, under the name that a shell gives to <(command)."""
    reader, writer = os.pipe()
    os.write(writer, TEXT.encode())
    os.close(writer)
    yield f"/dev/fd/{reader}"
    os.close(reader)


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_files_with_and_without_a_byte_order_mark(tmp_path: Path, mark: bytes) -> None:
    (tmp_path / "q.txt").write_bytes(mark + TEXT.replace("\n", "\r\n").encode())
    assert texts_of("q.txt", "q.txt x") == [TEXT, "q.txt x"]


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("name", ["-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"])
def test_standard_input(name: str, mark: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(mark + TEXT.encode())))
    assert texts_of("a", name) == ["a", TEXT]


def test_standard_input_that_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(ConfigError, match="prompt 0 is empty"):
        texts_of("-")
    with pytest.raises(ConfigError, match="twice"):
        texts_of("-", "a", "/dev/stdin")


def test_pipes(tmp_path: Path, pipe: str) -> None:
    os.mkfifo(tmp_path / "named")
    threading.Thread(target=lambda: (tmp_path / "named").write_text(TEXT, encoding="utf-8")).start()
    assert texts_of(pipe, "a", "named") == [TEXT, "a", TEXT]


def test_a_descriptor_that_is_not_open() -> None:
    with pytest.raises(ConfigError, match="prompt 0, /dev/fd/987, is not open"):
        texts_of("/dev/fd/987")


def test_a_terminal(tmp_path: Path) -> None:
    main, terminal = os.openpty()
    os.write(main, b"typed\n\x04")
    assert texts_of(os.ttyname(terminal)) == ["typed\n"]
    os.close(main)
    os.close(terminal)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for word in ("docs", ".", "docs/", str(tmp_path)):
        with pytest.raises(ConfigError, match=r"prompt 1, .* is a folder; .*--input_texts -"):
            texts_of("a", word)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        with pytest.raises(ConfigError, match="not a file, pipe or terminal"):
            texts_of("socket")


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (TEXT.encode("utf-16"), "iconv -f UTF-16"),
        (codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), "iconv -f UTF-16"),
        (b"Once upon a time".decode().encode("utf-16-le"), "iconv -f UTF-16"),
        (TEXT.encode("utf-32"), "iconv -f UTF-32"),
        ("日本".encode("gb18030"), "not UTF-8.*GB18030"),
        ("café".encode("latin-1"), "not UTF-8.*at byte 3.*LATIN1"),
        (b"", "empty"),
        (codecs.BOM_UTF8, "empty"),
    ],
)
def test_other_encodings_are_named(tmp_path: Path, data: bytes, named: str) -> None:
    (tmp_path / "q.txt").write_bytes(data)
    with pytest.raises((ConfigError, FileError), match=f"prompt 0.*{named}"):
        texts_of("q.txt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "q.txt").touch(mode=0)
    with pytest.raises(ConfigError, match=r"prompt 0 cannot be read from q\.txt: Permission"):
        texts_of("q.txt")


@pytest.mark.parametrize(
    "word", ["promts.txt", "/data/prompts/q1", r"C:\q.txt", "~/q.txt", "a.JSON", "and/or"]
)
def test_a_missing_file_is_answered_and_said(word: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "gptneox"):
        assert texts_of(word) == [word]
    (said,) = caplog.messages
    assert repr(word) in said
    assert "looks like a file" in said
    assert ("~" in said) == word.startswith("~")
    assert "\n" not in said


@pytest.mark.parametrize(
    "text", ["Hello", "See a/b.txt for this.", "3.14", "e.g.", "~", "...", "Is it 1/2 ?", "x\n/y"]
)
def test_a_text_is_answered_without_a_word(text: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "gptneox"):
        assert texts_of(text) == [text]
    assert caplog.messages == []


def test_texts_given_twice_are_all_kept() -> None:
    settings = read_settings(
        [
            *("--input_texts", "a", "--input_texts", "b", "c", "--stop", "x", "--stop", "y"),
            *("--input_ids", "1", "--input_ids", "2,3"),
        ],
        Path("none.ini"),
    )
    assert settings.args.input_texts == ["a", "b", "c"]
    assert settings.args.input_ids == [[1], [2, 3]]
    assert settings.sampling.stop == ("x", "y")


# -- several ranks -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teams() -> Iterator[Teams]:
    with ranks.open_teams() as opened:
        yield opened


def read_on_a_rank(group: TensorParallelGroup, text: str, folder: Path) -> list[str]:
    """Standard input and the file are there on rank 0 only."""
    os.chdir(folder / str(group.rank))
    found = text.encode() if group.rank == 0 else b"another text"
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(found))
    try:
        settings = read_settings(["--input_texts", "-", "q.txt"], Path("none.ini"))
        return read_texts(settings, group)
    finally:
        sys.stdin = before


def test_one_rank_reads_for_all(teams: Teams, tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    (tmp_path / "0/q.txt").write_text("from the file", encoding="utf-8")
    found = teams(2).run(read_on_a_rank, TEXT, tmp_path)
    assert found == [[TEXT, "from the file"]] * 2


def test_under_torchrun_the_shells_descriptors_are_its() -> None:
    """A rank is given none of them; the same number may be something else's there."""
    reader, writer = os.pipe()
    try:
        code = (
            f"import os; from gptneox.prompts import find_file; os.close({reader}); "
            f"os.dup2(1, {reader}); path = find_file('/dev/fd/{reader}', '', 2); "
            "print(os.read(os.open(path, os.O_RDONLY), 100))"
        )
        os.write(writer, b"theirs")
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=REPO,
            pass_fds=[reader],
            capture_output=True,
            check=True,
            timeout=60,
        )
    finally:
        os.close(reader)
        os.close(writer)
    assert done.stdout == b"b'theirs'\n"
    with pytest.raises(ConfigError, match="is not open"):
        find_file("/dev/fd/987", "prompt 0", 2)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", ["1", "2"])
def test_as_users_type_it(world_size: str, tmp_path: Path) -> None:
    """A process substitution and standard input through the launcher."""
    checkpoint = write_chain_checkpoint(tmp_path / "checkpoint", "123456789", "abcd")
    command = 'printf ab | bash "$0" "$1" --device cpu --input_texts <(printf 12) - "3"'
    done = subprocess.run(
        ["bash", "-c", command, str(REPO / "run_pa.sh"), str(checkpoint)],
        env=clean_environ(PYTHON=sys.executable, TP_WORLD_SIZE=world_size),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith("Answer[")]
    assert answers == ["Answer[0]: 3456789", "Answer[1]: cd", "Answer[2]: 456789"]
