# SPDX-License-Identifier: Apache-2.0
"""What torch_npu needs (CANN, NNAL, matching versions), and the commands that provide it."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from gptneox.devices.device import Finding
from gptneox.devices.switches import HCCL_PORTS, LAST_BASE_PORT, busy_port

CANN_SCRIPTS = (
    "/usr/local/Ascend/ascend-toolkit/set_env.sh",
    "/usr/local/Ascend/cann/set_env.sh",
)
NNAL_SCRIPT = "/usr/local/Ascend/nnal/atb/set_env.sh"


def cann_remedy() -> str:
    """The line that makes CANN's libraries visible."""
    known = [
        *CANN_SCRIPTS,
        *(str(Path.home() / "Ascend" / s) for s in ("ascend-toolkit/set_env.sh",)),
    ]
    script = next((s for s in known if Path(s).is_file()), CANN_SCRIPTS[0])
    return f"source {script}"


def explain_import_error(error: BaseException) -> str:
    """Why `import torch_npu` failed, with the line to type."""
    text = " ".join(str(error).split())
    if "static TLS" in text:
        library = re.search(r"\S*libgomp\S*?\.so[.\d]*", text)
        path = library[0] if library else "/usr/lib/aarch64-linux-gnu/libgomp.so.1"
        return f"{text}; type: export LD_PRELOAD={path}"
    if missing := re.search(r"(lib\S+?\.so\S*): cannot open shared object", text):
        if missing[1] == "libatb.so":
            return f"NNAL's {missing[1]} is not found; type: source {NNAL_SCRIPT}"
        return f"CANN's {missing[1]} is not found; type: {cann_remedy()}"
    if "undefined symbol" in text:
        return f"torch_npu does not fit CANN or torch ({text}); see python main.py doctor"
    return f"import torch_npu failed: {text}"


def release(version: str) -> str:
    """2.7.1 of 2.7.1.post2 or 2.7.1+cpu."""
    match = re.match(r"\d+\.\d+\.\d+", version)
    return match[0] if match else version


def version_conflict(torch_version: str, npu_version: str) -> str:
    """Empty when torch_npu is made for this torch."""
    if release(torch_version) == release(npu_version):
        return ""
    return (
        f"torch_npu {npu_version} is made for torch {release(npu_version)}, but torch is "
        f"{torch_version}; type: pip install torch_npu=={release(torch_version)}"
    )


# Oldest CANN that a release is made for. Source: README of Ascend/pytorch, version table.
CANN_VERSIONS = {
    "2.5.1": "8.1.RC1",
    "2.6.0": "8.2.RC1",
    "2.7.1": "8.3.RC1",
    "2.8.0": "8.3.RC1",
    "2.9.0": "8.5.0",
    "2.10.0": "9.0.0",
}


def cann_version(home: Path) -> str:
    """The release below ASCEND_HOME_PATH; empty when it cannot be read."""
    for file in (*home.glob("*/ascend_toolkit_install.info"), home / "version.cfg"):
        try:
            text = file.read_text(encoding="utf-8")
        except OSError:
            continue
        if found := re.search(r"\b(\d+\.\d+\.(?:RC)?\d+)\b(?!\.)", text):
            return found[1]
    return ""


def version_key(version: str) -> tuple[int, ...]:
    """Sortable: 8.2.RC1 comes before 8.2.0."""
    major, minor, patch = version.split(".")[:3]
    is_final = not patch.startswith("RC")
    return int(major), int(minor), int(is_final), int(patch.removeprefix("RC"))


def cann_findings(npu_version: str, home: str) -> list[Finding]:
    """torch_npu against torch, CANN against torch_npu."""
    conflict = version_conflict(torch.__version__, npu_version)
    findings = [Finding(not conflict, "torch_npu", conflict or npu_version)]
    if not home:
        text = f"set_env.sh has not been sourced; type: {cann_remedy()}"
        return [*findings, Finding(None, "CANN", text)]
    installed = cann_version(Path(home))
    oldest = CANN_VERSIONS.get(release(npu_version), "")
    if not installed:
        return [*findings, Finding(None, "CANN", f"version not readable below {home}")]
    if oldest and version_key(installed) < version_key(oldest):
        text = f"{installed} is older than {oldest}, which torch_npu {npu_version} is made for"
        return [*findings, Finding(None, "CANN", text)]
    return [*findings, Finding(True, "CANN", f"{installed} ({oldest or 'no'} minimum known)")]


def hccl_finding(base: int, port_range: str) -> Finding:
    """Whether several ranks can meet: the launchers step aside, other ways to start do not."""
    topic = "HCCL ports"
    if port_range:
        return Finding(True, topic, f"HCCL_HOST_SOCKET_PORT_RANGE={port_range}")
    taken = busy_port(base)
    if not taken:
        return Finding(True, topic, f"{base} to {base + HCCL_PORTS - 1} are free")
    free = next((p for p in range(base, LAST_BASE_PORT + 1, HCCL_PORTS) if not busy_port(p)), base)
    text = f"{taken} is taken; run_pa.sh takes others, else type: export HCCL_IF_BASE_PORT={free}"
    return Finding(None, topic, text)
