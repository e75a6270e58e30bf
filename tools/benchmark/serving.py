# SPDX-License-Identifier: Apache-2.0
"""`bench.py serve`: a service under load, and what is figured from the moments of its tokens."""

from __future__ import annotations

import asyncio
import json
import os
import resource
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from itertools import pairwise
from typing import Any

from benchmark import client, results, traffic
from benchmark.client import Cost, Outcome, Refused, Request, Service
from benchmark.engines import ENGINES, OURS, interpreter
from benchmark.errors import UsageError, WorkerError
from benchmark.traffic import Lengths
from gptneox.evaluation.report import percentile, versions
from gptneox.files import check_writable, safe_name

# Ids below it are words of the tokenizer of GPT-NeoX. Source: EleutherAI/gpt-neox-20b.
VOCAB_SIZE = 50254
PERCENTILES = (50, 90, 99)
Say = Callable[[str], None]
Load = Mapping[str, float]
Figures = dict[str, Any]


def measure_service(args: Namespace, command: Sequence[str], say: Say) -> int:
    """Measure what the flags say, print it, write the files; returns the exit status.

    Raises:
        ValueError, OSError, RuntimeError: with a message for the user.
    """
    check_writable(args.output_dir / "result.json")
    _allow_connections()
    bench = ServiceBench(args, say)
    result = bench.measure(["serve", *command])
    start = f"{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    path = args.output_dir / safe_name(f"{result['model']['name']}-serve-{start}.json")
    results.write(result, path)
    results.present(result, path, with_plot=args.plot)
    runs = [run for case in result["cases"] for run in case["runs"].values()]
    return int(bool(bench.left_out) or any(run["errors"] for run in runs))


