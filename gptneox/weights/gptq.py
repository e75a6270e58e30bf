# SPDX-License-Identifier: Apache-2.0
"""Round weights to four bits: by a search of each group's range, or by GPTQ with what inputs are.

Values are 0 to 15, scale * (value - zero), with a scale and a zero for each group of inputs.

Source: GPTQ, arXiv:2210.17323, with the columns in falling order of the Hessian's diagonal and the
scales of groups chosen before ("static groups"), so that no order is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptneox.weights.groups import Int4Weight, pack

LARGEST = 15  # of a value
# Of the range of a group, what the search tries. Below half of it, clipping always costs more.
SHARES = torch.linspace(1.0, 0.5, 26).tolist()
_COLUMNS = 128  # solved before the rest of a matrix is corrected
_CHUNK = 1 << 17  # values whose range is searched at a time: they stay in the second-level cache
_DAMPING = 0.01  # of the mean of the Hessian's diagonal


def find_scales(
    weight: Tensor, group_size: int, dtype: torch.dtype, shares: Sequence[float] = (1.0,)
) -> tuple[Tensor, Tensor]:
    """The scale and the zero of each group, of those tried with the smallest rounding errors.

    Args:
        weight: [F, K] fp32; groups divide K.
        group_size: inputs of a group.
        dtype: that scales are rounded to, before anything is divided by them.
        shares: of a group's range that are tried; what lies outside takes the nearest value.

    Returns:
        fp32 [F, G], and integers from 0 to 15 in fp32 [F, G].
    """
    groups = weight.view(-1, group_size)  # [F G, g]
    scale, zero = torch.empty(2, len(groups))
    step = max(1, _CHUNK // group_size)
    for start in range(0, len(groups), step):
        part = slice(start, start + step)
        scale[part], zero[part] = _search(groups[part].T.contiguous(), dtype, shares)
    return scale.view(len(weight), -1), zero.view(len(weight), -1)


def _search(columns: Tensor, dtype: torch.dtype, shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    """As `find_scales`, of groups that lie in columns [g, n]; each result is [n].

    Of equal errors the first share wins.
    """
    low, high = columns.amin(0).clamp_max_(0), columns.amax(0).clamp_min_(0)
    part = torch.tensor(shares).unsqueeze(1)
    scales = _representable((high - low) * (part / LARGEST), dtype)  # [shares, n]
    zeros = torch.round(-low * part / scales).clamp_(0, LARGEST)
    least, most = -zeros, LARGEST - zeros
    errors, values = torch.empty_like(scales), torch.empty_like(columns)
    for i, tried in enumerate(scales):
        torch.div(columns, tried, out=values).round_()
        torch.clamp(values, least[i], most[i], out=values)
        values.mul_(tried).sub_(columns).square_()
        torch.sum(values, 0, out=errors[i])
    best = errors.argmin(0, keepdim=True)
    return scales.gather(0, best)[0], zeros.gather(0, best)[0]


def _representable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in fp32 that `dtype` holds, none of them zero."""
    tiny = torch.finfo(torch.float32 if dtype == torch.float32 else dtype).tiny
    return torch.where(scale == 0, 1.0, scale.to(dtype).float().clamp_min(tiny))


def _round(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.round(weight / scale).add_(zero).clamp_(0, LARGEST)


def quantize_groups(
    weight: Tensor, group_size: int, dtype: torch.dtype, hessian: Tensor | None = None
) -> Int4Weight:
    """Round weight [F, K] to four bits.

    Args:
        weight: of any float type, finite.
        group_size: inputs that share a scale and a zero; divides K.
        dtype: the checkpoint's, which scales are rounded to.
        hessian: fp32 [K, K], the sum of x x^T over inputs x; None: each value is rounded by itself.

    Raises:
        RuntimeError: the Hessian is not finite.
    """
    wide = weight.float()
    if hessian is None:
        scale, zero = find_scales(wide, group_size, dtype, SHARES)
        groups = wide.view(len(wide), -1, group_size)
        values = _round(groups, scale.unsqueeze(2), zero.unsqueeze(2)).flatten(1)
    else:
        # Of what is corrected later, nothing is cut off: 0.0046 nats for the embedded checkpoint,
        # and 0.0058 with the search.
        scale, zero = find_scales(wide, group_size, dtype)
        values = solve(wide, hessian, scale, zero)
    return Int4Weight(pack(values, 4, 1, torch.uint8), scale, zero.to(torch.uint8), dtype)


def solve(weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Round one column after another, each time correcting those that follow.

    Args:
        weight: [F, K] fp32.
        hessian: [K, K].
        scale: fp32 [F, G], and `zero` likewise.
        zero: of values.

    Returns:
        Values from 0 to 15 in fp32 [F, K].

    Raises:
        RuntimeError: the Hessian is not finite.
    """
    if not torch.isfinite(hessian).all():
        raise RuntimeError("activations are not finite; calibrate with other text")
    num_inputs = weight.shape[1]
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True)
    groups = (order // (num_inputs // scale.shape[1])).tolist()
    # An input that never occurs is rounded by itself.
    damped = hessian[order][:, order]
    damped.diagonal().masked_fill_(diagonal[order] == 0, 1.0)
    damped.diagonal().add_(_DAMPING * max(diagonal.mean().item(), torch.finfo(torch.float32).tiny))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    # Columns lie in rows here.
    rest, steps, zeros = weight.T[order], scale.T.contiguous(), zero.T.contiguous()
    values = torch.empty_like(rest)
    for start in range(0, num_inputs, _COLUMNS):
        block = rest[start : start + _COLUMNS]
        errors = torch.empty_like(block)
        end = start + len(block)
        for i, group in enumerate(groups[start:end]):
            step, at = steps[group], zeros[group]
            value = values[start + i] = _round(block[i], step, at)
            errors[i] = (block[i] - (value - at) * step) / upper[start + i, start + i]
            block[i + 1 :].addr_(upper[start + i, start + i + 1 : end], errors[i], alpha=-1)
        rest[end:] -= upper[start:end, end:].T @ errors
    return values[order.argsort()].T.contiguous()


def output_error(weight: Tensor, quantized: Int4Weight, hessian: Tensor | None) -> float:
    """Norm of the error of a layer's outputs over the norm of the outputs.

    Without a Hessian that of the weight, as if all inputs were alike.
    """
    wide = weight.float()
    difference = quantized.dequantize(torch.float32) - wide

    def size(x: Tensor) -> float:
        products = x if hessian is None else x @ hessian
        return max(0.0, (products * x).sum(1).sum(dtype=torch.float64).item())

    total = size(wide)
    return float((size(difference) / total) ** 0.5) if total else 0.0
