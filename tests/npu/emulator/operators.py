# SPDX-License-Identifier: Apache-2.0
"""What the operators of torch_npu compute, in plain torch, and what the devices refuse.

Each function takes `given`, the arguments as the caller passed them (npu tensors among them), and
the same arguments on the host. A limit that only the device itself would report is a `DeviceLimit`.
Sources of the limits: the tiling and shape checks of CANN's public operator repositories
(ops-transformer, ops-nn, ascend-transformer-boost) and op-plugin's API documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NZ = 29  # the number of the FRACTAL_NZ storage format
NO_LIMIT = 2**31 - 1
Given = dict[str, Any]
# torch's numbers of types, as operators get them.
SCALAR_TYPES: dict[Any, torch.dtype] = {5: torch.float16, 12: torch.qint8, 15: torch.bfloat16}
REFERENCES: dict[str, Callable[..., Any]] = {}


class DeviceLimit(RuntimeError):
    """The real device would refuse this call, or compute something else."""


def need(condition: bool, message: str) -> None:
    if not condition:
        raise DeviceLimit(message)


def reference(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        REFERENCES[name] = function
        return function

    return register


def is_310p() -> bool:
    return "310P" in torch.npu.get_device_name(0)


def on_device(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.device.type == "npu"


def storage_format(tensor: Tensor) -> int:
    import torch_npu

    return int(torch_npu.get_npu_format(tensor))


def check_floats(given: Given, *names: str) -> None:
    """Half precision everywhere; bf16 exists on A2 only; what a kernel reads is contiguous."""
    allowed = (torch.float16,) if is_310p() else (torch.float16, torch.bfloat16)
    dtypes = {given[n].dtype for n in names}
    need(len(dtypes) == 1, f"{', '.join(names)} have different dtypes: {dtypes}")
    need(dtypes <= set(allowed), f"dtype {dtypes} is not supported on this device")
    for name in names:
        need(given[name].is_contiguous(), f"{name} must be contiguous")


# -- attention -----------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None) -> Tensor:
    """q [S, N, D], k and v [L, N, D], visible bool [S, L]."""
    scores = torch.einsum("snd,lnd->nsl", q.float(), k.float()) * scale
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    probs = torch.nan_to_num(scores.softmax(-1))
    return torch.einsum("nsl,lnd->snd", probs, v.float()).to(q.dtype)


def causal(num_queries: int, num_keys: int) -> Tensor:
    """The last query sees every key."""
    ones = torch.ones(num_queries, num_keys, dtype=torch.bool)
    return ones.tril(num_keys - num_queries)


def cached_rows(cache: Tensor, table: Tensor, length: int, num_heads: int) -> Tensor:
    """The first `length` rows of a sequence, [length, N, D], from a cache in one of three forms.

    [blocks, P, N * D]; [blocks, P, N, D]; NZ [blocks, N * D / 16, P, 16].
    """
    block_size = cache.shape[2] if is_nz(cache) else cache.shape[1]
    blocks = cache[table[: -(-length // block_size)].long()]
    if is_nz(cache):
        blocks = blocks.transpose(1, 2)
    return blocks.reshape(blocks.shape[0] * block_size, num_heads, -1)[:length]


def is_nz(cache: Tensor) -> bool:
    return cache.dim() == 4 and is_310p()


def per_row(lengths: Sequence[int] | None, default: int, rows: int) -> list[int]:
    values = list(lengths) if lengths else [default]
    return values * rows if len(values) == 1 else values


def split_heads(x: Tensor, layout: str, num_heads: int) -> Tensor:
    """[B, S, N, D] of a BSH, BSND or BNSD tensor, as a view."""
    if layout == "BSH":
        return x.view(*x.shape[:2], num_heads, -1)
    return x if layout == "BSND" else x.transpose(1, 2)


def mask_of_row(mask: Tensor | None, row: int, s: int, length: int) -> Tensor | None:
    """Visible keys of batch row `row` from a mask (True: hidden) of [S, L] or [B, 1, S, L]."""
    if mask is None:
        return None
    masks = mask.reshape(-1, *mask.shape[-2:])
    return ~masks[min(row, len(masks) - 1), :s, :length].bool()


def check_antiquant(given: Given, rows: int, s: int, num_heads: int, head_dim: int) -> None:
    """Int8 keys and values with a scale for each token and head."""
    check_floats(given, "query")
    for name in ("key", "value"):
        need(given[name].dtype == torch.int8 and given[name].is_contiguous(), f"{name}: int8")
    need(head_dim % 32 == 0, f"int8 keys: head dim {head_dim} is no multiple of 32")
    is_paged = given.get("block_table") is not None
    need(s == 1, "int8 keys of this mode: one query per row")
    expected = 5 if is_paged else 3
    for name in ("key", "value"):
        mode, scale = given.get(f"{name}_antiquant_mode", 0), given[f"{name}_antiquant_scale"]
        need(mode == expected, f"{name}_antiquant_mode {mode}: {expected} is the one for this")
        need(scale.dtype == torch.float32, f"{name}_antiquant_scale: fp32")
        need(on_device(scale) and scale.is_contiguous(), f"{name}_antiquant_scale: contiguous")
        blocks, size = given[name].shape[:2]
        need(tuple(scale.shape) == (blocks, num_heads, size), f"{name}_antiquant_scale: [N, H, P]")
    if is_paged:
        need(given["block_size"] % 32 == 0, "int8 pages: block_size is no multiple of 32")


def dequantized(x: Tensor, scale: Tensor, num_heads: int) -> Tensor:
    """x [N, P, H * D] int8, scale [N, H, P]: fp32 [N, P, H * D]."""
    heads = x.float().unflatten(-1, (num_heads, -1))
    return (heads * scale.transpose(1, 2).unsqueeze(-1)).flatten(2)


def check_fia(given: Given, layout: str, head_dim: int) -> None:
    need(not is_310p(), "FusedInferAttentionScore is not built for Ascend310P")
    if given.get("key_antiquant_scale") is None:
        check_floats(given, "query", "key", "value")
    need(
        layout != "TND" or head_dim in (64, 128, 192),
        f"FusedInferAttentionScore TND: queryD({head_dim}) must be 192, 128 or 64",
    )
    need(layout in ("BSH", "BSND", "BNSD"), f"layout {layout} is not emulated")
    need(head_dim % 16 == 0 and head_dim <= 512, f"head dim {head_dim}: % 16, at most 512")
    mask, mode = given.get("atten_mask"), given.get("sparse_mode", 0)
    if mask is not None:
        need(mask.dtype == torch.bool and mask.is_contiguous(), "mask: bool, contiguous")
    if mode in (2, 3, 4):
        need(mask is not None, "sparse_mode 2, 3, 4 need a mask")
        need(tuple(mask.shape[-2:]) == (2048, 2048), "sparse_mode 2, 3, 4 take a 2048x2048 mask")


def check_fia_paged(given: Given, s: int, rows: int) -> None:
    table, size = given["block_table"], given.get("block_size", 0)
    lengths = given.get("actual_seq_lengths_kv")
    need(lengths is not None and len(lengths) == rows, "paged: one key length per row")
    need(table.dtype == torch.int32 and table.shape[0] == rows, "block_table: int32, one per row")
    need(table.is_contiguous() and on_device(table), "block_table: contiguous, on the device")
    need(given["key"].dim() == 3, "paged BSH/BSND: the cache has shape (blocks, block_size, H)")
    need(size == given["key"].shape[1], "block_size is not the cache's")
    unit = 128 if s > 1 else 16
    need(
        size % unit == 0 and 0 < size <= 512,
        f"paged, S {s}: block_size {size} must be a multiple of {unit}, at most 512",
    )
    need(given["key"].shape[-1] <= 65535, "paged: N * D above 65535")
    longest = max(lengths)
    need(table.shape[1] * size >= longest, "block_table is shorter than the longest sequence")


@reference("npu::npu_fused_infer_attention_score")
def fused_infer_attention_score(
    given: Given,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    block_table: Tensor | None = None,
    key_antiquant_scale: Tensor | None = None,
    value_antiquant_scale: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    block_size: int = 0,
    key_antiquant_mode: int = 0,
    value_antiquant_mode: int = 0,
    workspace: Tensor | None = None,
    out: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    head_dim = query.shape[-1] // (num_heads if input_layout == "BSH" else 1)
    check_fia(given, input_layout, head_dim)
    q = split_heads(query, input_layout, num_heads)
    rows, s = q.shape[:2]
    if key_antiquant_scale is not None:
        need(value_antiquant_scale is not None, "scales of keys and values come together")
        check_antiquant(given, rows, s, num_heads, head_dim)
        key = dequantized(key, key_antiquant_scale, num_heads)
        value = dequantized(value, value_antiquant_scale, num_heads)
    if block_table is not None:
        check_fia_paged(given, s, rows)
    else:
        k_rows, v_rows = (split_heads(x, input_layout, num_heads) for x in (key, value))
        if atten_mask is not None and sparse_mode == 0:
            need(atten_mask.shape[-1] == k_rows.shape[1], "mask and keys differ in length")
        actual_seq_lengths_kv = per_row(actual_seq_lengths_kv, k_rows.shape[1], rows)
    q_lens = per_row(actual_seq_lengths, s, rows) if s > 1 else [1] * rows
    result = torch.zeros_like(query) if out is None else out[0].zero_()
    out_rows = split_heads(result, input_layout, num_heads)
    for b, (n, length) in enumerate(zip(q_lens, actual_seq_lengths_kv or [], strict=True)):
        if block_table is not None:
            k, v = (cached_rows(c, block_table[b], length, num_heads) for c in (key, value))
        else:
            k, v = k_rows[b, :length], v_rows[b, :length]
        if sparse_mode == 3 and s > 1:  # the kernel for S = 1 knows no sparse modes
            visible: Tensor | None = causal(n, length)
        elif sparse_mode in (0, 1):
            visible = mask_of_row(atten_mask, b, n, length)
        else:
            need(s == 1, f"sparse_mode {sparse_mode} is not emulated")
            visible = None
        out_rows[b, :n] = attend(q[b, :n], k, v, scale, visible)
    return result, None if out is None else out[1]  # no statistics are asked for


@reference("npu::npu_incre_flash_attention")
def incre_flash_attention(
    given: Given,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    actual_seq_lengths: Sequence[int] | None = None,
    block_table: Tensor | None = None,
    num_heads: int = 1,
    scale_value: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    block_size: int = 0,
) -> Tensor:
    check_floats(given, "query", "key", "value")
    rows, s = query.shape[:2]
    head_dim = query.shape[-1] // num_heads
    need(input_layout == "BSH" and s == 1, "emulated: BSH with one query per row")
    need(head_dim % 16 == 0 and head_dim <= 512, f"head dim {head_dim}: % 16, at most 512")
    need(rows <= 256, f"{rows} rows, at most 256")
    if block_table is not None:
        need(key.dim() == 3 and key.shape[1] == block_size, "cache: (blocks, block_size, H)")
        need(block_size % 16 == 0 and block_size <= 512, f"block_size {block_size}: % 16, <= 512")
        need(block_table.dtype == torch.int32, "block_table: int32")
        need(len(actual_seq_lengths or []) == rows, "paged: one key length per row")
    out = torch.empty_like(query)
    lengths = per_row(actual_seq_lengths, key.shape[1], rows)
    for b, length in enumerate(lengths):
        if block_table is not None:
            k, v = (cached_rows(c, block_table[b], length, num_heads) for c in (key, value))
        else:
            k, v = (x[b, :length].view(length, num_heads, head_dim) for x in (key, value))
        q = query[b].view(1, num_heads, head_dim)
        out[b] = attend(q, k, v, scale_value, None).reshape(1, -1)
    return out


@reference("npu::npu_prompt_flash_attention")
def prompt_flash_attention(
    given: Given,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    num_heads: int = 1,
    scale_value: float = 1.0,
    next_tokens: int = 0,
    pre_tokens: int = NO_LIMIT,
    input_layout: str = "BSH",
) -> Tensor:
    """As the 310P has it: no lengths, no sparse modes."""
    check_floats(given, "query", "key", "value")
    rows, s = query.shape[:2]
    head_dim = query.shape[-1] // num_heads
    need(input_layout == "BSH" and rows <= 128, "emulated: BSH; at most 128 rows")
    need(head_dim % 16 == 0 and head_dim <= 512, f"head dim {head_dim}: % 16, at most 512")
    need(key.shape == query.shape, "the rows of q and k have equal lengths")
    if atten_mask is not None:
        need(atten_mask.dtype == torch.bool, "mask: bool")
        need(tuple(atten_mask.shape) == (s, s), f"mask: ({s}, {s})")
    relative = torch.arange(s)[None] - torch.arange(s)[:, None]
    band = (relative <= next_tokens) & (relative >= -pre_tokens)
    out = torch.empty_like(query)
    for b in range(rows):
        q, k, v = (x[b].view(s, num_heads, head_dim) for x in (query, key, value))
        visible = mask_of_row(atten_mask, 0, s, s)
        visible = band if visible is None else visible & band
        out[b] = attend(q, k, v, scale_value, visible).reshape(s, -1)
    return out


# -- ATB -----------------------------------------------------------------------------------------


def check_host_lengths(given: Given, name: str) -> None:
    tensor = given[name]
    need(
        tensor.device.type == "cpu" and tensor.dtype == torch.int32,
        f"ATB: {name} must be an int32 tensor on the CPU (hostData)",
    )


def check_cache(given: Given, num_heads: int, head_dim: int) -> None:
    for name in ("key_cache", "value_cache"):
        cache = given[name]
        if is_310p():
            nz_shape = (num_heads * head_dim // 16, 16)
            need(storage_format(cache) == NZ, f"310P: {name} must be made in NZ format")
            need((cache.shape[1], cache.shape[3]) == nz_shape, f"310P: {name} [N, HD/16, P, 16]")
            need(cache.shape[2] % 16 == 0, "310P: block_size % 16")
            need(head_dim % 16 == 0 and head_dim <= 256, "310P: head dim % 16, at most 256")
            area = cache.shape[2] * head_dim
            need(area <= 16384, f"310P: block_size * head dim is {area}, at most 16384")
        else:
            need(cache.shape[2:] == (num_heads, head_dim), f"{name}: [blocks, P, N, D]")


def dense_mask(mask: Tensor) -> Tensor:
    """[S, L] of an additive mask stored as NZ blocks [1, L / 16, S, 16], or of a plain one."""
    if mask.dim() == 4 and mask.shape[0] == 1 and mask.shape[-1] == 16:
        return mask[0].transpose(0, 1).reshape(mask.shape[2], -1)
    return mask


def check_mask(given: Given, mask: Tensor) -> None:
    need(mask.dtype == torch.float16, "ATB mask: additive, fp16")
    if is_310p():
        is_nz_mask = storage_format(given["mask"]) == NZ and mask.dim() == 4
        need(is_nz_mask, "310P: the mask must be NZ")
        # The chip saturates: an infinity in the mask would not stay one.
        need(bool(torch.isfinite(mask).all()), "310P: the mask must be finite")


@reference("atb::_npu_flash_attention")
def atb_flash_attention(
    given: Given,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    seq_len: Tensor,
    scale_value: float,
    num_heads: int,
    num_kv_heads: int,
    out: Tensor,
) -> None:
    check_floats(given, "query", "key", "value", "out")
    check_host_lengths(given, "seq_len")
    check_mask(given, mask)
    need(query.dim() == 3 and query.shape[2] <= 256, "[T, N, D] with D at most 256")
    if is_310p():
        need(query.shape[2] % 16 == 0, "310P: head dim % 16")
        need(query.shape[0] % 16 == 0, "310P: the sum of tokens must be a multiple of 16")
    lengths = seq_len.tolist()
    need(sum(lengths) == query.shape[0], "seq_len does not add up to the tokens")
    hidden = dense_mask(mask)
    need(hidden.shape[1] >= max(lengths), "the mask is smaller than the longest sequence")
    start = 0
    for n in lengths:
        q, k, v = (x[start : start + n] for x in (query, key, value))
        out[start : start + n] = attend(q, k, v, scale_value, hidden[:n, :n] > -1000)
        start += n


@reference("atb::_npu_paged_attention_splitfuse")
def atb_splitfuse(
    given: Given,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    mask: Tensor,
    seq_len: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    out: Tensor,
) -> None:
    """Query i of a sequence reads row i of the mask's rows for that sequence."""
    check_floats(given, "query", "out")
    check_host_lengths(given, "seq_len")
    check_paged(given, num_heads, query.shape[2])
    check_mask(given, mask)
    rows = dense_mask(mask)
    need(rows.shape[0] >= query.shape[0], "splitfuse: one mask row per token")
    start = 0
    for b, (n, length) in enumerate(zip(seq_len.tolist(), context_lens.tolist(), strict=True)):
        need(rows.shape[1] >= length, "splitfuse: the mask is narrower than the context")
        k, v = (cached_rows(c, block_table[b], length, num_heads) for c in (key_cache, value_cache))
        visible = rows[start : start + n, :length] > -1000
        out[start : start + n] = attend(query[start : start + n], k, v, scale_value, visible)
        start += n
    need(start == query.shape[0], "seq_len does not add up to the tokens")


