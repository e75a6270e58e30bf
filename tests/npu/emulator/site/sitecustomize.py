# SPDX-License-Identifier: Apache-2.0
"""On PYTHONPATH: whichever program imports torch_npu gets devices that compute."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from pathlib import Path
from typing import Any


class ActivateAfterImport(importlib.abc.MetaPathFinder):
    """Finds torch_npu as usual and runs `emulator.activate` when its import is done."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torch_npu":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            import emulator

            emulator.activate()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.path.append(str(Path(__file__).resolve().parents[2]))
sys.meta_path.insert(0, ActivateAfterImport())
