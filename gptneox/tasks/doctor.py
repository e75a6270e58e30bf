# SPDX-License-Identifier: Apache-2.0
"""`python main.py doctor`: whether a run would start here, and the remedy if it would not."""

from __future__ import annotations

import platform
import re
import socket
import sys
from dataclasses import replace
from pathlib import Path

from gptneox import __version__, interpreter
from gptneox.cli import Settings
from gptneox.config.environment import variables
from gptneox.config.errors import ConfigError
from gptneox.config.model import ModelConfig
from gptneox.config.settings import DEVICES
from gptneox.devices import create
from gptneox.devices.device import Device, Finding
from gptneox.devices.ranks import DEFAULT_PORTS, PortLocks, Ranks, prepare
from gptneox.engine.api import check_request
from gptneox.engine.block_manager import BlockManager
from gptneox.engine.opening import Opened, check_loading, open_checkpoint
from gptneox.engine.paged import affordable_blocks, check_blocks, check_fits_cache, count_blocks
from gptneox.model import GPTNeoX
from gptneox.output import check_results
from gptneox.parallel import TensorParallelGroup
from gptneox.prompts import (
    DEMO_PROMPTS,
    WARM_UP_PROMPT,
    demo_params,
    fit_output_length,
    is_demonstration,
    make_prompts,
    read_texts,
)
from gptneox.session import refuse_float, refuse_paged_only

PACKAGES = ("torch", "transformers", "safetensors")  # shown even where nothing is wrong
MARKS = {True: "ok  ", None: "note", False: "FAIL"}
# Errors that end a run with a message of one line.
RUN_ERRORS = (ValueError, OSError, RuntimeError, MemoryError)


def run(settings: Settings) -> int:
    """Print one page; returns 0 when a run with these settings would start, else 1.

    Where nothing names the attention, the run is that of run_pa.sh.
    """
    settings = replace(settings, args=replace(settings.args, auto_attention="paged"))
    launch_findings, ranks = launcher(settings)
    findings = [*software(), *launch_findings, *devices(settings, ranks), *ports(settings, ranks)]
    lines = [f"gptneox {__version__}"]
    for finding in findings:
        lines.append(f"{MARKS[finding.ok]} {finding.topic + ':':<18} {finding.text}")
    failed = sum(finding.ok is False for finding in findings)
    lines.append(f"{failed} of these stop a run." if failed else "A run would start.")
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if failed else 0


def software() -> list[Finding]:
    """Versions of Python and of the packages that a run needs."""
    text = f"{platform.python_version()} on {platform.machine()}, {sys.executable}"
    findings = [Finding(sys.version_info >= (3, 10), "Python", text)]
    for requirement in interpreter.needed():
        name = re.split("[<=>]", requirement)[0]
        if missing := interpreter.lacking([requirement]):
            line = f"{sys.executable} -m pip install {interpreter.to_install(missing)}"
            text = f"{interpreter.explain(missing)} is needed; type: {line}"
        elif name in PACKAGES:
            text = interpreter.installed(name)
        else:
            continue
        findings.append(Finding(not missing, name, text))
    return findings


def devices(settings: Settings, ranks: Ranks) -> list[Finding]:
    """Every kind of device, then the chosen one with the checkpoint on it."""
    requested = settings.model.device
    findings: list[Finding] = []
    chosen: Device | None = None
    for name in DEVICES:
        try:
            device = create(name)
        except ConfigError as error:
            findings.append(Finding(False, name, str(error)))
            continue
        reason = device.why_unusable()
        named = name == requested
        if reason:
            if named or device.is_installed():
                findings += device.diagnose()
            findings.append(Finding(False if named else None, name, reason))
        elif chosen is None and (named or requested == "auto"):
            chosen = device
            findings.append(Finding(True, name, "usable, and what this run takes"))
        else:
            findings.append(Finding(True, name, "usable"))
    if requested not in ("auto", *DEVICES):
        findings.append(Finding(False, requested, "this version cannot use it"))
    if chosen is None:
        return findings
    try:
        findings += chosen.diagnose()
        return [*findings, *checkpoint(settings, chosen, ranks)]
    except RuntimeError as error:
        return [*findings, Finding(False, chosen.name, " ".join(str(error).split()))]