def check_paged(given: Given, num_heads: int, head_dim: int) -> None:
    check_cache(given, num_heads, head_dim)
    table, lengths = given["block_table"], given["context_lens"]
    need(table.dtype == lengths.dtype == torch.int32, "ATB: int32 block table and lengths")
    need(on_device(table) and table.is_contiguous(), "ATB: contiguous block table on the device")
    if is_310p():
        need(on_device(lengths), "310P: context_lens must be on the device")
    else:
        need(lengths.device.type == "cpu", "A2: context_lens must be on the CPU (hostData)")


@reference("atb::_npu_paged_attention")
def atb_paged_attention(
    given: Given,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: Tensor,
    context_lens: Tensor,
    out: Tensor,
) -> None:
    check_floats(given, "query", "out")
    check_paged(given, num_heads, query.shape[2])
    need(len(block_table) == len(context_lens) == len(query), "one query per sequence")
    for b, length in enumerate(context_lens.tolist()):
        k, v = (cached_rows(c, block_table[b], length, num_heads) for c in (key_cache, value_cache))
        out[b : b + 1] = attend(query[b : b + 1], k, v, scale_value, None)


def write_rows(x: Tensor, cache: Tensor, slots: Tensor) -> None:
    block_size = cache.shape[2] if is_nz(cache) else cache.shape[1]
    for row, slot in zip(x, slots.tolist(), strict=True):
        block, offset = divmod(slot, block_size)
        if slot < 0:
            continue
        if is_nz(cache):
            cache[block, :, offset] = row.reshape(-1, 16)
        else:
            cache[block, offset] = row


