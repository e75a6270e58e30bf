# SPDX-License-Identifier: Apache-2.0
"""The measurements: cases beside peers, curves, requests over time, what a step costs."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmark import arguments, results
from benchmark.arguments import Case
from benchmark.engines import ENGINES, OURS, Engine
from benchmark.errors import UsageError
from benchmark.models import open_model
from benchmark.session import (
    ARRIVALS_PREFILL_TOKENS,
    MAX_PREFILL_TOKENS,
    Contestant,
    Options,
    Say,
    Session,
    contestants,
)
from benchmark.traffic import Lengths, draw_requests
from gptneox.files import check_writable, safe_name
from gptneox.weights.formats import scheme_of

QUEUE_SIZES = (1000, 10000)
_OVERHEAD = "benchmark.workers.overhead"


def measure(args: Namespace, command: Sequence[str], say: Say) -> int:
    """Measure what the flags say, print it, write the files; returns the exit status.

    Raises:
        ValueError, OSError, RuntimeError: with a message for the user.
    """
    check_writable(args.output_dir / "result.json")
    model = open_model(args.model, args.dtype, args.cache, say)
    if args.scheme and (found := scheme_of(model.formats)):
        raise UsageError(
            f"--scheme {args.scheme}: {model.name} is quantized already ({found}); leave the flag "
            "out, or give the float checkpoint"
        )
    options = Options(args.device, args.dtype, args.threads, args.cache, args.timeout, args.scheme)
    cases = _cases(args, model.config.max_position_embeddings)
    with Session(model, options, say) as session:
        session.measure_limits()
        result = results.describe(model, command) | {
            "device": session.device,
            "description": session.limits["description"],
            "threads": args.threads,
            "dtype": args.dtype,
            "scheme": args.scheme,
            "runs": args.runs,
            "curve": args.curve,
            "matmul": session.matmul,
            "notes": session.notes,
        }
        path = args.output_dir / _file_name(args, model.name)
        task = _measure_overhead if args.overhead else _measure_requests
        if not args.overhead and args.curve != "requests":
            task = _measure_cases
        task(session, args, cases, result, path)
        is_whole = session.is_whole
    results.present(result, path, with_plot=args.plot)
    return 0 if is_whole else 1


def _contestants(args: Namespace) -> list[Contestant]:
    return contestants(args.against, args.variant, args.scheme, args.dtype)


def _file_name(args: Namespace, model_name: str) -> str:
    what = "overhead" if args.overhead else args.curve or "speed"
    start = f"{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    name = "-".join(filter(None, (model_name, args.dtype, args.scheme, what, start)))
    return safe_name(f"{name}.json")


def _cases(args: Namespace, max_positions: int) -> list[Case]:
    if args.overhead:
        return [Case(max(args.batch), args.prompt, args.output)]
    if args.curve == "requests":  # the largest possible batch
        prompt, output = 2 * args.prompt - 1, 2 * args.output - 1
        return arguments.check_positions([Case(args.max_batch, prompt, output)], max_positions)
    return arguments.cases(args, max_positions)


def _engines(session: Session) -> dict[str, Any]:
    return {
        c.name: c.about | {"engine": c.engine.name, "environment": dict(c.environment)}
        for c in session.contestants
    }


# -- cases ---------------------------------------------------------------------------------------


def _measure_cases(
    session: Session, args: Namespace, cases: list[Case], result: results.Result, path: Path
) -> None:
    """Measure every case; the file is written after each one, so that an abort loses nothing."""
    prefill_tokens = min(MAX_PREFILL_TOKENS, max(case.batch * case.prompt for case in cases))
    session.load(_contestants(args), cases, prefill_tokens)
    result |= {"kind": "cases", "engines": _engines(session), "cases": []}
    _note_cache(session)
    for case in cases:
        result["cases"].append(session.measure(case, args.runs))
        results.write(result, path)


def _note_cache(session: Session) -> None:
    """Add a note if the weights fit the processor's cache, whose bandwidth is higher."""
    if session.weights_fit_cache:
        form = f"in {session.options.scheme}" if session.options.scheme else "in two bytes each"
        session.notes.append(
            f"the weights ({session.weight_bytes / 1e6:.0f} MB {form}) fit the "
            "cache that the processor reports, so the bandwidth may be that of the cache"
        )


# -- requests over time --------------------------------------------------------------------------


def _measure_requests(
    session: Session, args: Namespace, cases: list[Case], result: results.Result, path: Path
) -> None:
    session.load(_contestants(args), cases, ARRIVALS_PREFILL_TOKENS)
    result |= {
        "kind": "requests",
        "engines": _engines(session),
        "arrivals_per_s": args.arrivals,
        "max_batch": args.max_batch,
        "mean_lengths": [args.prompt, args.output],
        "cases": [],
    }
    lengths = Lengths(args.prompt, args.output)
    for count in args.points or arguments.CURVES["requests"]:
        requests = draw_requests(count, args.arrivals, lengths, session.model.config.vocab_size)
        result["cases"].append(session.serve(requests, args.runs))
        results.write(result, path)


# -- what a step costs beside the model ----------------------------------------------------------


def _measure_overhead(
    session: Session, args: Namespace, cases: list[Case], result: results.Result, path: Path
) -> None:
    engine = Engine(OURS, _OVERHEAD, devices=ENGINES[OURS].devices)
    ours = Contestant(OURS, engine, weights=_contestants(args)[0].weights)
    session.load([ours], cases, cases[0].batch * cases[0].prompt)
    step = session.ask("overhead", **vars(cases[0]))
    session.say(f"queueing {' and '.join(map(str, QUEUE_SIZES))} requests")
    queue = session.ask("queue", sizes=QUEUE_SIZES)["queue"]
    result |= {"kind": "overhead", "engines": _engines(session), "step": step, "queue": queue}
    results.write(result, path)
