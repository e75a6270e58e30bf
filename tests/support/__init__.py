# SPDX-License-Identifier: Apache-2.0
"""Helpers shared by test files; pytest also rewrites their asserts."""

from pathlib import Path

import pytest

pytest.register_assert_rewrite(
    *(f"{__name__}.{path.stem}" for path in Path(__file__).parent.glob("[a-z]*.py"))
)
