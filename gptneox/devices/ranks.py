# SPDX-License-Identifier: Apache-2.0
"""How many ranks a launcher starts, and where they meet. Nothing here imports torch.

Whatever the user exported wins. Settings that are wrong raise ConfigError; what is missing, such as
a free port, raises RuntimeError.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path

from gptneox.config.errors import ConfigError
from gptneox.config.settings import parse_device_ids
from gptneox.devices.binding import share_cores, usable_cpus
from gptneox.devices.switches import set_hccl_ports, set_overflow_mode

# Where each launcher looks for a free rendezvous port first, and where all of them stop.
DEFAULT_PORTS = {"paged": 20014, "flash": 20001, "modeltest": 20020}
LAST_PORT = 20050

# What Ray calls the devices that it shares out, by our names of them.
CLUSTER_RESOURCES = {"npu": "NPU", "cuda": "GPU", "cpu": "CPU"}

# What a cluster's operator, an earlier run or another launcher says of ranks and hosts; torchrun
# takes options from PET_….
_FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PET_NNODES", "PET_NODE_RANK",
    "PET_NPROC_PER_NODE", "PET_MASTER_ADDR", "PET_MASTER_PORT", "PET_LOCAL_ADDR", "PET_STANDALONE",
    "PET_MODULE", "PET_NO_PYTHON", "PET_RUN_PATH", "PET_VIRTUAL_LOCAL_RANK")  # fmt: skip


@dataclass(frozen=True)
class Ranks:
    """The processes of a run."""

    total: int = 1
    local: int = 1  # on this host
    node_rank: int = 0
    master_addr: str = ""

    @property
    def num_nodes(self) -> int:
        """Number of hosts."""
        return self.total // self.local

    @property
    def options(self) -> list[str]:
        """torchrun's options."""
        options = ["--nproc_per_node", str(self.local)]
        if self.num_nodes > 1:
            options += ["--nnodes", str(self.num_nodes), "--node_rank", str(self.node_rank)]
            options += ["--master_addr", self.master_addr]
        return options


def is_count(text: str) -> bool:
    """Whether it is a whole number from 1 to 9999."""
    return re.fullmatch("[1-9][0-9]{0,3}", text) is not None


def read_ranks(environ: Mapping[str, str]) -> Ranks:
    """TP_WORLD_SIZE, else one rank per device listed, else one; times the hosts."""
    num_devices = _count_devices(environ.get("ASCEND_RT_VISIBLE_DEVICES"))
    text = environ.get("TP_WORLD_SIZE") or str(num_devices or 1)  # empty is unset
    if not is_count(text):
        raise ConfigError(
            f"TP_WORLD_SIZE='{text}' is not a whole number from 1 on; unset it or set 1, 2, 4 or 8"
        )
    local = int(text)
    if local > 1 and num_devices not in (None, local):
        raise ConfigError(
            f"TP_WORLD_SIZE={local}, but ASCEND_RT_VISIBLE_DEVICES="
            f"{environ['ASCEND_RT_VISIBLE_DEVICES']} lists {num_devices}; unset TP_WORLD_SIZE, or "
            "make the two agree"
        )
    num_nodes, node_rank = read_nodes(environ)
    address = environ["MASTER_ADDR"] if num_nodes > 1 else ""
    return Ranks(local * num_nodes, local, node_rank, address)


def _count_devices(text: str | None) -> int | None:
    """Devices that ASCEND_RT_VISIBLE_DEVICES lists; None where it is not set."""
    if text is None:
        return None
    name = f"ASCEND_RT_VISIBLE_DEVICES='{text}'"
    if not re.fullmatch("(0|[1-9][0-9]*)(,(0|[1-9][0-9]*))*", text):  # what CANN takes
        raise ConfigError(f"{name} is not a list of device numbers; write it like 0,1")
    try:
        return len(parse_device_ids(text))
    except ConfigError:
        raise ConfigError(f"{name} names a device twice; name each one once") from None


def read_nodes(environ: Mapping[str, str]) -> tuple[int, int]:
    """Number of hosts, and this host's number."""
    text = environ.get("NNODES") or "1"
    if not is_count(text):
        raise ConfigError(f"NNODES='{text}' is not a whole number from 1 on")
    num_nodes = int(text)
    if num_nodes == 1:
        return 1, 0
    if not environ.get("MASTER_ADDR"):
        raise ConfigError(f"NNODES={text} needs MASTER_ADDR, the address of host 0")
    rank = environ.get("NODE_RANK", "")
    if not re.fullmatch("0|[1-9][0-9]{0,3}", rank) or int(rank) >= num_nodes:
        raise ConfigError(
            f"NNODES={text} needs NODE_RANK, this host's number from 0 to {num_nodes - 1}, "
            f"got '{rank}'"
        )
    return num_nodes, int(rank)


@dataclass(frozen=True)
class Share:
    """What one of several engines on this host gets."""

    environ: dict[str, str]
    cores: list[int]  # logical processors to stay on; empty: any


