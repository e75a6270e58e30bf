# SPDX-License-Identifier: Apache-2.0
"""A grid of parameters of which the default run takes as many as needed to see every pair."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from typing import Any

import pytest


def pairs_first(*axes: Seq[Any]) -> list[Any]:
    """All combinations for `parametrize`; those whose pairs have occurred before are slow.

    Whatever two of the parameters do to each other is seen in the default run: each value of one
    meets each value of every other. Each axis is a list of values, or of `pytest.param` with an id.
    """
    plain = [
        [value if hasattr(value, "marks") else pytest.param(value) for value in axis]
        for axis in axes
    ]
    grid = list(itertools.product(*(range(len(axis)) for axis in plain)))
    missing = set().union(*map(_pairs, grid))
    chosen = set()
    while missing:
        best = max(grid, key=lambda point: len(_pairs(point) & missing))
        chosen.add(best)
        missing -= _pairs(best)
    return [
        pytest.param(
            *(plain[axis][i].values[0] for axis, i in enumerate(point)),
            id="-".join(plain[axis][i].id or str(plain[axis][i].values[0])
                        for axis, i in enumerate(point)),
            marks=() if point in chosen else pytest.mark.slow,
        )
        for point in grid
    ]  # fmt: skip


def _pairs(point: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    """What two axes are at once: pairs of (number of the axis, number of the value)."""
    return set(itertools.combinations(enumerate(point), 2))
