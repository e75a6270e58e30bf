# SPDX-License-Identifier: Apache-2.0
"""Build stand-ins for the CANN libraries that torch_npu links to.

With them on LD_LIBRARY_PATH the unchanged torch_npu package imports on a machine without CANN and
offers devices whose memory is host memory and whose kernels compute nothing (`runtime.c`).
Usage: build.py OUTPUT_FOLDER FOLDER_WITH_TORCH_NPU. Needs gcc, nm and readelf.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

SYSTEM_LIBRARY = re.compile(r"lib(c|m|stdc\+\+|gcc_s|pthread|dl|rt|gomp)\.so|ld-linux")
# Kernel entry points are looked up by name at run time; the names are strings in the library.
ENTRY_POINT = re.compile(rb"\0(aclnn[a-zA-Z]\w+)(?=\0)")
ATB_OPERATION = re.compile(r"_ZN3atb15CreateOperationIN.*5infer\d+([A-Za-z]+?)ParamE")


def run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def symbols(library: Path, kind: str) -> set[tuple[str, str]]:
    """(type letter, name) of the dynamic symbols; kind is --defined-only or --undefined-only."""
    lines = run("nm", "-D", kind, library).splitlines()
    return {(words[-2], words[-1]) for words in map(str.split, lines) if len(words) > 1}


def missing_symbols(mine: list[Path], others: list[Path]) -> list[str]:
    """What torch_npu takes from libraries that are not here."""
    libc = ctypes.CDLL(None)
    defined = {n.split("@")[0] for f in mine + others for _, n in symbols(f, "--defined-only")}
    undefined = {n for f in mine for t, n in symbols(f, "--undefined-only") if t == "U"}
    return sorted(
        n
        for n in undefined - defined
        if "@" not in n and not n.startswith(("Py", "_Py")) and not hasattr(libc, n)
    )


def missing_libraries(mine: list[Path], others: list[Path]) -> list[str]:
    """File names that torch_npu is linked against and that neither torch nor the system has."""
    needed = {n for f in mine for n in re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-d", f))}
    found = {f.name for f in mine + others}
    return sorted(n for n in needed - found if not SYSTEM_LIBRARY.match(n))


def stub_source(undefined: list[str], kernels: list[str]) -> str:
    """C text: every symbol weak and without effect, every kernel with a line in the trace."""
    lines = [
        "typedef void *P; void fake_kernel(const char *);",
        "int fake_operation(const char *, P *); int fake_context(P *);",
    ]
    for name in undefined:
        if operation := ATB_OPERATION.match(name):
            body = f'return fake_operation("atb{operation[1]}", out);'
            lines.append(f"int {name}(P parameter, P *out) {{ {body} }}")
        elif name.startswith("_ZN3atb13CreateContext"):
            lines.append(f"int {name}(P *out) {{ return fake_context(out); }}")
        else:
            lines.append(f"__attribute__((weak)) long {name}() {{ return 0; }}")
    for name in kernels:
        lines.append(f'int {name}GetWorkspaceSize() {{ fake_kernel("{name}"); return 0; }}')
        lines.append(f"int {name}() {{ return 0; }}")
    return "\n".join(lines) + "\n"


def compile_library(path: Path, *arguments: str | Path) -> None:
    command = ["gcc", "-w", "-O1", "-shared", "-fPIC", "-o", path, f"-Wl,-soname,{path.name}"]
    subprocess.run([*command, *arguments], check=True)


def build(out: Path, site: Path) -> None:
    """Write the libraries to `out` for the torch_npu below `site`."""
    import torch

    out.mkdir(parents=True, exist_ok=True)
    mine = sorted(site.glob("torch_npu/**/*.so"))
    others = sorted((Path(torch.__file__).parent / "lib").glob("*.so*"))
    names = {
        m.decode()
        for m in ENTRY_POINT.findall((site / "torch_npu/lib/libtorch_npu.so").read_bytes())
    }
    kernels = sorted(n for n in names if n + "GetWorkspaceSize" in names)
    undefined = [n for n in names if n.endswith("GetMaxWorkspaceSize")]  # asked for by captures
    source = out / "stubs.c"
    source.write_text(
        stub_source(missing_symbols(mine, others) + undefined, kernels), encoding="ascii"
    )
    main = out / "libascendcl.so"
    compile_library(main, source, Path(__file__).with_name("runtime.c"))
    # The others are empty and find their symbols through the first.
    extra = {"libopapi.so", "libnnopbase.so"}  # opened at run time
    for name in {*missing_libraries(mine, others), *extra} - {main.name}:
        flags = ("-Wl,--no-as-needed", f"-L{out}", "-l:libascendcl.so")
        compile_library(out / name, "-x", "c", os.devnull, *flags)


if __name__ == "__main__":
    build(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
