# SPDX-License-Identifier: Apache-2.0
"""The processes of a replica: on each of its hosts one launcher, which ends with the replica."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import ray
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import gptneox
from gptneox.cluster.plan import Shape
from gptneox.config.environment import variables

WATCH_S = 0.3
ANSWER_S = 5.0
FORCE_S = 10.0  # beyond its grace, that a launcher gets to be gone


def launcher(*words: str) -> list[str]:
    """A call of our launch module."""
    return [sys.executable, str(Path(gptneox.__file__).with_name("launch.py")), *words]


def end_with_node() -> None:
    """End this actor when its node does: Ray leaves it alive where the node's raylet is killed."""
    raylet = os.getppid()

    def watch() -> None:
        while os.getppid() == raylet:
            time.sleep(WATCH_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def tied(command: Seq[str], grace_s: float, folder: Path | None = None) -> list[str]:
    """A command that ends with the process that holds its standard input; see `gptneox.lifeline`.

    Args:
        command: what runs.
        grace_s: seconds that it gets to end after SIGTERM.
        folder: is removed in the end.
    """
    lifeline = str(Path(gptneox.__file__).with_name("lifeline.py"))
    remove = ["--remove", str(folder)] if folder else []
    return [sys.executable, "-I", lifeline, str(grace_s), *remove, *command]


class HostProcess:
    """A launcher on this host, with all that it starts. It ends with this process."""

    def __init__(
        self,
        command: Seq[str],
        environ: Mapping[str, str],
        grace_s: float,
        folder: Path | None = None,
    ) -> None:
        """Start it with an environment; for the other arguments see `tied`."""
        self._grace_s = grace_s
        self._process = subprocess.Popen(
            tied(command, grace_s, folder),
            env=dict(environ),
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """End it, and wait until nothing of it is left."""
        assert self._process.stdin
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(self._grace_s + FORCE_S)


class Follower:
    """A host of a replica that is not its first: an actor of Ray there."""

    def __init__(
        self, shape: Shape, options: Seq[str], host: int, place: tuple[str, int], grace_s: float
    ) -> None:
        """Start the launcher; `place` is where the ranks meet, `options` are main.py's."""
        end_with_node()
        environ = shape.environ(variables(), host, *place)
        logs = Path(tempfile.mkdtemp(prefix="gptneox-"))  # of torchrun
        words = ["ranks", "serve", "--log_dir", str(logs), *options, "--server_socket", "-"]
        self._process = HostProcess(launcher(*words), environ, grace_s, logs)

    def status(self) -> int | None:
        """See `HostProcess`."""
        return self._process.status()

    def stop(self) -> None:
        """See `HostProcess`."""
        self._process.stop()


class Hosts:
    """All hosts of a replica but the first, and the place where its ranks meet.

    The caller is an actor in the first bundle of a placement group, and starts the first host.
    """

    def __init__(self, shape: Shape, options: Seq[str], grace_s: float) -> None:
        """Start the others, which wait for the first; `options` are main.py's."""
        end_with_node()
        self._grace_s = grace_s
        place = (ray.util.get_node_ip_address(), free_port()) if shape.hosts > 1 else ("", 0)
        self.environ = shape.environ(variables(), 0, *place)
        self._followers: list[Any] = []
        for host in range(1, shape.hosts):
            strategy = PlacementGroupSchedulingStrategy(
                get_current_placement_group(), placement_group_bundle_index=host
            )
            follower = ray.remote(Follower).options(
                scheduling_strategy=strategy, **shape.actor_options
            )
            self._followers.append(follower.remote(shape, list(options), host, place, grace_s))

    def lost(self) -> str:
        """Why one of them has gone; empty while all are there."""
        for host, follower in enumerate(self._followers, 1):
            try:
                status = ray.get(follower.status.remote(), timeout=ANSWER_S)
            except ray.exceptions.GetTimeoutError:  # it may be starting; Ray knows if it lives
                continue
            except ray.exceptions.RayError as error:
                return f"host {host} cannot be reached: {type(error).__name__}"
            if status is not None:
                return f"host {host} has ended with status {status}"
        return ""

    def stop(self) -> None:
        """End them, and wait until nothing is left."""
        stopping = [follower.stop.remote() for follower in self._followers]
        if stopping:
            ray.wait(stopping, num_returns=len(stopping), timeout=self._grace_s + FORCE_S)
        for follower in self._followers:
            ray.kill(follower)
        self._followers.clear()

    def watch(self, on_lost: Any) -> None:
        """Call `on_lost` with the reason, once, from a thread, when one of them has gone."""
        if self._followers:
            threading.Thread(target=self._watch, args=[on_lost], daemon=True).start()

    def _watch(self, on_lost: Any) -> None:
        while self._followers:
            if reason := self.lost():
                on_lost(reason)
                return
            time.sleep(WATCH_S)


def free_port() -> int:
    """A port where nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