@reference("atb::_npu_reshape_and_cache")
def atb_reshape_and_cache(
    given: Given,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_indices: Tensor,
) -> None:
    check_floats(given, "key", "value")
    check_cache(given, *key.shape[1:])
    need(slot_indices.dtype == torch.int32, "ATB ReshapeAndCache: int32 slots")
    need(on_device(given["slot_indices"]), "ATB ReshapeAndCache: slots on the device")
    write_rows(key, key_cache, slot_indices)
    write_rows(value, value_cache, slot_indices)


# -- cache writes without ATB --------------------------------------------------------------------


@reference("npu::npu_scatter_pa_kv_cache")
def scatter_pa_kv_cache(
    given: Given,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    cache_mode: str = "PA_NZ",
) -> None:
    need(not is_310p(), "npu_scatter_pa_kv_cache: Atlas A2 and A3 only")
    names = ("key", "value", "key_cache", "value_cache")
    if key.dtype == torch.int8:
        need(all(given[n].dtype == torch.int8 for n in names), "int8 goes to an int8 cache")
        need(all(given[n].is_contiguous() for n in names), "int8: contiguous")
    else:
        check_floats(given, *names)
    need(
        cache_mode == "Norm",
        f"npu_scatter_pa_kv_cache: cache_mode {cache_mode} takes an NZ cache; an ND one needs Norm",
    )
    need(key_cache.shape[2:] == key.shape[1:], "cache: (blocks, block_size, N, D)")
    need(slot_mapping.dtype in (torch.int32, torch.int64), "slots: int32 or int64")
    need(len(set(slot_mapping.tolist())) == len(slot_mapping), "slots must be unique")
    need(bool((slot_mapping >= 0).all()), "slots must not be negative")
    write_rows(key, key_cache, slot_mapping)
    write_rows(value, value_cache, slot_mapping)


