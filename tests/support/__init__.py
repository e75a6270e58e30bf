# SPDX-License-Identifier: Apache-2.0
"""What several test files share; a failed `assert` here is explained as in a test."""

from pathlib import Path

import pytest

pytest.register_assert_rewrite(
    *(f"{__name__}.{path.stem}" for path in Path(__file__).parent.glob("[a-z]*.py"))
)
