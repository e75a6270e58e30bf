# SPDX-License-Identifier: Apache-2.0
"""What is said of files that are not what they should be, for whoever downloaded them badly."""

from __future__ import annotations

import gzip
import io
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.processes import REPO

from gptneox.file_faults import explain, explain_first, explain_place, is_there

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 138123456\n"


def pickled() -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.ones(1)}, file)
    return file.getvalue()


CONTENTS = {
    "lfs": (LFS, "git-lfs pointer"),
    "lfs, Windows": (b"\xef\xbb\xbf" + LFS.replace(b"\n", b"\r\n"), "git-lfs pointer"),
    "annex": (b"../.git/annex/objects/aa/bb/SHA256E-s1--x/SHA256E-s1--x", "git-annex pointer"),
    "html": (b"\n <!doctype HTML>\n<html><body>404</body></html>", "web page"),
    "html, a comment first": (b"<!-- gateway --><html></html>", "web page"),
    "html, no doctype": (b"<HTML>Sign in</HTML>", "web page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "answer in XML"),
    "404": (b"Entry not found", r"server's answer \(Entry not found\)"),
    "401": (b"Invalid username or password.", "server's answer"),
    "gated": (b"Access to model x/y is restricted.", "server's answer"),
    "json": (b'{"error": "Repository not found"}', "server's answer"),
    "nothing": (b"", "is empty"),
    "zeros": (bytes(3 << 20), "zeros only"),
    "gzip": (gzip.compress(b"{}"), "gzip archive"),
    "gguf": (b"GGUF\3\0\0\0", "GGUF"),
    "hdf5": (b"\x89HDF\r\n\x1a\n", "HDF5"),
    "pytorch": (pickled(), "PyTorch file, not safetensors"),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_what_stands_in_a_file_instead(tmp_path: Path, kind: str) -> None:
    content, expected = CONTENTS[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert re.search(expected, explain(path)), explain(path)
    assert explain_place(path) == ""


def test_a_safetensors_file_with_the_other_ending(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"\2\0\0\0\0\0\0\0{}")
    assert "is a safetensors file" in explain(path)


def test_of_sound_files_nothing_is_said() -> None:
    files = [p for p in (REPO / "weights").rglob("*") if p.is_file()]
    assert len(files) > 3
    assert explain_first([*files, REPO / "absent"]) == ""


def test_the_first_bad_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "good").write_text("{}")
    (tmp_path / "bad").write_bytes(LFS)
    paths = [tmp_path / name for name in ("absent", "good", "bad")]
    assert explain_first(paths).startswith(f"{tmp_path / 'bad'} is a git-lfs pointer")


def test_places_that_hold_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    assert not is_there(path)
    assert explain(path) == "cannot be read: No such file or directory"
    assert explain_place(path) == ""
    path.symlink_to("gone")
    assert is_there(path)
    assert explain(path) == "is a link to gone, which does not exist; download the file again"
    path.unlink()
    path.symlink_to("x")
    assert "is a link to x that cannot be followed (Too many levels" in explain(path)
    path.unlink()
    path.mkdir()
    assert explain(path).startswith("is a folder, not a file")
    path.rmdir()
    os.mkfifo(path)
    assert explain(path).startswith("is a pipe, not a file")  # and nothing waits for a writer
    path.unlink()
    path.symlink_to("/dev/null")
    assert explain(path).startswith("is a device, not a file")
    path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # a socket's path is short
        server.bind("x")
        assert explain(path).startswith("is a socket, not a file")


@pytest.fixture
def of_another_user() -> Iterator[Path]:
    """A folder that this process, when it is root's, goes through as nobody."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_file_that_may_not_be_read(of_another_user: Path) -> None:
    path = of_another_user / "model.safetensors"
    path.write_bytes(b"x")
    path.chmod(0)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        assert "may not be read by this user" in explain(path)
    finally:
        if is_root:
            os.seteuid(0)