@reference("npu::npu_scatter_nd_update_")
def scatter_nd_update_(given: Given, input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:  # noqa: A002
    if input.dtype == torch.float32:
        need(not is_310p(), "npu_scatter_nd_update_ in fp32: Atlas A2 and A3 only")
        need(updates.dtype == torch.float32, "input and updates have one dtype")
        need(all(given[n].is_contiguous() for n in ("input", "updates")), "fp32: contiguous")
    else:
        check_floats(given, "input", "updates")
    need(indices.dtype in (torch.int32, torch.int64), "indices: int32 or int64")
    input[tuple(indices.long().unbind(-1))] = updates
    return input


# -- everything else -----------------------------------------------------------------------------


@reference("npu::npu_rotary_mul")
def rotary_mul(
    given: Given,
    input: Tensor,  # noqa: A002
    r1: Tensor,
    r2: Tensor,
    rotary_mode: str = "half",
) -> Tensor:
    d = input.shape[-1]
    need(rotary_mode == "half" and d % 2 == 0 and d < 896, "half mode, D even and below 896")
    need(input.dim() == 4 and input.shape[0] < 1000 and input.shape[2] < 1000, "BSND, B, N < 1000")
    need(input.dtype == r1.dtype == r2.dtype, "x, cos and sin have one dtype")
    need(r1.shape == r2.shape == (1, input.shape[1], 1, d), "cos and sin: (1, S, 1, D)")
    for name in ("input", "r1", "r2"):
        need(given[name].is_contiguous(), f"{name} must be contiguous")
    first, second = input.float().chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return (input.float() * r1.float() + turned * r2.float()).to(input.dtype)


@reference("npu::npu_dynamic_quant")
def dynamic_quant(given: Given, input: Tensor) -> tuple[Tensor, Tensor]:  # noqa: A002
    """One scale per row, max|x| / 127. What a row of zeros becomes is not documented: its scale of
    0 hides whatever stands there, which is planted here."""
    need(not is_310p(), "npu_dynamic_quant: Atlas A2 and A3 only")
    need(given["input"].dtype in (torch.float16, torch.bfloat16), "input: half precision")
    wide = input.float()
    scale = wide.abs().amax(-1) / 127
    values = torch.nan_to_num((wide / scale.unsqueeze(-1)).round(), 77.0, 77.0, 77.0)
    return values.to(torch.int8), scale


@reference("npu::npu_weight_quant_batchmatmul")
def weight_quant_batchmatmul(
    given: Given,
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> Tensor:
    """Weights [K, N] of eight bits with a scale for each column, or of four bits in groups of K."""
    check_floats(given, "x", "antiquant_scale")
    need(quant_scale is None, "emulated: float output")
    need(inner_precise == 0, "emulated: high precision")
    need(storage_format(given["weight"]) == 2, "weight: ND; NZ is for graph mode")
    k = weight.shape[0]
    if weight.dtype == torch.int32:
        need(not is_310p(), "weight: int8 on a 310P")
        need(given["weight"].is_contiguous(), "emulated: four bits as [K, N / 8]")
        weight = unpack_int4(weight)
        need(antiquant_offset is not None, "emulated: four bits with an offset")
    else:
        need(weight.dtype == torch.int8, "weight: int8, or int32 with eight of four bits")
        need(given["weight"].t().is_contiguous(), "weight: a transposed view of contiguous [N, K]")
        need(antiquant_offset is None, "emulated: eight bits symmetric")
    n = weight.shape[1]
    need(max(k, n) <= 65535, "K and N are at most 65535")
    need(x.shape == (x.shape[0], k), "x [M, K]")
    normal = antiquant_scale == 0
    normal |= antiquant_scale >= torch.finfo(antiquant_scale.dtype).tiny
    need(bool(normal.all()), "subnormal scales may be flushed to zero")
    if bias is not None:
        wide = torch.float32 if x.dtype == torch.bfloat16 else torch.float16
        need(bias.dtype == wide and bias.shape == (n,), f"bias: {wide} [N]")
    wide_weight = widen(given, weight, antiquant_scale, antiquant_offset, antiquant_group_size)
    out = x.float() @ wide_weight
    return (out if bias is None else out + bias.float()).to(x.dtype)


def widen(
    given: Given, weight: Tensor, scale: Tensor, offset: Tensor | None, group_size: int
) -> Tensor:
    """(weight + offset) * scale [K, N], rounded to the dtype of `scale`, in fp32."""
    k, n = weight.shape
    if group_size == 0:
        need(scale.shape in ((n,), (1, n)), "scale [N] or [1, N]")
        scale = scale.view(1, n)
    else:
        need(not is_310p(), "groups are of A2")
        need(group_size % 32 == 0 and 32 <= group_size < k, "groups: multiples of 32 below K")
        need(scale.shape == (-(-k // group_size), n), "scale [ceil(K / group size), N]")
        scale = scale.repeat_interleave(group_size, 0)[:k]
    wide = weight.float()
    if offset is not None:
        check_floats(given, "antiquant_scale", "antiquant_offset")
        need(given["antiquant_offset"].shape == given["antiquant_scale"].shape, "offset as scale")
        wide = wide + (offset if group_size == 0 else offset.repeat_interleave(group_size, 0)[:k])
    return (wide * scale.float()).to(scale.dtype).float()


@reference("npu::npu_convert_weight_to_int4pack")
def convert_weight_to_int4pack(given: Given, weight: Tensor, inner_k_tiles: int = 0) -> Tensor:
    """int32 [K, N] from -8 to 7 to int32 [K, N / 8]. Their order within is the device's."""
    need(not is_310p(), "npu_convert_weight_to_int4pack: Atlas A2 and A3 only")
    need(
        given["weight"].dtype == torch.int32 and weight.dim() == 2, "weight: int32, two dimensions"
    )
    need(given["weight"].is_contiguous(), "weight must be contiguous")
    need(weight.shape[1] % 8 == 0 and inner_k_tiles == 0, "the last dimension: a multiple of 8")
    need(int(weight.min()) >= -8 and int(weight.max()) <= 7, "values from -8 to 7")
    halves = (weight & 15).to(torch.int64).view(len(weight), -1, 8)
    packed = (halves << (4 * torch.arange(8))).sum(-1)
    return (packed - ((packed >> 31) << 32)).to(torch.int32)


def unpack_int4(packed: Tensor) -> Tensor:
    """What `convert_weight_to_int4pack` packed, int32 [K, N]."""
    halves = (packed.unsqueeze(2) >> (4 * torch.arange(8, dtype=torch.int32))) & 15
    return ((halves ^ 8) - 8).flatten(1)


@reference("npu::npu_quantize")
def quantize(
    given: Given,
    scales: Tensor,
    zero_points: Tensor,
    dtype: int | torch.dtype,
    axis: int = 1,
    div_mode: bool = True,
    **others: Any,
) -> Tensor:
    """`input` times a scale for all values, which is what div_mode False means, and an offset."""
    x = others.pop("input")
    check_floats(given, "input", "scales", "zero_points")
    check_defaults(others)
    need(SCALAR_TYPES.get(dtype, dtype) == torch.qint8, "emulated: qint8")
    need(axis == -1 and not div_mode, "emulated: the last axis, a product")
    need(scales.shape == (1,) and bool(scales.isfinite().all()), "emulated: one finite scale")
    exact = (x.float() * scales.float() + zero_points.float()).round()
    return exact.clamp(-128, 127).to(torch.int8)


@reference("npu::npu_trans_quant_param")
def trans_quant_param(given: Given, scale: Tensor, **others: Any) -> Tensor:
    """The first 19 bits of fp32, in int64 with a mark."""
    need(scale.dtype == torch.float32, "scale: fp32")
    check_defaults(others)
    bits = scale.view(torch.int32).to(torch.int64) & 0xFFFFE000
    return bits | (1 << 46)


@reference("npu::npu_quant_matmul")
def quant_matmul(
    given: Given,
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | torch.dtype | None = None,
    **others: Any,
) -> Tensor:
    """int8 [M, K] times int8 [K, N]; see the tables of types in op-plugin's document."""
    check_defaults(others)
    output_dtype = SCALAR_TYPES.get(output_dtype, output_dtype)
    need(x1.dtype == x2.dtype == torch.int8, "x1, x2: int8")
    need(given["x1"].is_contiguous(), "x1: contiguous")
    need(given["x2"].t().is_contiguous(), "x2: the transposed view of a contiguous [N, K]")
    need(storage_format(given["x2"]) == 2, "x2: emulated in ND")
    (m, k), n = x1.shape, x2.shape[1]
    need(x2.shape[0] == k and max(k, n) <= 65535, "x1 [M, K], x2 [K, N], at most 65535")
    need(scale.shape == (n,), "scale [N]")
    sums = (x1.double() @ x2.double()).to(torch.int64)
    need(bool((sums.abs() < 2**31).all()), "a sum does not fit int32")
    if pertoken_scale is not None:
        need(not is_310p(), "pertoken_scale is of A2")
        need(pertoken_scale.shape == (m,) and pertoken_scale.dtype == torch.float32, "fp32 [M]")
        need(scale.dtype == torch.float32, "with pertoken_scale, scale: fp32")
        need(bias is None or bias.dtype == torch.float32, "emulated: bias fp32")
        out = sums.double() * scale.double() * pertoken_scale.double()[:, None]
        out = out if bias is None else out + bias.double()
        need(output_dtype in (torch.float16, torch.bfloat16), "output: half precision")
        return out.to(output_dtype)
    need(bias is None or bias.dtype == torch.int32, "bias: int32")
    sums = sums if bias is None else sums + bias
    if scale.dtype == torch.int64:
        need(output_dtype == torch.float16, "int64 scales give fp16")
        need(bool((scale >> 32 == 1 << 14).all()), "int64 scales are npu_trans_quant_param's")
        scale = (scale & 0xFFFFFFFF).to(torch.int32).view(torch.float32)
    else:
        need(not is_310p() and output_dtype == torch.bfloat16, "fp32 scales give bf16, on A2")
    return (sums.double() * scale.double()).to(output_dtype)


def check_defaults(others: dict[str, Any]) -> None:
    """Arguments that are not emulated have no value."""
    given = {name: value for name, value in others.items() if value not in (None, 0, [])}
    need(not given, f"not emulated: {given}")


@reference("npu::npu_gelu")
def npu_gelu(given: Given, input: Tensor, *, approximate: str = "none") -> Tensor:  # noqa: A002
    return F.gelu(input, approximate=approximate)


@reference("aten::gelu")
def gelu(given: Given, self: Tensor, *, approximate: str = "none") -> Tensor:
    """The kernel behind F.gelu takes no argument and computes the tanh form."""
    return F.gelu(self, approximate="tanh")


@reference("npu::npu_format_cast")
def format_cast(given: Given, input: Tensor, acl_format: int) -> Tensor:  # noqa: A002
    return input.clone()


@reference("npu::npu_dtype_cast")
@reference("npu::_npu_dtype_cast")
def dtype_cast(given: Given, input: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: A002
    """What torch_npu makes of `Tensor.to`, in 2.5 by the first name and in 2.9 by the other."""
    return input.to(dtype)