def checkpoint(settings: Settings, device: Device, ranks: Ranks) -> list[Finding]:
    """Everything that a run does before it reads the weights, by the functions of the run."""
    is_flash = settings.attention == "flash"
    findings = []
    try:
        refuse_paged_only(settings)
        check_results(settings)
    except (ValueError, OSError) as error:
        findings.append(_failure("settings", error))
    try:
        opened, model = _open(settings, device, ranks, prefer_parts=is_flash)
        refuse_float(settings, model.size.formats)
    except RUN_ERRORS as error:
        return [*findings, _failure("checkpoint", error)]
    config, dtype = opened.config, opened.dtype
    text = _describe(settings.model_path, config, str(dtype))
    text += model.size.scheme and f" with {model.size.scheme} weights"
    findings.append(Finding(True, "checkpoint", text))
    findings += [Finding(None, "notice", notice) for notice in opened.notices]
    engine = settings.engine
    weights, free = model.size.weight_bytes, device.memory().free
    text = (
        f"{weights / 2**30:.2f} GiB of weights on each of {ranks.total} rank(s), "
        f"{free / 2**30:.2f} GiB free"
    )
    block_bytes = model.size.token_bytes * engine.block_size
    blocks = None
    try:
        if not is_flash:
            num_blocks = count_blocks(engine, config, block_bytes, free - weights)
            check_blocks(num_blocks, engine, block_bytes, free - weights)
            blocks = BlockManager(num_blocks, engine.block_size, False)
            room = affordable_blocks(engine, block_bytes, free - weights) * engine.block_size
            text += f"; room for a KV cache of {max(room, 0)} tokens in {model.size.kv_format.name}"
        findings.append(Finding(True, "memory", text))
        findings += prompts(settings, opened, model.num_positions, blocks)
    except RuntimeError as error:
        findings.append(_failure("memory", RuntimeError(f"{text}; {error}")))
    return findings + device.operators(engine.graphs).describe_operators(
        config.head_dim, config.rotary_dim, engine.block_size, model.size.kv_format
    )


def _failure(topic: str, error: BaseException) -> Finding:
    return Finding(False, topic, " ".join(str(error).split()))


def _open(
    settings: Settings, device: Device, ranks: Ranks, *, prefer_parts: bool
) -> tuple[Opened, GPTNeoX]:
    """Open and check the checkpoint as every rank of this host does; returns that of rank 0."""
    checked = []
    for rank in reversed(range(ranks.local)):  # rank 0 last: its device is described afterwards
        device.setup(rank, ranks.local, settings.environment.omp_num_threads)
        group = TensorParallelGroup(rank, ranks.total)
        opened = open_checkpoint(
            settings.model_path,
            device,
            group,
            dtype=settings.model.dtype,
            with_tokenizer=settings.args.load_tokenizer and rank == 0,
            trust_remote_code=settings.args.trust_remote_code,
            prefer_parts=prefer_parts,
        )
        checked.append((opened, check_loading(opened, device, group, settings.engine)))
    return checked[-1]


def prompts(
    settings: Settings, opened: Opened, num_positions: int, blocks: BlockManager | None
) -> list[Finding]:
    """Check the prompts of the command line, but not pipes, which can be read only once.

    `blocks` is the KV cache of the paged path.
    """
    is_demo = is_demonstration(settings)
    vocab_size, has_tokenizer = opened.config.vocab_size, opened.tokenizer is not None
    try:
        if settings.args.interactive:
            make_prompts(settings, [], opened.tokenizer)  # for the chat template alone
            return []
        texts = [WARM_UP_PROMPT, *DEMO_PROMPTS]
        if not is_demo:
            texts = read_texts(settings, TensorParallelGroup(), leave_pipes=True)
        made, wishes = make_prompts(settings, texts, opened.tokenizer)
        for prompt in made:
            params = fit_output_length(settings, num_positions, prompt, wishes)
            if is_demo:
                params = demo_params(settings)
            check_request(
                prompt.ids, params, vocab_size, num_positions, has_tokenizer=has_tokenizer
            )
            if blocks:
                check_fits_cache(len(prompt.ids), params, blocks)
    except (ValueError, OSError) as error:
        return [_failure("prompts", error)]
    return []


def _describe(path: Path, config: ModelConfig, dtype: str) -> str:
    return (
        f"{path}: {config.num_parameters / 1e6:.1f} M parameters, {config.num_layers} layers, "
        f"{config.num_heads} heads of {config.head_dim}, {config.rotary_dim} of them rotated, "
        f"{config.activation}, in {dtype.removeprefix('torch.')}"
    )


def launcher(settings: Settings) -> tuple[list[Finding], Ranks]:
    """What run_pa.sh makes of the environment."""
    environment = settings.environment
    if environment.world_size > 1:
        return [], Ranks(environment.world_size, environment.local_world_size)
    environ = dict(variables())
    locks = PortLocks(environ, "doctor")
    try:
        return [], prepare(environ, DEFAULT_PORTS["paged"], locks)
    except (ValueError, OSError, RuntimeError) as error:
        return [Finding(False, "run_pa.sh", str(error))], Ranks()
    finally:
        locks.close()


def ports(settings: Settings, ranks: Ranks) -> list[Finding]:
    """The rendezvous ports of the launchers; one that is taken is passed over by them."""
    own = settings.environment.master_port
    findings = []
    for port in (own,) if own else (DEFAULT_PORTS["paged"], DEFAULT_PORTS["flash"]):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                remedy = "export another MASTER_PORT" if own else "the launcher takes another"
                ok = False if own and ranks.total > 1 else None
                findings.append(Finding(ok, f"port {port}", f"{error.strerror}; {remedy}"))
            else:
                findings.append(Finding(True, f"port {port}", "free"))
    return findings
