# SPDX-License-Identifier: Apache-2.0
"""torchrun with less to say: a line in place of a traceback of its own, and a status that tells.

    python -m gptneox.start_ranks [torchrun's options] main.py [arguments]

Exit status: that of the first rank that failed; 128 and the signal's number where one ended it all,
so 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

PATIENCE_S = 10.0


def main(argv: list[str]) -> int:
    """Run the ranks; returns the exit status."""
    try:
        return _run(argv)
    except KeyboardInterrupt:  # before torchrun handles signals itself
        return _ended_by(signal.SIGINT)


def _run(argv: list[str]) -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from gptneox.config.environment import variables

    if "LOGLEVEL" not in variables():  # torchrun's own variable
        # that a rank has failed is said once, below
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        for name in (
            "agent.server.api",
            "multiprocessing.api",
            "multiprocessing.errors.error_handler",
        ):
            logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    args = run.parse_args(argv)  # type: ignore[no-untyped-call]
    watch = threading.Timer(PATIENCE_S, _say_who_is_missing, [args])
    watch.daemon = True
    watch.start()
    # torchrun handles signals only when the ranks have started; its wait for other hosts none
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        run.main(argv)
    except SignalException as error:
        _end_ranks()
        return _ended_by(error.sigval, is_said=error.sigval == signal.SIGINT)  # by rank 0
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        sys.stderr.write(f"{_why_failed(rank, failure, str(error))}\n")
        return max(1, failure.exitcode)
    finally:
        watch.cancel()
    return 0


def _why_failed(rank: int, failure: ProcessFailure, report: str) -> str:
    """One line on the rank that failed first; torchrun's report where it has a traceback."""
    told: Any = failure.message  # a dict where the rank has said why, see parallel.report_failure
    if isinstance(told, dict):
        if "Traceback" in told["extraInfo"]["py_callstack"]:  # --debug
            return report
        return f"rank {rank} failed first: {' '.join(told['message'].split())}"
    if failure.exitcode < 0:
        return f"rank {rank} was ended by {failure.signal_name()}"
    return f"rank {rank} ended with exit status {failure.exitcode}"


def _ended_by(number: int, *, is_said: bool = False) -> int:
    if not is_said:
        name = signal.Signals(number).name
        sys.stderr.write("interrupted\n" if number == signal.SIGINT else f"ended by {name}\n")
    return 128 + number


def _end_ranks() -> None:
    """Leave none behind, where a second signal has cut short what torchrun does for that."""
    from gptneox.lifeline import children

    for pid in children():
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGKILL)


def _say_who_is_missing(args: argparse.Namespace) -> None:
    """Ranks are started only when all hosts have met."""
    from gptneox.lifeline import children

    if children():
        return
    here, last = int(args.node_rank), int(args.nnodes.split(":")[-1]) - 1
    others = [str(i) for i in range(last + 1) if i != here] if here == 0 else ["0"]
    sys.stderr.write(
        f"host {here} has waited {PATIENCE_S:.0f} s at {args.master_addr} port {args.master_port} "
        f"for host {', '.join(others)}; start the same command there with "
        f"NODE_RANK={others[0]}{' and so on' if len(others) > 1 else ''}, NNODES, MASTER_ADDR and "
        "MASTER_PORT as here, and see that the port can be reached\n"
    )


if __name__ == "__main__":
    sys.path[0] = str(
        Path(__file__).resolve().parents[1]
    )  # a module of ours is no package of theirs
    sys.exit(main(sys.argv[1:]))
