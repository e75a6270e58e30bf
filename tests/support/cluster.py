# SPDX-License-Identifier: Apache-2.0
"""A Ray cluster of two nodes on this machine, and what its replicas have started."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.processes import MAIN, clean_environ

PATIENCE_S = 300.0  # for what takes seconds on an idle machine
NODE = {"num_cpus": 2, "object_store_memory": 80 << 20, "resources": {"NPU": 2}}


@dataclass
class Process:
    """A process of ours in the cluster."""

    pid: int
    command: str

    @property
    def is_rank(self) -> bool:
        return "--server_socket" in self.command and "launch.py" not in self.command

    @property
    def port(self) -> int:
        """Of a front; 0 for others."""
        found = re.search(r"--host 127.0.0.1 --port (\d+) --replicas 1$", self.command)
        return int(found[1]) if found and "lifeline" not in self.command else 0

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


@dataclass
class TwoNodes:
    """A cluster; everything that is started in it has TMPDIR `folder`."""

    cluster: Any
    folder: Path
    nodes: list[Any] = field(default_factory=list)
    port: int = 0  # of the service

    @property
    def environ(self) -> dict[str, str]:
        return clean_environ(
            TMPDIR=str(self.folder), RAY_ADDRESS=self.cluster.address, PYTHON=sys.executable
        )

    def add_node(self) -> None:
        self.nodes.append(self.cluster.add_node(**NODE))

    def run(self, *argv: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """main.py as a user of the cluster runs it."""
        return subprocess.run(
            [sys.executable, str(MAIN), *map(str, argv)],
            env=self.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
            **options,
        )

    def deploy(self, *argv: str | Path) -> None:
        """`ray deploy` at the port of this cluster."""
        done = self.run("ray", "deploy", *argv, "--port", str(self.port))
        assert done.returncode == 0, done.stderr
        assert f"is ready at http://127.0.0.1:{self.port}" in done.stdout

    def delete(self) -> None:
        """`ray delete`; nothing is left then."""
        done = self.run("ray", "delete")
        assert done.returncode == 0, done.stderr
        wait_for(lambda: not self.processes(), "all processes to end")
        assert left_in(self.folder) == []

    def shutdown(self) -> None:
        """`ray shutdown`; neither of ours nor of Ray Serve is anything left then."""
        ports = [self.port, *(front.port for front in self.fronts())]
        done = self.run("ray", "shutdown")
        assert done.returncode == 0, done.stderr
        wait_for(lambda: not self.processes(), "all processes to end")
        wait_for(lambda: not self.actors("Serve") + self.actors("Proxy"), "Ray Serve to end")
        assert [port for port in ports if _listens(port)] == []
        assert left_in(self.folder) == []

    # -- what runs ---------------------------------------------------------------------------------

    def processes(self) -> list[Process]:
        """Of our own programs, not of Ray."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                environ = (entry / "environ").read_bytes().split(b"\0")
                command = " ".join(os.fsdecode(word) for word in words).strip()
                is_ours = re.search(r"gptneox/\w+\.py|main\.py --task serve", command)
                if f"TMPDIR={self.folder}".encode() in environ and is_ours:
                    found.append(Process(int(entry.name), command))
        return found

    def fronts(self) -> list[Process]:
        """The services of the replicas, in the order of their ports."""
        return sorted((p for p in self.processes() if p.port), key=lambda p: p.port)

    def ranks(self) -> list[Process]:
        return [p for p in self.processes() if p.is_rank]

    def actors(self, name: str) -> list[Process]:
        """Workers of Ray in this cluster with a title."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                title = os.fsdecode((entry / "cmdline").read_bytes().strip(b"\0"))
                environ = (entry / "environ").read_bytes()
                if name in title and f"TMPDIR={self.folder}".encode() in environ:
                    found.append(Process(int(entry.name), title))
        return found

    def ranks_of(self, front: Process) -> list[Process]:
        """The ranks that a front has started."""
        parents = {front.pid}
        while True:
            more = {pid for pid, parent in _parents().items() if parent in parents} - parents
            if not more:
                break
            parents |= more
        return [rank for rank in self.ranks() if rank.pid in parents]

    def wait_until_ready(self, count: int) -> float:
        """Until so many services answer at /health; returns the seconds."""
        start = time.monotonic()

        def is_ready() -> bool:
            fronts = self.fronts()
            return len(fronts) == count and all(_status(p.port) == 200 for p in fronts)

        wait_for(is_ready, f"{count} replicas")
        return time.monotonic() - start

    def generated_by(self, front: Process) -> float:
        """Tokens that a service has generated since its start."""
        text = self.get("/metrics", front.port)
        return sum(
            float(line.split()[-1])
            for line in text.splitlines()
            if line.startswith("gptneox:generation_tokens_total")
        )

    # -- requests ----------------------------------------------------------------------------------

    def get(self, path: str, port: int) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return connection.getresponse().read().decode()

    def complete(self, prompt: str, **fields: Any) -> Outcome:
        """One request to the service."""
        body = {"prompt": prompt, "temperature": 0, **fields}
        if fields.get("stream"):
            body["stream_options"] = {"include_usage": True}
        start = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=90)
        try:
            with contextlib.closing(connection):
                headers = {"content-type": "application/json"}
                connection.request("POST", "/v1/completions", json.dumps(body), headers)
                answer = connection.getresponse()
                raw = answer.read().decode()
        except (OSError, http.client.HTTPException) as error:
            return Outcome(0, "", f"{type(error).__name__}: {error}", start)
        return Outcome.of(answer.status, raw, start, is_stream=bool(fields.get("stream")))

    def complete_all(self, prompts: list[str], **fields: Any) -> list[Outcome]:
        """All at once."""
        outcomes: list[Any] = [None] * len(prompts)

        def one(i: int) -> None:
            outcomes[i] = self.complete(prompts[i], **fields)

        threads = [threading.Thread(target=one, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes


@dataclass
class Outcome:
    """What a client got: a whole answer, or an error that it can see."""

    status: int  # 0: the connection broke
    text: str
    error: str
    start: float
    seconds: float = 0.0
    num_tokens: int = 0

    @property
    def is_whole(self) -> bool:
        return self.status == 200 and not self.error

    @classmethod
    def of(cls, status: int, raw: str, start: float, *, is_stream: bool) -> Outcome:
        seconds = time.monotonic() - start
        if status != 200 or not is_stream:
            found = json.loads(raw) if raw.startswith("{") else {"error": raw}
            if status != 200 or "error" in found:
                return cls(status, "", str(found.get("error", raw)), start, seconds)
            tokens = found["usage"]["completion_tokens"]
            return cls(status, found["choices"][0]["text"], "", start, seconds, tokens)
        events = [line.removeprefix("data: ") for line in raw.splitlines() if line]
        if events[-1:] != ["[DONE]"]:
            return cls(status, "", f"the stream was cut off: {raw[-80:]!r}", start, seconds)
        chunks = [json.loads(event) for event in events[:-1]]
        errors = [str(chunk["error"]) for chunk in chunks if "error" in chunk]
        text = "".join(c["text"] for chunk in chunks for c in chunk.get("choices", ()))
        usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
        tokens = usages[-1]["completion_tokens"] if usages else 0
        return cls(status, text, "; ".join(errors), start, seconds, tokens)


def _status(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        with contextlib.closing(connection):
            connection.request("GET", "/health")
            return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _parents() -> dict[int, int]:
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            found[int(entry.name)] = int(fields[1])
    return found


def wait_for(condition: Callable[[], Any], what: str, timeout: float = PATIENCE_S) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"waited {timeout} s for {what}"
        time.sleep(0.2)


def left_in(folder: Path) -> list[str]:
    """Files of ours below a TMPDIR; the locks of ports stay."""
    return [p.name for p in folder.iterdir() if p.name.startswith(("gptneox-", "torchelastic"))
        and not p.name.startswith("gptneox-ascend-")]  # fmt: skip


def shared_memory() -> set[str]:
    """Names in /dev/shm; semaphores are of other programs' multiprocessing, ours have none."""
    return {p.name for p in Path("/dev/shm").iterdir() if not p.name.startswith("sem.")}


@contextlib.contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """A cluster, which is taken down in the end."""
    import ray
    from ray.cluster_utils import Cluster

    folder = Path(tempfile.mkdtemp(prefix="gx"))  # the paths of sockets are short
    before = dict(os.environ)
    os.environ.update(TMPDIR=str(folder), RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1")
    for name in ("RAY_ADDRESS", "PYTHON"):
        os.environ.pop(name, None)
    os.environ["PYTHON"] = sys.executable
    head = {**NODE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        nodes = TwoNodes(cluster, folder)
        nodes.add_node()
        nodes.port = free_port()
        yield nodes
    finally:
        ray.shutdown()
        cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(folder, ignore_errors=True)
