# SPDX-License-Identifier: Apache-2.0
"""A hub on this machine: what Hugging Face's client and ModelScope's ask, with faults."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

COMMIT = "c" * 40


@dataclass
class Hub:
    """One model, and what was asked for."""

    model_id: str
    files: dict[str, bytes]
    token: str = ""  # needed, if any
    is_gated: bool = False
    cut_after: int = 0  # the first download of a weight file ends after so many bytes
    damaged: str = ""  # this file arrives with one byte changed
    announced_size: int = 0  # of each weight file, instead of its own
    url: str = ""
    requests: list[str] = field(default_factory=list)
    downloads: list[tuple[str, str]] = field(default_factory=list)  # file, range

    def etag(self, name: str) -> str:
        content = self.files[name]
        if name.endswith((".safetensors", ".bin")):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub  # of the subclass that `serve` makes

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {self.path}")
        own = re.escape(hub.model_id)
        is_known = not hub.token or self.headers.get("authorization") == f"Bearer {hub.token}"
        if path.startswith("/api/v1/"):
            self.answer_modelscope(with_body=with_body)
        elif path == "/api/models":
            self.reply([{"id": hub.model_id}, {"id": "other/model"}])
        elif not is_known:
            self.refuse(401, "RepoNotFound", "Invalid username or password.")
        elif re.fullmatch(rf"/api/models/{own}(/revision/(main|{COMMIT}))?", path):
            self.reply(self.info())
        elif re.match(rf"/api/models/{own}/revision/", path):
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
        elif re.fullmatch(rf"/api/models/{own}/tree/{COMMIT}", path):
            self.reply([self.entry(name) for name in hub.files])
        elif found := re.fullmatch(rf"/{own}/resolve/(main|{COMMIT})/(.+)", path):
            self.file(found[2], with_body=with_body)
        else:
            self.refuse(404, "RepoNotFound", "Repository not found")

    def answer_modelscope(self, *, with_body: bool) -> None:
        """Of a model: its branches, its list of files, a file."""
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        own = f"/api/v1/models/{self.hub.model_id}"
        if url.path == f"{own}/revisions":
            branches = [{"Revision": "master", "CreatedAt": 0}]
            self.reply({"Code": 200, "Data": {"RevisionMap": {"Branches": branches, "Tags": []}}})
        elif not url.path.startswith(own) or query.get("Revision", "master") != "master":
            self.reply({"Code": 10010205001, "Message": "not found"}, status=404)
        elif url.path == f"{own}/repo/files":
            folders = [{"Path": "a", "Name": "a", "Type": "tree", "Size": 0}]
            files = [self.entry_modelscope(n) for n in self.hub.files if "/" not in n]
            self.reply({"Code": 200, "Success": True, "Data": {"Files": folders + files}})
        elif url.path == f"{own}/repo":
            self.file(query["FilePath"], with_body=with_body)
        else:
            self.reply({"Code": 200, "Success": True, "Data": {"Name": self.hub.model_id}})

    def entry_modelscope(self, name: str) -> dict:
        digest = hashlib.sha256(self.hub.files[name]).hexdigest()
        size = self.size(name)
        return {"Path": name, "Name": name, "Type": "blob", "Size": size, "Sha256": digest}

    def size(self, name: str) -> int:
        is_weight = name.endswith((".safetensors", ".bin"))
        return (
            self.hub.announced_size
            if self.hub.announced_size and is_weight
            else len(self.hub.files[name])
        )

    def info(self) -> dict:
        siblings = [{"rfilename": name, "size": self.size(name)} for name in self.hub.files]
        return {"id": self.hub.model_id, "sha": COMMIT, "siblings": siblings, "tags": []}

    def entry(self, name: str) -> dict:
        entry = {"type": "file", "path": name, "size": self.size(name), "oid": "0" * 40}
        if name.endswith((".safetensors", ".bin")):
            entry["lfs"] = {"oid": self.hub.etag(name), "size": self.size(name), "pointerSize": 1}
        return entry

    def file(self, name: str, *, with_body: bool) -> None:
        if self.hub.is_gated:
            self.refuse(403, "GatedRepo", "Access to this model is restricted")
            return
        if name not in self.hub.files:
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        content = self.hub.files[name]
        if name == self.hub.damaged:
            content = bytes([content[0] ^ 1]) + content[1:]
        first, status = 0, 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", "")):
            first, status = int(found[1]), 206
        if with_body:
            self.hub.downloads.append((name, self.headers.get("range", "")))
        self.send_response(status)
        self.send_header("etag", f'"{self.hub.etag(name)}"')
        self.send_header("x-repo-commit", COMMIT)
        self.send_header("accept-ranges", "bytes")
        if status == 206:
            self.send_header("content-range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("content-length", str(len(content) - first))
        self.end_headers()
        if not with_body:
            return
        if self.hub.cut_after and name.endswith(".safetensors"):
            self.wfile.write(content[first : self.hub.cut_after])
            self.hub.cut_after = 0
            self.close_connection = True
            return
        self.wfile.write(content[first:])

    def reply(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("x-error-code", code)
        self.send_header("x-error-message", message)
        self.send_header("content-length", "0")
        self.end_headers()


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Answer at `hub.url` while inside."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def files_of(folder: Path) -> dict[str, bytes]:
    """A checkpoint's files, and some that no run needs."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    return files | {"pytorch_model.bin": b"x" * 9, "flax_model.msgpack": b"x", "a/b.json": b"{}"}
