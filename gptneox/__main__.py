# SPDX-License-Identifier: Apache-2.0
"""The command line: `gptneox TASK …` of an installed package, `python main.py --task TASK …`.

TASK is inference, serve, precision, performance, compare, doctor, modeltest, quantize, cut or ray.

Exit status: 0 done, 1 failed, 2 wrong usage or settings, whenever that is found, 130 interrupted.
"""

import contextlib
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable

from gptneox import interpreter
from gptneox.cli import Settings, read_settings, setup_logging, with_checkpoint
from gptneox.config.environment import disable_device_autoload
from gptneox.config.errors import FAILED, WRONG_USAGE, exit_status
from gptneox.config.places import shipped
from gptneox.files import prepare_streams


def run(settings: Settings) -> int:
    """Hand over to the task, which has a module of its name; returns the exit status.

    torch and the tokenizer load only with it.
    """
    task = settings.args.task
    if task == "doctor":
        from gptneox.tasks import doctor  # it looks at torch, which may be what is missing

        return doctor.run(settings)
    if task == "compare":
        from gptneox.tasks.compare import run as run_compare

        run_compare(settings)
        return 0
    if task == "serve":
        from gptneox.tasks import serve

        return serve.run(settings)
    importlib.import_module(f"gptneox.tasks.{task}").run(settings)
    from gptneox.parallel import leave_group

    leave_group()
    return 0


def main(argv: list[str]) -> int:
    """Run one task; returns the exit status."""
    word, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    if word in ("cut", "ray"):  # with options of their own
        status: int = importlib.import_module(f"gptneox.tasks.{word}").main(rest)
        return status
    if word == "modeltest":
        from gptneox import launch

        return launch.main(["modeltest", "gptneox modeltest", *rest])
    disable_device_autoload()
    debug = "--debug" in argv
    try:
        prepare_streams()
        settings = read_settings(["--task", word, *rest] if word else argv, shipped("config.ini"))
        setup_logging(settings)
    except (ValueError, OSError) as error:
        return _fail(error, WRONG_USAGE, debug=debug)
    if settings.environment.rank > 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # rank 0 says that a run was interrupted
    interpreter.require(["main.py", *argv])
    try:
        if settings.args.task != "compare":
            settings = with_checkpoint(settings)
        status = run(settings)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        sys.stdout = None
        return 1
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        return _fail(error, exit_status(error), debug=debug)
    except ImportError as error:
        remedy = "reinstall what it belongs to, or set PYTHON to another interpreter"
        if isinstance(error, ModuleNotFoundError) and error.name:
            remedy = f"type: {sys.executable} -m pip install {error.name.partition('.')[0]}"
        reason = f"{sys.executable} cannot import what a run needs: {error}; {remedy}"
        return _fail(RuntimeError(reason), FAILED, debug=debug)
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


def run_command(command: Callable[[list[str]], int]) -> None:
    """Be the program `command`: it gets the arguments, its status is the exit status."""
    try:
        status = command(sys.argv[1:])
    except KeyboardInterrupt:  # here, for it may come while another error is being reported
        print("interrupted", file=sys.stderr)
        status = 130
    distributed = sys.modules.get("torch.distributed")
    if status and distributed and distributed.is_initialized():
        # A thread of the process group that waits for Python's lock would abort the program while
        # the interpreter shuts down.
        with contextlib.suppress(OSError, AttributeError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def cli() -> None:
    """The entry point of the package."""
    run_command(main)


if __name__ == "__main__":
    cli()
