# SPDX-License-Identifier: Apache-2.0
"""What CANN, ATB and HCCL take from the environment of a run. Nothing here imports torch.

Whatever the user exported wins, an empty value too.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable, MutableMapping
from pathlib import Path

from gptneox.config.environment import HCCL_BASE_PORT
from gptneox.config.errors import ConfigError
from gptneox.devices.binding import run_tool

HCCL_PORTS = 16  # host ports from HCCL_IF_BASE_PORT on. Source: CANN's list of HCCL variables.
LAST_BASE_PORT = 65520


def has_driver() -> bool:
    """Whether this machine has the driver's tool."""
    return shutil.which("npu-smi") is not None


@functools.cache
def is_310p() -> bool:
    """Whether the chips are those of the Atlas 300I DUO. The tool takes about a second."""
    return has_driver() and "310P" in run_tool("npu-smi", "info")


# -- ports ---------------------------------------------------------------------------------------


def busy_port(first: int) -> int:
    """A port of HCCL's 16 from `first` on that a process listens on; 0: all are free.

    The kernel's table has every address. HCCL listens on that of a network card, not on 127.0.0.1.
    """
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        try:
            lines = table.read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        for line in lines:
            _, address, _, state, *_ = line.split()
            port = int(address.rpartition(":")[2], 16) if state == "0A" else 0
            if first <= port < first + HCCL_PORTS:
                return port
    return 0


def set_hccl_ports(
    environ: MutableMapping[str, str], *, several_hosts: bool, take_port: Callable[[int], bool]
) -> None:
    """Choose the host ports on which the ranks of an NPU meet.

    The user's HCCL_IF_BASE_PORT is checked. Else the next 16 free ports are taken, unless several
    hosts have to agree on them. HCCL_HOST_SOCKET_PORT_RANGE goes before HCCL_IF_BASE_PORT and lets
    HCCL choose by itself.

    Args:
        environ: the environment; HCCL_IF_BASE_PORT is set where it is not the default.
        several_hosts: whether ranks run on other hosts, too.
        take_port: takes the port for this job; False where another job has it.

    Raises:
        ConfigError: HCCL_IF_BASE_PORT is not a port number.
        RuntimeError: a port is taken that this function may not change.
    """
    if not (environ.get("ASCEND_RT_VISIBLE_DEVICES") or has_driver()):
        return
    if environ.get("HCCL_HOST_SOCKET_PORT_RANGE"):
        return
    chosen = environ.get("HCCL_IF_BASE_PORT", "")
    text = chosen or str(HCCL_BASE_PORT)
    if not re.fullmatch("[1-9][0-9]{3,4}", text) or not 1024 <= int(text) <= LAST_BASE_PORT:
        raise ConfigError(
            f"HCCL_IF_BASE_PORT='{text}' is not a port number from 1024 to {LAST_BASE_PORT}"
        )
    base = free = int(text)
    busy = busy_port(base)
    if chosen and not busy:
        return
    while busy_port(free) or not take_port(free):
        free += HCCL_PORTS
        if free > LAST_BASE_PORT:
            raise RuntimeError(
                f"no 16 free ports for HCCL from {base} on; set HCCL_IF_BASE_PORT to the first of "
                "16"
            )
    if free == base:
        return
    if chosen or several_hosts:
        raise RuntimeError(
            f"port {busy or base}, one of HCCL's 16 from {base} on, is taken; "
            f"type: export HCCL_IF_BASE_PORT={free}"
        )
    environ["HCCL_IF_BASE_PORT"] = str(free)


# -- switches ------------------------------------------------------------------------------------


def set_overflow_mode(environ: MutableMapping[str, str]) -> None:
    """INF_NAN_MODE_ENABLE=0 (fp16 overflow saturates) belongs to the 310P.

    On Atlas A2 a current torch_npu refuses it, so elsewhere the device's own default stays.
    """
    if "INF_NAN_MODE_ENABLE" not in environ and is_310p():
        environ["INF_NAN_MODE_ENABLE"] = "0"


def set_switches(environ: MutableMapping[str, str]) -> None:
    """Set what the flash path needs of CANN and ATB. Without an NPU nothing here has an effect.

    Atlas 300I DUO (310P): tiling copies on a stream of their own; no lccl.
    Atlas 800I A2 (910B): tiling copies stay on the stream of the operators.
    In a container operators are launched synchronously, which is safe there.

    Raises:
        ConfigError: BACKEND=lccl on a 310P.
    """
    in_container = Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()
    queue = "0" if in_container else "1"
    defaults = {
        "PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:2048",
        "ATB_LAUNCH_KERNEL_WITH_TILING": "1",
        "ATB_LAYER_INTERNAL_TENSOR_REUSE": "1",
        "ATB_OPERATION_EXECUTE_ASYNC": queue,
        "TASK_QUEUE_ENABLE": queue,
        "HCCL_OP_BASE_FFTS_MODE_ENABLE": "1",
        "HCCL_BUFFSIZE": "110",
        "ATB_USE_TILING_COPY_STREAM": "1" if is_310p() else "0",
    }
    for name, value in defaults.items():
        environ.setdefault(name, value)
    if is_310p() and environ.get("BACKEND") == "lccl":
        raise ConfigError("BACKEND=lccl does not work on 300I DUO; unset BACKEND")


def set_deterministic(environ: MutableMapping[str, str]) -> None:
    """The same answers every time."""
    for name, value in (
        ("LCCL_DETERMINISTIC", "1"),
        ("HCCL_DETERMINISTIC", "true"),
        ("ATB_MATMUL_SHUFFLE_K_ENABLE", "0"),
        ("ATB_LLM_LCOC_ENABLE", "1"),
    ):
        environ.setdefault(name, value)
