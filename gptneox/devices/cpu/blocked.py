# SPDX-License-Identifier: Apache-2.0
"""From how many rows on a product goes through the blocked kernels (src/blocked.h).

The register tile reads weights faster for few rows; the blocked kernels use the processor's matrix
units where it has them. A short trial decides for each weight format, and its result is kept
beside the compiled library.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

NEVER = 2**62
# Weight format -> the dtype that its values are given in.
FORMATS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int4": torch.uint8,
    "int4_rounded": torch.uint8,  # to bf16, in a model of that dtype
    "integers": torch.int8,  # and activations in digits of eight bits
}
_DEPTH = 1024
# Few rows: a matrix that no second-level cache holds, so that a trial reads as a model does. With
# many rows arithmetic decides, and a smaller one is enough.
_FEATURES, _FEATURES_OF_MANY = 1536, 512
# One row is read fastest by the register tile. Weights that are converted first may need many rows.
_ROWS = (256, 64, 32, 16, 8, 4, 2)
_MANY = 32
_ROUNDS = 6  # the best counts
# What shares a core with this program may use its matrix units for seconds. They are up to seven
# times as fast as vectors: a trial that finds them a little slower for many rows is not believed.
# They have no products of fp32.
_DOUBT = 1.25


def choose(kernels: Any, path: Path, *, has_matrix_units: bool) -> None:
    """Set the numbers in the library, from the file `path` or by a trial that writes it."""
    numbers = _read(path)
    if numbers is None:
        numbers = {
            name: _first_row(kernels, name, _DOUBT if has_matrix_units and name != "fp32" else 1.0)
            for name in FORMATS
        }
        try:
            path.write_text(json.dumps(numbers), encoding="utf-8")
        except OSError as error:
            logger.info("the result of the trial is not kept: %s", error)
    kernels.set_blocked_from(**numbers)


def describe(kernels: Any) -> str:
    """From how many rows on products are blocked, for `doctor`."""
    numbers = zip(FORMATS, kernels.blocked_from(), strict=True)
    texts = [f"{name} from {rows} rows" for name, rows in numbers if rows != NEVER]
    text = f"blocked products: {', '.join(texts) or 'none'}"
    if torch.__version__ < "2.6":
        text += " (they need torch 2.6)"
    elif torch.__version__ < "2.7":
        text += " (of integers: they need torch 2.7)"
    return text


def _read(path: Path) -> dict[str, int] | None:
    try:
        numbers = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    valid = isinstance(numbers, dict) and numbers.keys() == FORMATS.keys()
    if not valid or not all(type(n) is int and n >= 1 for n in numbers.values()):
        return None
    return numbers


def _first_row(kernels: Any, name: str, doubt: float) -> int:
    """The smallest number of rows from which on the blocked kernels are faster; NEVER for none."""
    if name == "integers" and "int8 dot products" not in kernels.describe():
        return NEVER  # other instructions do not give exact sums
    many, few = (_pack(kernels, name, features) for features in (_FEATURES_OF_MANY, _FEATURES))
    first = NEVER
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for rows in _ROWS:
            x = torch.full((rows, _DEPTH), 0.01)
            is_many = rows >= _MANY
            tile, blocked = _seconds(kernels, name, many if is_many else few, x)
            if blocked >= tile * (doubt if is_many else 1.0):
                break
            first = rows
    except RuntimeError as error:  # this torch has no blocked kernels for the processor
        logger.debug("no blocked kernels for %s: %s", name, error)
    finally:
        torch.set_num_threads(num_threads)
    return first


def _pack(kernels: Any, name: str, features: int) -> Any:
    dtype = FORMATS[name]
    if dtype == torch.uint8:
        pairs = torch.full((features, _DEPTH // 2), 0x11, dtype=dtype)
        groups = features, _DEPTH // 64
        zeros = torch.zeros(groups, dtype=dtype)
        return kernels.pack_int4(
            pairs, torch.full(groups, 0.01), zeros, rounds=name == "int4_rounded", digits=True
        )
    weight = torch.full((features, _DEPTH), 0.01 if dtype.is_floating_point else 1, dtype=dtype)
    scales = None if dtype.is_floating_point else torch.full((features,), 0.01)
    if name == "integers":
        return kernels.pack_integers(weight, scales, None, None, 0, digits=1)
    return kernels.pack(weight, scales)


def _seconds(kernels: Any, name: str, packed: Any, x: torch.Tensor) -> tuple[float, float]:
    """What register tile and blocked kernels take, each in its best of some interleaved rounds."""
    linear = kernels.linear_integers if name == "integers" else kernels.linear
    best = [float("inf"), float("inf")]
    for _ in range(_ROUNDS):
        for is_blocked in (False, True):
            numbers = dict.fromkeys(FORMATS, NEVER) | ({name: 1} if is_blocked else {})
            kernels.set_blocked_from(**numbers)
            start = time.thread_time()  # a busy machine takes the processor away, not this time
            linear(x, packed, None, 0)
            best[is_blocked] = min(best[is_blocked], time.thread_time() - start)
    return best[0], best[1]
