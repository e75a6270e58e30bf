# SPDX-License-Identifier: Apache-2.0
"""Result files that destroy nothing, locks, names of files, and the standard streams."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.processes import REPO

from gptneox import files
from gptneox.files import check_writable, is_regular, lock, safe_name, write_file


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# -- results -------------------------------------------------------------------------------------


def test_a_result_is_whole_or_not_there(tmp_path: Path) -> None:
    """Readers see the old content or the new one, never a part."""
    path, stop, seen = tmp_path / "out.jsonl", threading.Event(), set()
    path.write_text("0" * 300_000)

    def read() -> None:
        while not stop.is_set():
            text = path.read_text()
            seen.add((len(text), text[:1] == text[-1:]))

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(40):
        write_file(path, str(i % 10) * 300_000)
    stop.set()
    reader.join()
    assert seen == {(300_000, True)}
    with pytest.raises(UnicodeEncodeError):
        write_file(path, "\ud800")
    assert path.read_text()[:1] == "9"
    assert names(tmp_path) == ["out.jsonl"]


@pytest.mark.parametrize("name", ["new", "deep/er/new", "n" * 255])
def test_a_new_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    check_writable(path)
    assert names(tmp_path) == [], "the check leaves nothing"
    write_file(path, "日本\n")
    assert path.read_bytes() == "日本\n".encode()
    assert names(path.parent) == [path.name]
    other = tmp_path / "other"
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


@pytest.mark.parametrize("there_is", ["a target", "no target yet"])
def test_a_link_is_followed(there_is: str, tmp_path: Path) -> None:
    """Also one that leads to another link; the mode of the target is kept."""
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "target", tmp_path / "link"
    (tmp_path / "between").symlink_to("disk/target")
    link.symlink_to("between")
    if there_is == "a target":
        target.write_text("old")
        target.chmod(0o640)
    check_writable(link)
    write_file(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "between").is_symlink()
    assert target.read_text() == "new"
    assert not target.is_symlink()
    assert names(tmp_path / "disk") == ["target"]
    if there_is == "a target":
        assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    path, seen = tmp_path / "pipe", []
    os.mkfifo(path)
    check_writable(path)
    reader = threading.Thread(target=lambda: seen.append(path.read_text()))
    reader.start()
    write_file(path, "answers")
    reader.join()
    assert seen == ["answers"]
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert not is_regular(path)


def test_a_device_is_written_to() -> None:
    """A terminal, which nobody can replace by accident here."""
    keyboard, screen = os.openpty()
    path = Path(os.ttyname(screen))
    os.close(screen)
    before = path.stat()
    check_writable(path)
    write_file(path, "answers")
    assert os.read(keyboard, 100) == b"answers"
    os.close(keyboard)
    assert stat.S_ISCHR(before.st_mode)


def test_the_null_device_stays_one(tmp_path: Path) -> None:
    path = tmp_path / "null"
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, Path("/dev/null").stat().st_rdev)
        path.open("w").close()
    except OSError:
        pytest.skip("devices cannot be made here")
    check_writable(path)
    write_file(path, "answers")
    assert stat.S_ISCHR(path.stat().st_mode)
    assert names(tmp_path) == ["null"]


@pytest.mark.parametrize("way", ["descriptor", "link to the descriptor", "the file itself"])
def test_what_is_open_already_goes_on(way: str, tmp_path: Path) -> None:
    """As /dev/stdout with standard output in a file: nothing before or after is lost."""
    path = tmp_path / "all"
    with path.open("w") as file:
        file.write("before\n")
        file.flush()
        result = Path(f"/dev/fd/{file.fileno()}")
        if way == "link to the descriptor":
            (tmp_path / "stdout").symlink_to(result)
            result = tmp_path / "stdout"
        result = path if way == "the file itself" else result
        check_writable(result)
        assert not is_regular(result)
        write_file(result, "answers\n")
        file.write("after\n")
    assert path.read_text() == "before\nanswers\nafter\n"


def test_a_file_that_cannot_be_replaced_is_written(tmp_path: Path, monkeypatch) -> None:
    """Such as one that is mounted into a container: rename fails, writing does not."""
    path = tmp_path / "mounted"
    path.write_text("a longer old text")

    def busy(*_: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(Path, "replace", busy)
    write_file(path, "new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["mounted"]
    with pytest.raises(OSError, match="busy"):
        write_file(tmp_path / "not there", "new")


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


UNWRITABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (Path.mkdir, "folder"),
    "link to a folder": (lambda path: path.symlink_to(path.parent), "folder"),
    "socket": (make_socket, "socket"),
    "below a file": (lambda path: path.parent.joinpath("file").touch(), "Not a directory"),
    "too long": (lambda path: None, "too long"),
    "in proc": (lambda path: None, "No such file"),
    "link in a circle": (lambda path: path.symlink_to(path.name), "symbolic links"),
}


@pytest.mark.parametrize("what", UNWRITABLE)
def test_what_cannot_be_written_is_refused_before(what: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    make, named = UNWRITABLE[what]
    paths = {"below a file": "file/out", "too long": "n" * 256, "in proc": "/proc/out.csv"}
    path = Path(paths.get(what, "out"))
    make(Path("out") if what == "socket" else tmp_path / path.name)
    before = names(tmp_path)
    with pytest.raises(OSError, match=rf"result file {path} .*{named}.*; name another one"):
        check_writable(path)
    with pytest.raises(OSError, match=r"."):
        write_file(path, "x")
    assert names(tmp_path) == before


def test_no_disk_is_written_over() -> None:
    disks = [path for path in Path("/dev").glob("*") if path.is_block_device()]
    if not disks:
        pytest.skip("no disk to be seen here")
    with pytest.raises(OSError, match="is a disk"):
        check_writable(disks[0])  # never write_file: if it were wrong, it would do it


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("EleutherAI/pythia-70m_1.csv", "EleutherAI_pythia-70m_1.csv"),
        ("Intel(R) Xeon(R) @ 2.0GHz", "Intel_R_Xeon_R_2.0GHz"),
        ('a\\b:c*d?"e<f>g|h\n\0', "a_b_c_d_e_f_g_h_"),
        ("模型 é", "模型_é"),
    ],
)
def test_names_are_safe(text: str, name: str) -> None:
    assert safe_name(text) == name


# -- locks ---------------------------------------------------------------------------------------


def test_a_lock_keeps_others_out(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as mine, (tmp_path / "lock").open("w") as theirs:
        assert lock(mine)
        assert not lock(theirs)
        mine.close()
        assert lock(theirs, wait=True)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL])
def test_no_locks_is_said_once(code: int, tmp_path: Path, monkeypatch, caplog) -> None:
    """Not "another process": it would be waited for in vain."""

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    files._warn_no_locks.cache_clear()
    with caplog.at_level(logging.WARNING), (tmp_path / "lock").open("w") as file:
        assert lock(file)
        assert lock(file, wait=True)
    assert len(caplog.records) == 1
    assert str(tmp_path) in caplog.text
    assert os.strerror(code) in caplog.text


# -- standard streams ----------------------------------------------------------------------------


def run_with_streams(shell: str, code: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    """Python run by a shell that can close streams; prepare_streams comes first."""
    code = f"import os, sys\nfrom gptneox.files import prepare_streams\n{code}"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPO), "CODE": code, **env}
    command = ["bash", "-c", f'"$0" -c "$CODE" {shell}', sys.executable]
    return subprocess.run(command, env=environment, capture_output=True, check=False)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gbk"])
def test_what_a_terminal_cannot_show_is_escaped(encoding: str) -> None:
    code = "prepare_streams()\nprint('5 tokens，(ü 🙂)')"
    done = run_with_streams("", code, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    shown = done.stdout.decode(encoding).strip()
    plain = {"ascii": r"5 tokens\uff0c(\xfc", "latin-1": r"5 tokens\uff0c(ü", "gbk": "5 tokens，(ü"}
    assert shown == plain[encoding] + r" \U0001f642)"


def test_a_closed_output_is_said() -> None:
    done = run_with_streams(">&-", "prepare_streams()")
    assert b"OSError: standard output is closed; send it to a file or to /dev/null" in done.stderr


def test_closed_streams_are_no_place_for_files(tmp_path: Path) -> None:
    """The next file to be opened would get the number 2, and with it every message."""
    code = (
        "prepare_streams()\n"
        "file = open(os.environ['RESULT'], 'w')\n"
        "assert file.fileno() > 2\n"
        "os.write(2, b'message')\n"
        "print('lost', file=sys.stderr)\n"
        "assert sys.stdin.read() == ''\n"
        "print(sys.stderr.isatty(), sys.stdin.isatty())"
    )
    done = run_with_streams("<&- 2>&-", code, RESULT=str(tmp_path / "result"))
    assert (done.returncode, done.stdout) == (0, b"False False\n")
