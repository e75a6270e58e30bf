#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""GPT-NeoX on Ascend NPU, CUDA and CPU: `python main.py --task inference --help`."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -I leaves it out

from gptneox import interpreter

if __name__ == "__main__":
    interpreter.require([os.path.abspath(__file__)] + sys.argv[1:], packages=False)

from gptneox.__main__ import cli, main  # Python >= 3.10 from here on

if __name__ == "__main__":
    cli()

__all__ = ["main"]