def split_host(
    environ: Mapping[str, str], num_engines: int, count_devices: Callable[[], int]
) -> list[Share]:
    """Disjoint devices for several engines; where there are none, disjoint cores.

    The devices listed are shared out. Without a list each engine gets one for each of its ranks, of
    those that there are.

    Args:
        environ: of the engines.
        num_engines: how many engines.
        count_devices: tells how many devices there are, 0 where the CPU computes; only called for
            several engines without a list.

    Raises:
        ConfigError: the devices cannot be shared evenly, are too few, or there are several hosts.
    """
    if num_engines == 1:
        return [Share(dict(environ), [])]
    if read_nodes(environ)[0] > 1:
        raise ConfigError(f"replicas is {num_engines}, which is for one host; unset NNODES")
    shares = []
    devices = _devices_to_share(environ, num_engines, count_devices)
    size = len(devices) // num_engines
    for index in range(num_engines):
        own, cores = dict(environ), list[int]()
        if devices:
            own["ASCEND_RT_VISIBLE_DEVICES"] = ",".join(devices[index * size : (index + 1) * size])
        else:
            cores = share_cores(index, num_engines, usable_cpus())
        if index:  # these take the next free ports
            own.pop("MASTER_PORT", None)
        shares.append(Share(own, cores))
    return shares


def _devices_to_share(
    environ: Mapping[str, str], num_engines: int, count_devices: Callable[[], int]
) -> list[str]:
    """Numbers of the devices that the engines get; none where the CPU computes."""
    if (listed := environ.get("ASCEND_RT_VISIBLE_DEVICES")) is not None:
        num_listed = _count_devices(listed) or 0
        if num_listed % num_engines:
            raise ConfigError(
                f"replicas is {num_engines}, but ASCEND_RT_VISIBLE_DEVICES={listed} lists "
                f"{num_listed}; list as many devices for each"
            )
        return listed.split(",")
    num_found, num_ranks = count_devices(), read_ranks(environ).local
    num_needed = num_engines * num_ranks if num_found else 0
    if num_needed > num_found:
        raise ConfigError(
            f"replicas is {num_engines} with {num_ranks} rank(s) each, which take {num_needed} "
            f"devices, but {num_found} are there; lower --replicas or TP_WORLD_SIZE"
        )
    return [str(number) for number in range(num_needed)]


@dataclass
class PortLocks:
    """The ports that this job has taken: two jobs started at once get two ports.

    A lock is held, through exec, until the job ends or `close` is called.
    """

    environ: Mapping[str, str]
    program: str  # named where there are no locks
    _descriptors: list[int] = field(default_factory=list)
    _warned: bool = False

    def take(self, port: int) -> bool:
        """Take a port; False where a process listens there or another job has taken it.

        Without a folder of our own, or without locks, the look at the port has to do.
        """
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return False
        folder = Path(self.environ.get("TMPDIR") or "/tmp") / f"gptneox-ascend-{os.getuid()}"
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700)
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                return True
            descriptor = os.open(folder / f"port-{port}", os.O_WRONLY | os.O_CREAT, 0o666)
        except OSError:
            return True
        self._descriptors.append(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):  # the second on network file systems
                os.close(self._descriptors.pop())
                return False
            self._warn(f"no file locks in {folder} ({error.strerror})")
        os.set_inheritable(descriptor, True)
        return True

    def _warn(self, text: str) -> None:
        if not self._warned:
            sys.stderr.write(f"{self.program}: {text}: start nothing else like this meanwhile\n")
        self._warned = True

    def close(self) -> None:
        """Give the ports back."""
        while self._descriptors:
            os.close(self._descriptors.pop())


def set_port(
    environ: MutableMapping[str, str], default: int, ranks: Ranks, locks: PortLocks
) -> None:
    """Set MASTER_PORT.

    The user's stays. Several hosts have to agree on it, so they get the default. Else it is the
    first free port from there to LAST_PORT.
    """
    port = default
    if text := environ.get("MASTER_PORT"):
        if not re.fullmatch("[1-9][0-9]{0,4}", text) or int(text) > 65535:
            raise ConfigError(f"MASTER_PORT='{text}' is not a port number from 1 to 65535")
        port = int(text)
    elif ranks.local > 1 and ranks.num_nodes == 1:
        while not locks.take(port):
            port += 1
            if port > LAST_PORT:
                raise RuntimeError(
                    f"no free port from {default} to {LAST_PORT}; set MASTER_PORT to one"
                )
    environ["MASTER_PORT"] = str(port)


def drop_foreign_ranks(environ: MutableMapping[str, str]) -> str:
    """Unset what others say of ranks and hosts: the ranks are those that the launcher starts.

    Returns what was set, for a notice.
    """
    names = [*_FOREIGN, *sorted(name for name in environ if name.startswith("PET_RDZV_"))]
    found = [(name, environ.pop(name, "")) for name in names]
    return "".join(f" {name}={value}" for name, value in found if value)


def prepare(environ: MutableMapping[str, str], default_port: int, locks: PortLocks) -> Ranks:
    """Read and complete the environment of a run, before anything starts.

    Args:
        environ: changed in place.
        default_port: the first rendezvous port to try.
        locks: holds the ports that are taken.

    Returns:
        The ranks to start.
    """
    ranks = read_ranks(environ)
    set_port(environ, default_port, ranks, locks)
    if ranks.total > 1:
        several_hosts = ranks.num_nodes > 1
        set_hccl_ports(environ, several_hosts=several_hosts, take_port=locks.take)
    set_overflow_mode(environ)
    return ranks
