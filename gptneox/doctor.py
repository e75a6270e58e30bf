# SPDX-License-Identifier: Apache-2.0
"""`python main.py doctor`: would a run start here, and if not, what is there to do?"""

from __future__ import annotations

import platform
import socket
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gptneox import __version__
from gptneox.backends import BACKENDS, create
from gptneox.backends.device import Device, Finding
from gptneox.checkpoint import Checkpoint
from gptneox.cli import Settings
from gptneox.config import ConfigError, ModelConfig

PACKAGES = {"torch": "2.7", "transformers": "5.0", "safetensors": ""}
MARKS = {True: "ok  ", None: "note", False: "FAIL"}
LAUNCHER_PORTS = (20014, 20001)


def run(settings: Settings) -> int:
    """Print one page; returns 0 when a run with these settings would start, else 1."""
    findings = [*software(), *devices(settings), *ports(settings)]
    lines = [f"gptneox {__version__}"]
    for finding in findings:
        lines.append(f"{MARKS[finding.ok]} {finding.topic + ':':<18} {finding.text}")
    failed = sum(finding.ok is False for finding in findings)
    lines.append(f"{failed} of these stop a run." if failed else "A run would start.")
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if failed else 0


def software() -> list[Finding]:
    """Python and the packages."""
    text = f"{platform.python_version()} on {platform.machine()}, {sys.executable}"
    findings = [Finding(sys.version_info >= (3, 10), "Python", text)]
    for name, least in PACKAGES.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            text = f"missing; type: {sys.executable} -m pip install {name}"
            findings.append(Finding(False, name, text))
            continue
        is_new = _numbers(found) >= _numbers(least)
        text = found if is_new else f"{found} is older than {least}; type: pip install -U {name}"
        findings.append(Finding(is_new, name, text))
    return findings


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split("+")[0].split(".")[:2] if part.isdigit()]


def devices(settings: Settings) -> list[Finding]:
    """Every kind of device, then the chosen one and what the checkpoint needs of it."""
    wanted = settings.model.device
    findings: list[Finding] = []
    chosen: Device | None = None
    for name in BACKENDS:
        try:
            device = create(name)
        except ConfigError as error:
            findings.append(Finding(False, name, str(error)))
            continue
        reason = device.why_unusable()
        named = name == wanted
        if reason:
            if named or device.is_installed():
                findings += device.diagnose()
            findings.append(Finding(False if named else None, name, reason))
        elif chosen is None and (named or wanted == "auto"):
            chosen = device
            findings.append(Finding(True, name, "usable, and what this run takes"))
        else:
            findings.append(Finding(True, name, "usable"))
    if wanted not in ("auto", *BACKENDS):
        findings.append(Finding(False, wanted, "this version cannot use it"))
    if chosen is None:
        return findings
    try:
        findings += chosen.diagnose()
        return [*findings, *checkpoint(settings, chosen)]
    except RuntimeError as error:
        return [*findings, Finding(False, chosen.name, " ".join(str(error).split()))]


def checkpoint(settings: Settings, device: Device) -> list[Finding]:
    """What the checkpoint of --model_path needs against what is there."""
    path = settings.model_path
    try:
        config = ModelConfig.from_pretrained(path)
        Checkpoint(path).close()
        device.setup(0)
        dtype, notice = device.resolve_dtype(config.dtype, settings.model.dtype)
    except (ValueError, OSError, RuntimeError) as error:
        # Without --model_path a missing embedded checkpoint stops nothing that was asked for.
        ok = False if settings.model.model_path else None
        return [Finding(ok, "checkpoint", " ".join(str(error).split()))]
    ranks = _num_ranks(settings)
    findings = [Finding(True, "checkpoint", _describe(path, config, str(dtype)))]
    if notice:
        findings.append(Finding(None, "dtype", notice))
    free = device.memory().free
    weights = config.num_parameters * dtype.itemsize / ranks
    block = config.kv_bytes_per_token(dtype.itemsize, ranks) * settings.engine.block_size
    room = free - weights - settings.engine.reserved_memory_gb * 2**30
    tokens = int(room * settings.engine.memory_fraction) // block * settings.engine.block_size
    text = (
        f"{weights / 2**30:.2f} GiB of weights on each of {ranks} rank(s), {free / 2**30:.2f} GiB "
        f"free; room for a KV cache of {max(0, tokens)} tokens"
    )
    if tokens <= 0:
        text += "; use more devices, a smaller dtype, or lower --reserved_memory_gb"
    findings.append(Finding(tokens > 0, "memory", text))
    size = settings.engine.block_size
    return findings + device.operators().describe_operators(
        config.head_dim, config.rotary_dim, size
    )


def _describe(path: Path, config: ModelConfig, dtype: str) -> str:
    return (
        f"{path}: {config.num_parameters / 1e6:.1f} M parameters, {config.num_layers} layers, "
        f"{config.num_heads} heads of {config.head_dim}, {config.rotary_dim} of them rotated, "
        f"{config.activation}, in {dtype.removeprefix('torch.')}"
    )


def _num_ranks(settings: Settings) -> int:
    """Ranks that run_pa.sh would start: one per visible device."""
    visible = settings.environment.visible_devices
    return max(settings.environment.world_size, len(visible.split(",")) if visible else 1)


def ports(settings: Settings) -> list[Finding]:
    """The rendezvous ports of the launchers; one that is taken is passed over by them."""
    own = settings.environment.master_port
    findings = []
    for port in (own,) if own else LAUNCHER_PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                remedy = "export another MASTER_PORT" if own else "the launcher takes another"
                ok = False if own and _num_ranks(settings) > 1 else None
                findings.append(Finding(ok, f"port {port}", f"{error.strerror}; {remedy}"))
            else:
                findings.append(Finding(True, f"port {port}", "free"))
    return findings
