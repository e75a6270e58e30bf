# SPDX-License-Identifier: Apache-2.0
"""Where the files are that come with the toolkit: in a checkout, or in an installed package."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_SHIPPED = _PACKAGE / "shipped"  # setup.py fills it when a wheel is built; a checkout has none

# The folder of a checkout; None: the package is installed.
CHECKOUT = None if _SHIPPED.is_dir() else _PACKAGE.parent


def shipped(name: str) -> Path:
    """config.ini, weights/neox-mini or modeling_gpt_neox_ascend.py.

    They lie at the top level of a checkout; an installed package has copies of its own.
    """
    return (CHECKOUT or _SHIPPED) / name
