#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""GPT-NeoX on Ascend NPU, CUDA and CPU: `python main.py --task inference --help`.

Exit status: 0 done, 1 failed, 2 wrong usage or settings, 130 interrupted.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from gptneox.cli import Settings, read_settings, refuse_unbuilt, setup_logging
from gptneox.config import load_devices_by_hand
from gptneox.files import prepare_streams

CONFIG = Path(__file__).resolve().parent / "config.ini"


class NotBuiltYet(Exception):
    """A documented part that this version does not have."""


def run(settings: Settings) -> None:
    """Hand over to the task."""
    task = settings.args.task
    if task == "compare":
        from gptneox.evaluation.report import run_compare

        run_compare(settings)
        return
    refuse_unbuilt(settings)
    # torch and the tokenizer load only now
    if task == "performance":
        from gptneox.evaluation import performance as task_module
    elif task == "modeltest":
        from gptneox.evaluation import modeltest as task_module  # type: ignore[no-redef]
    elif task == "precision":
        from gptneox.evaluation import precision as task_module  # type: ignore[no-redef]
    elif settings.attention == "paged":
        from gptneox import inference as task_module  # type: ignore[no-redef]
    else:
        from gptneox import flash_inference as task_module  # type: ignore[no-redef]
    from gptneox.parallel import leave_group

    task_module.run(settings)
    leave_group()


def main(argv: list[str]) -> int:
    """Run one task; returns the exit status."""
    load_devices_by_hand()
    debug = "--debug" in argv
    if argv[:1] == ["doctor"]:
        argv = ["--task", *argv]
    status = 0
    try:
        prepare_streams()
        settings = read_settings(argv, CONFIG)
        setup_logging(settings)
    except (ValueError, OSError) as error:
        return _fail(error, 2, debug=debug)
    try:
        if settings.args.task == "doctor":
            from gptneox import doctor  # it looks at torch, which may be what is missing

            status = doctor.run(settings)
        else:
            run(settings)
        sys.stdout.flush()
    except NotBuiltYet as error:
        return _fail(error, 2, debug=debug)
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        sys.stdout = None
        return 1
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        return _fail(error, 1, debug=debug)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return status


def _fail(error: BaseException, status: int, *, debug: bool) -> int:
    """Say in one line what went wrong."""
    if debug:
        logging.getLogger("gptneox").error("traceback", exc_info=error)
    text = " ".join(str(error).split()) or type(error).__name__
    try:
        sys.stdout.flush()
    except OSError as output_error:  # Python would try again at its end, and say so at length
        sys.stdout = None
        text = f"standard output cannot be written: {output_error.strerror}"
    print(f"error: {text}", file=sys.stderr)
    if "torch.distributed" in sys.modules:
        from gptneox.parallel import report_failure

        if not debug:  # torchrun shows all that it is told
            error.__cause__ = error.__context__ = None
        report_failure(error if debug else error.with_traceback(None))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
