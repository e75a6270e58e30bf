#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Cut a checkpoint for tensor parallelism: `python cut_model_util.py --help`."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -I leaves it out

from gptneox import interpreter

if __name__ == "__main__":
    interpreter.require([os.path.abspath(__file__)] + sys.argv[1:], packages=False)

from gptneox.tasks.cut import main  # Python >= 3.10 from here on

if __name__ == "__main__":
    from gptneox.__main__ import run_command

    run_command(main)
