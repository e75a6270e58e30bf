#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""GPT-NeoX on Ascend NPU, CUDA and CPU: `python main.py --task inference --help`.

Exit status: 0 done, 1 failed, 2 wrong usage or settings, 130 interrupted.
"""

import logging
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -I leaves it out

from gptneox import interpreter

if __name__ == "__main__":
    interpreter.require(sys.argv, packages=False)

from gptneox.cli import Settings, read_settings, refuse_unbuilt, setup_logging
from gptneox.config.environment import disable_device_autoload
from gptneox.files import prepare_streams

CONFIG = Path(__file__).resolve().parent / "config.ini"


class NotBuiltYet(Exception):
    """A documented part that this version does not have."""


def run(settings: Settings) -> None:  # no valid syntax? Python >= 3.10 is wanted: bash run_pa.sh
    """Hand over to the task."""
    task = settings.args.task
    if task == "compare":
        from gptneox.tasks.compare import run as run_compare

        run_compare(settings)
        return
    refuse_unbuilt(settings)
    # torch and the tokenizer load only now
    if task == "performance":
        from gptneox.tasks import performance as task_module
    elif task == "modeltest":
        from gptneox.tasks import modeltest as task_module  # type: ignore[no-redef]
    elif task == "precision":
        from gptneox.tasks import precision as task_module  # type: ignore[no-redef]
    else:
        from gptneox.tasks import inference as task_module  # type: ignore[no-redef]
    from gptneox.parallel import leave_group

    task_module.run(settings)
    leave_group()


def main(argv: list[str]) -> int:
    """Run one task; returns the exit status."""
    disable_device_autoload()
    debug = "--debug" in argv
    command = [__file__, *argv]
    if argv[:1] == ["doctor"]:
        argv = ["--task", *argv]
    status = 0
    try:
        prepare_streams()
        settings = read_settings(argv, CONFIG)
        setup_logging(settings)
    except (ValueError, OSError) as error:
        return _fail(error, 2, debug=debug)
    if settings.environment.rank > 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # rank 0 says that a run was interrupted
    interpreter.require(command)
    try:
        if settings.args.task == "doctor":
            from gptneox.tasks import doctor  # it looks at torch, which may be what is missing

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
    except ImportError as error:
        remedy = "reinstall what it belongs to, or set PYTHON to another interpreter"
        if isinstance(error, ModuleNotFoundError) and error.name:
            remedy = f"type: {sys.executable} -m pip install {error.name.partition('.')[0]}"
        reason = f"{sys.executable} cannot import what a run needs: {error}; {remedy}"
        return _fail(RuntimeError(reason), 1, debug=debug)
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
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # here, for it may come while another error is being reported
        print("interrupted", file=sys.stderr)
        sys.exit(130)
