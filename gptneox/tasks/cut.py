# SPDX-License-Identifier: Apache-2.0
"""Cut a checkpoint for tensor parallelism, or join the parts again.

    python cut_model_util.py --input_path MODEL --output_path MODEL/part_model --world_size 2
    python cut_model_util.py --merge --input_path MODEL/part_model --output_path JOINED

Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted; with --check 3: a cut of ours, but no
complete one of this model, so that --recut replaces it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gptneox import interpreter
from gptneox.config.arguments import given_path
from gptneox.config.errors import exit_status
from gptneox.config.places import CHECKOUT
from gptneox.files import prepare_streams


def main(argv: list[str]) -> int:
    """Run one command; returns the exit status."""
    args = _parse(argv)
    interpreter.require(["cut_model_util.py", *argv])
    from gptneox.weights.cut import cut_checkpoint, merge_checkpoint  # imports torch

    try:
        prepare_streams()
        if args.check:
            return _check(args.output_path, args.input_path, args.world_size)
        if args.merge:
            merge_checkpoint(args.input_path, args.output_path, recut=args.recut)
            print("Tensor parallelism weights have been successfully joined.")
        else:
            cut_checkpoint(args.input_path, args.output_path, args.world_size, recut=args.recut)
            print("Tensor parallelism weights have been successfully saved.")
    except (ValueError, OSError, RuntimeError) as error:
        if args.debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return exit_status(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _check(output_path: Path, input_path: Path, world_size: int) -> int:
    from gptneox.weights.cut import describe_mismatch, why_not_replaceable

    reason = describe_mismatch(output_path, input_path, world_size)
    if not reason:
        return 0
    obstacle = why_not_replaceable(output_path)
    print(obstacle or reason)
    return 1 if obstacle else 3


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="cut_model_util.py" if CHECKOUT else "gptneox cut",
        description="Cut a GPT-NeoX checkpoint for tensor parallelism, or join the parts again.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--input_path", type=given_path, required=True, help="checkpoint; with --merge: part_model")
    add("--output_path", type=given_path, required=True,
        help="part_model to write; with --merge: result")  # fmt: skip
    add("--world_size", type=int, default=2, help="number of parts; default 2")
    add("--merge", action="store_true", help="join the parts into one checkpoint")
    add("--recut", action="store_true", help="replace the cut (or joined checkpoint) there")
    add("--check", action="store_true", help="only say whether --output_path is a complete cut")
    add("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)
