# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels compiled to machine code for GPUs that need not be there.

Run by test_cuda.py in a process of its own, with triton on the path. It shows that the compiler
takes them, and that a tile fits the registers and the shared memory; not what they compute.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gptneox.devices.cuda import kernels as cuda_kernels

NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
MAX_SHARED_BYTES = 99 << 10  # compute capability 8.6 and 8.9 have the least
INTEGERS = (
    *("qkv_stride", "table_stride", "num_splits", "first_sequence"),
    *("x_stride", "num_rows"),
)
HEADS, BLOCK = 64, 128


def pointer(name, dtype, *, split, scaled):
    if name in ("positions", "slots"):
        return "*i64"
    if name in ("tables", "context_lens", "cu_seqlens"):
        return "*i32"
    if name == "weight" or (scaled and name in ("k_cache", "v_cache")):
        return "*i8"
    if scaled and name in ("k_scale", "v_scale"):
        return "*fp32"
    if name == "zeros":
        return "*u8"
    if name in ("cos", "sin", "stats", "parts", "scales") or (name == "out" and split):
        return "*fp32"
    return "*" + NAMES[dtype]


def compiled(kernel, dtype, constants, capability, **options):
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in INTEGERS:
            signature[name] = "i32"
        elif name == "scale":
            signature[name] = "fp32"
        elif name == "weight" and "zeros" in kernel.arg_names:  # of four bits
            signature[name] = "*u8"
        else:
            split, scaled = (constants.get(key, False) for key in ("SPLIT", "SCALED"))
            signature[name] = pointer(name, dtype, split=split, scaled=scaled)
    aligned = [["tt.divisibility", 16]]
    attributes = {(i,): aligned for i, t in enumerate(signature.values()) if t.startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def stack_bytes(cubin, folder):
    """What did not fit the registers; None when triton's tool is not there to tell."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return None
    (folder / "cubin").write_bytes(cubin)
    done = subprocess.run(
        [tool, "-res-usage", folder / "cubin"], capture_output=True, text=True, check=True
    )
    return max(map(int, re.findall(r"STACK:(\d+)", done.stdout)))


ROWS = [
    pytest.param(80, torch.float16, 96),
    pytest.param(90, torch.bfloat16, 256),
    *(
        pytest.param(capability, dtype, head_dim, marks=pytest.mark.slow)
        for capability in (80, 86, 90, 100, 120)
        for dtype in NAMES
        for head_dim in (16, 32, 64, 80, 128, 256)
    ),
]


@pytest.mark.parametrize(("capability", "dtype", "head_dim"), ROWS)
def test_compiles(capability, dtype, head_dim, tmp_path):
    block_d = triton.next_power_of_2(head_dim)
    shape = {"H": HEADS, "D": head_dim}
    decode = shape | {"P": BLOCK} | cuda_kernels.decode_tile(head_dim)
    tile = cuda_kernels.prefill_tile(head_dim, dtype)
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    rotate = shape | {"HALF": head_dim // 8, "BLOCK_H": 4, "BLOCK_D": block_d}
    join = {"D": head_dim, "BLOCK_S": cuda_kernels.MAX_SPLITS, "BLOCK_D": block_d}
    prefill = shape | {"P": BLOCK, "PRECISION": "ieee"} | tile
    scaled = [
        (kernel, constants | {"SCALED": is_scaled}, extra)
        for is_scaled in (False, True)
        for kernel, constants, extra in (
            (cuda_kernels._rotate_and_store, rotate, {}),
            (cuda_kernels._decode, decode | {"SPLIT": False}, {}),
            (cuda_kernels._decode, decode | {"SPLIT": True}, {}),
            (cuda_kernels._prefill, prefill, options),
        )
    ]
    for kernel, constants, extra in [*scaled, (cuda_kernels._join_splits, join, {})]:
        result = compiled(kernel, dtype, constants, capability, **extra)
        assert result.metadata.shared <= MAX_SHARED_BYTES
        assert (stack_bytes(result.asm["cubin"], tmp_path) or 0) <= 64


@pytest.mark.parametrize(("capability", "dtype", "head_dim"), ROWS)
def test_products_of_int8_weights_compile(capability, dtype, head_dim, tmp_path):
    shape = {"F": 3 * HEADS * head_dim, "K": HEADS * head_dim, "PRECISION": "ieee"}
    for rows, has_bias in ((1, True), (512, False)):
        tile = cuda_kernels.int8_tile(rows, dtype)
        options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
        constants = shape | tile | {"HAS_BIAS": has_bias}
        int4 = {"BLOCK_K": cuda_kernels.int4_block(HEADS * head_dim, 1), "G": 1}
        for kernel, others in ((cuda_kernels._linear_int8, {}), (cuda_kernels._linear_int4, int4)):
            result = compiled(kernel, dtype, constants | others, capability, **options)
            assert result.metadata.shared <= MAX_SHARED_BYTES
            assert (stack_bytes(result.asm["cubin"], tmp_path) or 0) <= 64