def _allow_connections() -> None:
    """Every request under way needs an open file; take as many as the system allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class ServiceBench:
    """One run of `bench.py serve`."""

    def __init__(self, args: Namespace, say: Say) -> None:
        """Read the text, if there is one.

        Raises:
            UsageError: it cannot be read, or is too short.
        """
        self.args, self.say = args, say
        self.lengths = Lengths(args.prompt, args.output, args.lengths == "uniform")
        self.loads: list[Load] = [{"arrivals_per_s": rate} for rate in args.arrivals or ()]
        self.loads += [{"concurrency": number} for number in args.concurrency or ()]
        self.vocab_size = args.vocab_size or VOCAB_SIZE
        self.left_out: list[str] = []  # services, with the reason
        self.words: list[str] = []
        if args.text:
            try:
                self.words = args.text.read_text(encoding="utf-8").split()
            except (OSError, ValueError) as error:
                raise UsageError(f"--text {args.text}: {error}") from error
            traffic.draw_texts(args.requests, self.lengths, args.seed, self.words)
        self.cases: list[dict[str, Any]] = [{"load": load, "runs": {}} for load in self.loads]

    def measure(self, command: Sequence[str]) -> results.Result:
        """The result, of the service at the URL or of those that are started here.

        Raises:
            ValueError, OSError, RuntimeError: with a message for the user.
        """
        about = self._measure_url() if self.args.url else self._measure_started()
        limits = {"first_token_ms": self.args.ttft_limit, "inter_token_ms": self.args.itl_limit}
        return {
            **results.head(command, about["model"]["name"]),
            "kind": "serve",
            **about,
            "lengths": {**vars(self.lengths), "unit": "words" if self.words else "tokens"},
            "requests": self.args.requests,
            "seed": self.args.seed,
            "limits": limits,
            "notes": self._notes(),
            "cases": self.cases,
        }

    def _notes(self) -> list[str]:
        """What a reader of the figures has to know."""
        runs = [run for case in self.cases for run in case["runs"].values()]
        notes = list(self.left_out)
        if any(run["client"]["cpu_share"] > 0.5 for run in runs):
            notes.append("the client used more than half a core, so latencies are partly its own")
        if any(run["num_short"] for run in runs):
            notes.append("some answers ended before they had the length that was asked for")
        if any(run["pieces_per_token"] < 0.9 for run in runs):
            notes.append("a piece of a stream held several tokens; inter-token times are of pieces")
        return notes

    def _measure_url(self) -> results.Result:
        args = self.args
        service = Service.of(args.url, os.environ.get("OPENAI_API_KEY", ""), args.timeout)
        model = self._measure_one("service", service, args.served_model)
        return {
            "model": {"name": model},
            "dtype": "",
            "device": "",
            "description": "",
            "threads": 0,
            "engines": {"service": {"dtype": "", "versions": _version_of(service)}},
        }

    def _measure_started(self) -> results.Result:
        from benchmark import servers
        from benchmark.models import open_model
        from gptneox.devices import select

        args = self.args
        names = [OURS, *([args.against] if args.against else [])]
        for name in names:  # report a missing engine before anything starts
            interpreter(ENGINES[name], args.cache)
        model = open_model(args.model, args.dtype, args.cache, self.say)
        model = servers.with_tokenizer(model, args.cache, self.say)
        self.vocab_size = args.vocab_size or model.config.vocab_size
        device = select(args.device)
        engines = {}
        for name in names:
            self.say(f"starting the service of {name}")
            server = servers.start(name, model, device.name, args.dtype, args.threads, args.cache)
            with closing(server), self._or_without(name):
                server.wait_until_ready()
                service = Service.of(server.url, "", args.timeout)
                own = versions() if name == OURS else _version_of(service)
                self._measure_one(name, service, model.name)
                engines[name] = {"dtype": args.dtype, "versions": own}
        return {
            "model": results.about_model(model),
            "dtype": args.dtype,
            "device": device.name,
            "description": device.describe(),
            "threads": args.threads,
            "engines": engines,
        }

    @contextmanager
    def _or_without(self, name: str) -> Iterator[None]:
        """Leave a peer that fails in the block out; reraise a failure of our own service."""
        try:
            yield
        except WorkerError as error:
            if name == OURS:
                raise
            self.say(f"{name} is left out: {error}")
            self.left_out.append(f"{name} is left out ({error.reason})")
            for case in self.cases:
                case["runs"].pop(name, None)

    def _measure_one(self, name: str, service: Service, model: str | None) -> str:
        """Measure a service under every load; returns the model that was asked for.

        Raises:
            WorkerError: it cannot be reached, or answers no request at all.
        """
        served = model or asyncio.run(client.find_model(service))
        warmup = self._requests(served, {}, self.args.warmup, -1)
        outcomes, _ = asyncio.run(client.send_all(service, warmup, 1))
        if errors := {f"{o.error}: {o.detail}" for o in outcomes if o.error}:
            raise WorkerError(f"{name}: the first requests failed: {'; '.join(sorted(errors))}")
        for i, case in enumerate(self.cases):
            load = case["load"]
            self.say(f"{name}: {self.args.requests} requests, {results.load_text(load)}")
            requests = self._requests(served, load, self.args.requests, i)
            number = load.get("concurrency")
            outcomes, cost = asyncio.run(
                client.send_all(service, requests, int(number) if number else None)
            )
            limits = (self.args.ttft_limit, self.args.itl_limit)
            case["runs"][name] = load_figures(requests, outcomes, cost, limits)
        return served

    def _requests(self, model: str, load: Load, count: int, number: int) -> list[Request]:
        """The requests of a measurement: those of no other, and the same for every service."""
        seed = f"{self.args.seed} {number}"
        moments = [0.0] * count
        if rate := load.get("arrivals_per_s"):
            moments = traffic.draw_arrivals(count, rate, seed)
        prompts: Sequence[tuple[object, int]]
        if self.words:
            prompts = traffic.draw_texts(count, self.lengths, seed, self.words)
        else:
            prompts = traffic.draw_prompts(count, self.lengths, seed, self.vocab_size)
        requests = []
        for at_s, (prompt, num_new) in zip(moments, prompts, strict=True):
            body = {
                "model": model,
                "prompt": prompt,
                "max_tokens": num_new,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            if not self.args.stop_at_eos:
                body["ignore_eos"] = True
            requests.append(Request(at_s, json.dumps(body).encode(), num_new))
        return requests


def _version_of(service: Service) -> dict[str, str]:
    """The version that vLLM and others tell; nothing where a service tells none."""
    try:
        answer = asyncio.run(client.get_json(service, "/version"))
        return {"service": str(answer["version"])}
    except (Refused, LookupError, TypeError):
        return {}


# -- figures ---------------------------------------------------------------------------------------


def load_figures(
    requests: Sequence[Request],
    outcomes: Sequence[Outcome],
    cost: Cost,
    limits: tuple[float | None, float | None],
) -> Figures:
    """What a service did under a load. Latencies are of the requests that were answered.

    Args:
        requests: as they were sent.
        outcomes: of each of them.
        cost: what the client took.
        limits: of the time to the first token and of the mean time between tokens, in ms. An
            answer that keeps both is good. Source: DistServe, arXiv:2401.09670, goodput.
    """
    good = [outcome for outcome in outcomes if not outcome.error]
    pairs = [(r, o) for r, o in zip(requests, outcomes, strict=True) if not o.error]
    seconds = max([o.pieces_s[-1] for o in good], default=0.0)
    num_tokens = sum(o.num_tokens for o in good)
    rate = 1 / seconds if seconds else 0.0
    gaps = [b - a for o in good for a, b in pairwise(o.pieces_s)]
    num_kept = sum(_keeps(o, limits) for o in good)
    details = Counter(f"{o.error}: {o.detail}" for o in outcomes if o.error)
    return {
        "answered": len(good),
        "errors": dict(Counter(o.error for o in outcomes if o.error)),
        "details": [text for text, _ in details.most_common(5)],
        "seconds": seconds,
        "requests_per_s": len(good) * rate,
        "prompt_tokens_per_s": sum(o.num_prompt for o in good) * rate,
        "output_tokens_per_s": num_tokens * rate,
        "good_requests": num_kept if any(limits) else None,
        "goodput_per_s": num_kept * rate if any(limits) else None,
        "first_token_ms": _spread([o.pieces_s[0] - o.at_s for o in good]),
        "inter_token_ms": _spread(gaps),
        "per_token_ms": _spread([mean for o in good if (mean := _mean_gap(o)) is not None]),
        "whole_ms": _spread([o.pieces_s[-1] - o.at_s for o in good]),
        "num_short": sum(o.num_tokens < r.num_new for r, o in pairs),
        "pieces_per_token": sum(len(o.pieces_s) for o in good) / max(1, num_tokens),
        "client": {
            "cpu_share": cost.cpu_s * rate,
            "us_per_token": cost.cpu_s / max(1, num_tokens) * 1e6,
            "lag_ms": _spread(cost.lags_s),
            "late_ms": _spread([o.sent_s - o.at_s for o in outcomes]),
        },
        "outcomes": [_row(o) for o in outcomes],
    }


def _mean_gap(outcome: Outcome) -> float | None:
    """Mean time between tokens in seconds; None for a single one."""
    if outcome.num_tokens < 2:
        return None
    return (outcome.pieces_s[-1] - outcome.pieces_s[0]) / (outcome.num_tokens - 1)


def _keeps(outcome: Outcome, limits: tuple[float | None, float | None]) -> bool:
    first, between = limits
    first_ms, mean = (outcome.pieces_s[0] - outcome.at_s) * 1e3, _mean_gap(outcome)
    if first is not None and first_ms > first:
        return False
    return between is None or mean is None or mean * 1e3 <= between


def _spread(seconds: Sequence[float]) -> dict[str, float] | None:
    """Percentiles in ms; None where nothing was measured."""
    if not seconds:
        return None
    return {f"p{p}": percentile(seconds, p) * 1e3 for p in PERCENTILES}


def _row(outcome: Outcome) -> list[Any]:
    """Arrival, first and last token in seconds, prompt tokens, tokens, error."""
    moments = [outcome.at_s, *outcome.pieces_s[:1], *outcome.pieces_s[-1:]]
    shown = [round(moment, 6) for moment in moments]
    return [shown, outcome.num_prompt, outcome.num_tokens, outcome.error]
