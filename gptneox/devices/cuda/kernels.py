# SPDX-License-Identifier: Apache-2.0
"""Paged attention as Triton kernels: rotate and store, decode, prefill; products of int8 weights.

Shapes as in `base`: T tokens, B sequences, H heads, D head_dim, R rotary dims, N blocks,
P block_size. Tiles are powers of two; what lies beyond D, H or a context is masked, never read.
Scores, softmax and sums are fp32. Scores are scaled as fp32 sums, so that fp16 ones cannot
overflow and the query is not rounded once more. Where TRITON_INTERPRET is 1 the same code runs on
CPU tensors.

An int8 cache (SCALED) has a scale for each token and head. Keys are exact in every dtype, so that
their scale is applied to the score; values are scaled before they are multiplied, because a small
scale times a small probability would not be a normal fp16 number.

Importing this module needs triton, which comes with torch's CUDA builds for Linux.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptneox.devices.cache import Int8Cache, LayerCache
from gptneox.devices.step import ForwardBatch

LOG2_E = 1.4426950408889634
MAX_SPLITS = 16


@triton.jit
def _quantize(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """By the formulas of `quantize` in cache.py: x [rows, BLOCK_D] to int8 values and [rows]."""
    wide = x.to(tl.float32)
    scale = tl.max(tl.abs(wide), 1) / 127.0
    smallest = 1.1754943508222875e-38
    scale = tl.where(scale < smallest, 1.0, scale)
    # A maximum may pass over a NaN; a sum of zeros and a NaN or an infinity is NaN.
    scale += tl.sum(wide * 0.0, 1)
    q = tl.div_rn(wide, tl.broadcast_to(scale[:, None], wide.shape))
    q = tl.where(tl.abs(q) <= 128.0, q, 0.0)
    magic = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, halves to even
    return ((q + magic) - magic).to(tl.int8), scale


@triton.jit
def _rotate_and_store(
    qkv: tl.tensor,  # [T, H, 3, D], rows `qkv_stride` apart
    q_out: tl.tensor,  # [T, H, D]
    k_cache: tl.tensor,  # [N * P, H, D]
    v_cache: tl.tensor,
    k_scale: tl.tensor,  # [N * P, H] fp32; not read or written unless SCALED
    v_scale: tl.tensor,
    positions: tl.tensor,  # [T] int64
    cos: tl.tensor,  # [max_positions, R / 2] fp32
    sin: tl.tensor,
    slots: tl.tensor,  # [T] int64; a negative one is not written
    qkv_stride: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,  # R / 2
    SCALED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (h < H) & (d < D)
    turned = d < 2 * HALF
    position = tl.load(positions + t)
    slot = tl.load(slots + t)
    angle = tl.where(d < HALF, d, d - HALF)
    c = tl.load(cos + position * HALF + angle, mask=turned, other=1.0)
    s = tl.load(sin + position * HALF + angle, mask=turned, other=0.0)
    s = tl.where(d < HALF, -s, s)
    partner = tl.where(d < HALF, d + HALF, d - HALF)

    row = qkv + t * qkv_stride + h * (3 * D)
    q = tl.load(row + d, mask=inside, other=0.0)
    other = tl.load(row + partner, mask=inside & turned, other=0.0)
    rotated = q.to(tl.float32) * c + other.to(tl.float32) * s
    q = tl.where(turned, rotated.to(q.dtype), q)
    tl.store(q_out + (t * H + h) * D + d, q, mask=inside)

    row += D
    k = tl.load(row + d, mask=inside, other=0.0)
    other = tl.load(row + partner, mask=inside & turned, other=0.0)
    rotated = k.to(tl.float32) * c + other.to(tl.float32) * s
    k = tl.where(turned, rotated.to(k.dtype), k)
    v = tl.load(row + D + d, mask=inside, other=0.0)
    target = (slot * H + h) * D + d
    written = inside & (slot >= 0)
    if SCALED:
        head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        has_slot = (head < H) & (slot >= 0)
        k, scale = _quantize(k)
        tl.store(k_scale + slot * H + head, scale, mask=has_slot)
        v, scale = _quantize(v)
        tl.store(v_scale + slot * H + head, scale, mask=has_slot)
    tl.store(k_cache + target, k, mask=written)
    tl.store(v_cache + target, v, mask=written)


@triton.jit(do_not_specialize=["table_stride", "num_splits"])
def _decode(
    q: tl.tensor,  # [B, H, D]
    k_cache: tl.tensor,  # [N * P, H, D]
    v_cache: tl.tensor,
    k_scale: tl.tensor,  # [N * P, H] fp32; not read unless SCALED
    v_scale: tl.tensor,
    out: tl.tensor,  # [B, H, D]; with SPLIT [B, H, num_splits, D] fp32, sums not yet divided
    stats: tl.tensor,  # with SPLIT [B, H, num_splits, 2] fp32: largest score and sum of weights
    tables: tl.tensor,  # [B, M] int32
    context_lens: tl.tensor,  # [B] int32; 0: a row of padding
    scale: tl.tensor,  # of the scores, times log2(e)
    table_stride: tl.tensor,
    num_splits: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    SPLIT: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    split = tl.program_id(2)
    context_len = tl.load(context_lens + b)
    share = tl.cdiv(tl.cdiv(context_len, num_splits), BLOCK_N) * BLOCK_N
    first = split * share
    end = tl.minimum(context_len, first + share)
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    query = tl.load(q + (b * H + h) * D + d, mask=d < D, other=0.0).to(tl.float32) * scale
    largest = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(first, end, BLOCK_N):
        position = start + n
        seen = position < end
        block = tl.load(tables + b * table_stride + position // P, mask=seen, other=0)
        row = (block.to(tl.int64) * P + position % P) * H + h
        where = row[:, None] * D + d[None, :]
        inside = seen[:, None] & (d < D)[None, :]
        k = tl.load(k_cache + where, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(v_cache + where, mask=inside, other=0.0).to(tl.float32)
        scores = tl.sum(k * query[None, :], 1)
        if SCALED:
            scores *= tl.load(k_scale + row, mask=seen, other=0.0)
        scores = tl.where(seen, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 0))
        weights = tl.exp2(scores - new_largest)
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(weights, 0)
        if SCALED:
            weights *= tl.load(v_scale + row, mask=seen, other=0.0)
        acc = acc * shrink + tl.sum(weights[:, None] * v, 0)
        largest = new_largest
    if SPLIT:
        part = (b * H + h) * num_splits + split
        tl.store(out + part * D + d, acc, mask=d < D)
        one = tl.arange(0, 1)
        tl.store(stats + part * 2 + one, largest)
        tl.store(stats + part * 2 + 1 + one, total)
    else:
        result = acc / tl.where(total > 0, total, 1.0)
        tl.store(out + (b * H + h) * D + d, result.to(out.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["num_splits"])
def _join_splits(
    parts: tl.tensor,  # [B * H, num_splits, D] fp32
    stats: tl.tensor,  # [B * H, num_splits, 2] fp32
    out: tl.tensor,  # [B * H, D]
    num_splits: tl.tensor,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    s = tl.arange(0, BLOCK_S)
    part = row * num_splits + s
    there = s < num_splits
    largest = tl.load(stats + part * 2, mask=there, other=float("-inf"))
    total = tl.load(stats + part * 2 + 1, mask=there, other=0.0)
    # A split that saw nothing has weight 0; a row without any context becomes 0.
    peak = tl.max(largest, 0)
    weights = tl.where(total > 0, tl.exp2(largest - peak), 0.0)
    whole = tl.sum(weights * total, 0)
    inside = there[:, None] & (d < D)[None, :]
    acc = tl.load(parts + part[:, None] * D + d[None, :], mask=inside, other=0.0)
    result = tl.sum(acc * weights[:, None], 0) / tl.where(whole > 0, whole, 1.0)
    tl.store(out + row * D + d, result.to(out.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["table_stride", "first_sequence"])
def _prefill(
    q: tl.tensor,  # [T, H, D]
    k_cache: tl.tensor,  # [N * P, H, D]
    v_cache: tl.tensor,
    k_scale: tl.tensor,  # [N * P, H] fp32; not read unless SCALED
    v_scale: tl.tensor,
    out: tl.tensor,  # [T, H, D]
    tables: tl.tensor,  # [B, M] int32
    cu_seqlens: tl.tensor,  # [B + 1] int32
    context_lens: tl.tensor,  # [B] int32
    scale: tl.tensor,  # of the scores, times log2(e)
    table_stride: tl.tensor,
    first_sequence: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    b = first_sequence + tl.program_id(2)
    h = tl.program_id(1)
    first_row = tl.program_id(0) * BLOCK_M
    q_start = tl.load(cu_seqlens + b)
    q_len = tl.load(cu_seqlens + b + 1) - q_start
    if first_row >= q_len:
        return
    context_len = tl.load(context_lens + b)
    cached_len = context_len - q_len
    m = first_row + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    q_at = ((q_start + m).to(tl.int64) * H + h)[:, None] * D + d[None, :]
    q_inside = (m < q_len)[:, None] & (d < D)[None, :]
    query = tl.load(q + q_at, mask=q_inside, other=0.0)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    table = tables + b.to(tl.int64) * table_stride
    end = tl.minimum(context_len, cached_len + first_row + BLOCK_M)
    # Every row sees position 0, so that the largest score is finite from the first block on.
    for start in range(0, end, BLOCK_N):
        position = start + n
        seen = position < end
        block = tl.load(table + position // P, mask=seen, other=0)
        row = (block.to(tl.int64) * P + position % P) * H + h
        where = row[:, None] * D + d[None, :]
        inside = seen[:, None] & (d < D)[None, :]
        k = tl.load(k_cache + where, mask=inside, other=0.0)
        v = tl.load(v_cache + where, mask=inside, other=0.0)
        if SCALED:
            k = k.to(tl.float32).to(query.dtype)
            wide = v.to(tl.float32) * tl.load(v_scale + row, mask=seen, other=0.0)[:, None]
            v = wide.to(query.dtype)
        scores = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale
        if SCALED:
            scores *= tl.load(k_scale + row, mask=seen, other=0.0)[None, :]
        visible = seen[None, :] & (position[None, :] <= (cached_len + m)[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        acc += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        largest = new_largest
    result = acc / total[:, None]
    tl.store(out + q_at, result.to(out.dtype.element_ty), mask=q_inside)


@triton.jit
def _linear_int8(
    x: tl.tensor,  # [T, K], rows `x_stride` apart
    weight: tl.tensor,  # [F, K] int8
    scales: tl.tensor,  # [F] fp32
    bias: tl.tensor,  # [F]
    out: tl.tensor,  # [T, F]
    num_rows: tl.tensor,  # T
    x_stride: tl.tensor,
    F: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Integers of eight bits are exact in every float type; the scale is applied to the sum."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    x_row = x + m.to(tl.int64)[:, None] * x_stride
    weight_row = weight + n.to(tl.int64)[:, None] * K
    for start in range(0, K, BLOCK_K):
        at = (start + k)[None, :]
        a = tl.load(x_row + at, mask=(m < num_rows)[:, None] & (at < K), other=0.0)
        w = tl.load(weight_row + at, mask=(n < F)[:, None] & (at < K), other=0)
        acc += tl.dot(a, tl.trans(w.to(tl.float32).to(a.dtype)), input_precision=PRECISION)
    y = acc * tl.load(scales + n, mask=n < F, other=0.0)[None, :]
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < F, other=0.0).to(tl.float32)[None, :]
    inside = (m < num_rows)[:, None] & (n < F)[None, :]
    at = m.to(tl.int64)[:, None] * F + n[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _linear_int4(
    x: tl.tensor,  # [T, K], rows `x_stride` apart
    weight: tl.tensor,  # [F, K / 2] uint8
    scales: tl.tensor,  # [F, G] fp32
    zeros: tl.tensor,  # [F, G] uint8
    bias: tl.tensor,  # [F]
    out: tl.tensor,  # [T, F]
    num_rows: tl.tensor,  # T
    x_stride: tl.tensor,
    F: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # bytes of the weight, which divide those of a group
    PRECISION: tl.constexpr,
) -> None:
    """Even and odd inputs are multiplied apart; a group's sum is that of integers, then scaled."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    x_row = x + m.to(tl.int64)[:, None] * x_stride
    weight_row = weight + n.to(tl.int64)[:, None] * (K // 2)
    inside_x, inside_w = (m < num_rows)[:, None], (n < F)[:, None]
    for start in range(0, K // 2, BLOCK_K):
        at = (start + k)[None, :]
        even = tl.load(x_row + 2 * at, mask=inside_x, other=0.0)
        odd = tl.load(x_row + 2 * at + 1, mask=inside_x, other=0.0)
        pairs = tl.load(weight_row + at, mask=inside_w, other=0)
        group = n * G + 2 * start // (K // G)
        zero = tl.load(zeros + group, mask=n < F, other=0).to(tl.float32)[:, None]
        low = ((pairs & 15).to(tl.float32) - zero).to(even.dtype)
        high = ((pairs >> 4).to(tl.float32) - zero).to(even.dtype)
        part = tl.dot(even, tl.trans(low), input_precision=PRECISION)
        part += tl.dot(odd, tl.trans(high), input_precision=PRECISION)
        acc += part * tl.load(scales + group, mask=n < F, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < F, other=0.0).to(tl.float32)[None, :]
    inside = (m < num_rows)[:, None] & (n < F)[None, :]
    at = m.to(tl.int64)[:, None] * F + n[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


def _pointers(layer: LayerCache) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """K, V and their scales; without scales K and V again, which the kernels do not touch."""
    if isinstance(layer, Int8Cache):
        return layer
    return layer.k, layer.v, layer.k, layer.v


def rotate_and_store(
    qkv: Tensor,
    rotary: tuple[Tensor, Tensor, Tensor],
    layer: LayerCache,
    slot_mapping: Tensor,
) -> Tensor:
    """Write rotated keys and values of qkv [T, H, 3, D] to the cache; returns the queries.

    Args:
        qkv: any distance between rows; [H, 3, D] of a row is contiguous.
        rotary: positions [T], cos and sin [max_positions, R / 2] fp32.
        layer: K and V [N, P, H, D], contiguous as their scales are.
        slot_mapping: [T]; nothing is written where it is negative.
    """
    num_tokens, num_heads, _, head_dim = qkv.shape
    positions, cos, sin = rotary
    assert qkv.stride()[1:] == (3 * head_dim, head_dim, 1), "qkv rows are contiguous"
    q = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    block_h = min(4, triton.next_power_of_2(num_heads))
    _rotate_and_store[(num_tokens, triton.cdiv(num_heads, block_h))](
        *(qkv, q, *_pointers(layer), positions, cos, sin, slot_mapping, qkv.stride(0)),
        H=num_heads,
        D=head_dim,
        HALF=cos.shape[-1],
        SCALED=isinstance(layer, Int8Cache),
        BLOCK_H=block_h,
        BLOCK_D=triton.next_power_of_2(head_dim),
    )
    return q


def num_splits(num_rows: int, num_heads: int, num_cores: int) -> int:
    """Programs that share one context: a power of two that gives every core two, or MAX_SPLITS.

    It depends on no context length, so that a captured step stays right while contexts grow.
    """
    per_core = triton.cdiv(2 * num_cores, num_rows * num_heads)
    return int(min(MAX_SPLITS, triton.next_power_of_2(per_core)))


def decode_tile(head_dim: int) -> dict[str, int]:
    """Tile of `_decode`: up to 8192 values of K at once."""
    block_d = triton.next_power_of_2(head_dim)
    return {"BLOCK_N": max(16, min(128, 8192 // block_d)), "BLOCK_D": block_d}


def decode(
    q: Tensor,
    layer: LayerCache,
    batch: ForwardBatch,
    out: Tensor,
    scale: float,
    splits: int,
) -> None:
    """Attention of the first B_decode rows of q [T, H, D] into those of `out`."""
    num_rows, (num_heads, head_dim) = batch.num_decodes, q.shape[1:]
    tile = decode_tile(head_dim)
    target, stats = out, out
    if splits > 1:
        shape = (num_rows, num_heads, splits)
        target = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
        stats = torch.empty((*shape, 2), dtype=torch.float32, device=q.device)
    tables = batch.block_tables
    _decode[(num_rows, num_heads, splits)](
        *(q, *_pointers(layer), target, stats, tables, batch.context_lens),
        *(scale * LOG2_E, tables.stride(0), splits),
        H=num_heads,
        D=head_dim,
        P=layer.k.shape[1],
        SPLIT=splits > 1,
        SCALED=isinstance(layer, Int8Cache),
        **tile,
    )
    if splits > 1:
        _join_splits[(num_rows * num_heads,)](
            *(target, stats, out, splits),
            D=head_dim,
            BLOCK_S=MAX_SPLITS,
            BLOCK_D=tile["BLOCK_D"],
        )


def prefill_tile(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile of `_prefill`: fits 64 KiB of shared memory, and the registers."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    warps = 4 if block_d < 256 else 8
    if dtype == torch.float32:
        rows, keys = (32, 32) if block_d < 128 else (16, 16)
    else:
        rows, keys = 64, 64 if block_d < 128 else 32
    return {
        "BLOCK_M": rows,
        "BLOCK_N": keys,
        "BLOCK_D": block_d,
        "num_warps": warps,
        "num_stages": 2 if block_d < 256 and dtype != torch.float32 else 1,
    }


def prefill(
    q: Tensor,
    layer: LayerCache,
    batch: ForwardBatch,
    out: Tensor,
    scale: float,
) -> None:
    """Causal attention of the prompt chunks, rows of q [T, H, D], into those of `out`."""
    first, (num_heads, head_dim) = batch.num_decodes, q.shape[1:]
    tile = prefill_tile(head_dim, q.dtype)
    longest = max(batch.q_lens_list[first:])
    num_sequences = len(batch.q_lens_list) - first
    tables = batch.block_tables
    _prefill[(triton.cdiv(longest, tile["BLOCK_M"]), num_heads, num_sequences)](
        *(q, *_pointers(layer), out, tables, batch.cu_seqlens_q, batch.context_lens),
        *(scale * LOG2_E, tables.stride(0), first),
        H=num_heads,
        D=head_dim,
        P=layer.k.shape[1],
        PRECISION="ieee",  # fp32 products are not rounded to tf32
        SCALED=isinstance(layer, Int8Cache),
        **tile,
    )


def int8_tile(num_rows: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile of `_linear_int8`: few rows read much of K at once, many rows share what was read."""
    if num_rows <= 16:
        sizes, stages = (16, 32, 128), 4
    elif dtype == torch.float32:
        sizes, stages = (32, 32, 32), 2
    else:
        sizes, stages = (64, 64, 64), 3
    tile = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), sizes, strict=True))
    return tile | {"num_warps": 4, "num_stages": stages}


def linear_int8(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, K] times the weight scales[f] * weight[f, k], int8 [F, K]; returns [T, F].

    Args:
        x: any distance between rows.
        weight: contiguous.
        scales: fp32 [F].
        bias: [F].
    """
    (num_rows, depth), num_features = x.shape, weight.shape[0]
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty((num_rows, num_features), dtype=x.dtype, device=x.device)
    tile = int8_tile(num_rows, x.dtype)
    grid = (triton.cdiv(num_features, tile["BLOCK_N"]), triton.cdiv(num_rows, tile["BLOCK_M"]))
    _linear_int8[grid](
        *(x, weight, scales, scales if bias is None else bias, out, num_rows, x.stride(0)),
        F=num_features,
        K=depth,
        HAS_BIAS=bias is not None,
        PRECISION="ieee",
        **tile,
    )
    return out


def int4_block(depth: int, num_groups: int) -> int:
    """Bytes of a row that `_linear_int4` reads at once: a power of two that divides a group's."""
    size = depth // num_groups // 2
    return min(64, size & -size)


def linear_int4(
    x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None
) -> Tensor:
    """x [T, K] times a weight of four bits; returns [T, F].

    Args:
        x: any distance between rows.
        weight: uint8 [F, K / 2], contiguous; see `Operators.pack_int4`.
        scales: fp32 [F, G], contiguous.
        zeros: uint8 [F, G], contiguous. `int4_block` is at least 16.
        bias: [F].
    """
    (num_rows, depth), (num_features, num_groups) = x.shape, scales.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty((num_rows, num_features), dtype=x.dtype, device=x.device)
    tile = int8_tile(num_rows, x.dtype) | {"BLOCK_K": int4_block(depth, num_groups)}
    grid = (triton.cdiv(num_features, tile["BLOCK_N"]), triton.cdiv(num_rows, tile["BLOCK_M"]))
    _linear_int4[grid](
        *(x, weight, scales, zeros, scales if bias is None else bias, out, num_rows, x.stride(0)),
        F=num_features,
        K=depth,
        G=num_groups,
        HAS_BIAS=bias is not None,
        PRECISION="ieee",
        **tile,
    )
    return out
