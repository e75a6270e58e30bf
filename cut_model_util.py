#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Cut a checkpoint for tensor parallelism, or join the parts again.

    python cut_model_util.py --input_path MODEL --output_path MODEL/part_model --world_size 2
    python cut_model_util.py --merge --input_path MODEL/part_model --output_path JOINED

Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted; with --check 3: a cut of ours, but no
complete one of this model, so that --recut replaces it.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -I leaves it out

from gptneox import interpreter

if __name__ == "__main__":
    interpreter.require(sys.argv, packages=False)


def main(argv: list[str]) -> int:  # no valid syntax? Python >= 3.10 is wanted
    """Run one command; returns the exit status."""
    if argv[:1] == ["--print_config"]:
        return _print_config(Path(argv[1]), argv[2:])
    args = _parse(argv)
    interpreter.require([__file__, *argv])
    from gptneox.files import prepare_streams
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
        return 1
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


def _print_config(path: Path, options: list[str]) -> int:
    """For the launcher: the checkpoint and the number of devices that main.py would go by.

    The third line says where the checkpoint's path is from: flag, config.ini or default.
    """
    from gptneox.cli import make_parser, read_model_section
    from gptneox.config.settings import EMBEDDED_CHECKPOINT, parse_device_ids

    try:
        model, sources, _ = read_model_section(make_parser().parse_args(options), path)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(Path(model.model_path).expanduser() if model.model_path else EMBEDDED_CHECKPOINT)
    print(len(parse_device_ids(model.device_ids)))
    print(sources["model_path"])
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    from gptneox.config.arguments import given_path

    parser = argparse.ArgumentParser(
        prog="cut_model_util.py",
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


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
