#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Cut a checkpoint for tensor parallelism, or join the parts again.

    python cut_model_util.py --input_path MODEL --output_path MODEL/part_model --world_size 2
    python cut_model_util.py --merge --input_path MODEL/part_model --output_path JOINED

Exit status: 0 done, 1 failed, 2 wrong usage; with --check 3: not a complete cut of this model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str]) -> int:
    """Run one command; returns the exit status."""
    args = _parse(argv)
    if args.print_config:
        return _print_config(args.print_config)
    from gptneox.cut import cut_checkpoint, describe_mismatch, merge_checkpoint  # imports torch

    try:
        if args.check:
            reason = describe_mismatch(args.output_path, args.input_path, args.world_size)
            if reason:
                print(reason)
            return 3 if reason else 0
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
        return 1
    return 0


def _print_config(path: Path) -> int:
    """For the launcher: the checkpoint and the number of devices that config.ini names."""
    from gptneox.config import (
        EMBEDDED_CHECKPOINT,
        ModelSection,
        layer,
        parse_device_ids,
        read_ini,
        resolve_model_path,
    )

    try:
        model, _ = layer(ModelSection, {}, read_ini(path) if path.is_file() else {})
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(resolve_model_path(model.model_path, path) or EMBEDDED_CHECKPOINT)
    print(len(parse_device_ids(model.device_ids)))
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="cut_model_util.py",
        description="Cut a GPT-NeoX checkpoint for tensor parallelism, or join the parts again.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--input_path", type=Path, help="checkpoint; with --merge: part_model")
    add("--output_path", type=Path, help="part_model to write; with --merge: result")
    add("--world_size", type=int, default=2, help="number of parts; default 2")
    add("--merge", action="store_true", help="join the parts into one checkpoint")
    add("--recut", action="store_true", help="replace what is at --output_path")
    add("--check", action="store_true", help="only say whether --output_path is a complete cut")
    add("--debug", action="store_true", help="show tracebacks")
    add("--print_config", type=Path, metavar="INI", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.print_config and not (args.input_path and args.output_path):
        parser.error("--input_path and --output_path are required")
    return args


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
