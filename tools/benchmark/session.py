# SPDX-License-Identifier: Apache-2.0
"""Engines side by side: each in its own process, taking turns on the same work."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from benchmark import figures, seal
from benchmark.arguments import Case
from benchmark.engines import (
    ENGINES,
    OURS,
    QUANTIZED,
    SCHEMES,
    Engine,
    float_name,
    interpreter,
)
from benchmark.errors import WorkerError
from benchmark.models import Model
from benchmark.process import WorkerProcess, worker_environment
from gptneox import __version__
from gptneox.config.model import ModelConfig
from gptneox.evaluation.report import counted

if TYPE_CHECKING:
    from gptneox.weights.formats import Formats

PROMPT_SEED = 1
# Prompt tokens that engines with a budget per step may compute at once.
MAX_PREFILL_TOKENS = 8192
ARRIVALS_PREFILL_TOKENS = 2048
_PROBE = "benchmark.workers.probe"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How everything is run."""

    device: str
    dtype: str
    threads: int
    cache: Path
    timeout_s: float
    scheme: str = ""  # see `SCHEMES`; "" for weights as they are


@dataclass
class Contestant:
    """An engine under the name it has in the tables."""

    name: str
    engine: Engine
    environment: Mapping[str, str] = field(default_factory=dict)
    weights: str = ""  # how they are quantized for the run, see `Scheme`; "" for those of the model
    formats: Formats = field(default_factory=dict)  # of its linear layers, once it is loaded
    process: WorkerProcess | None = None
    about: dict[str, Any] = field(default_factory=dict)  # what its worker said when it had loaded


class Session:
    """Processes of one invocation. Use it as a context: at the end none is left."""

    def __init__(self, model: Model, options: Options, say: Say) -> None:
        self.model, self.options, self.say = model, options, say
        self.contestants: list[Contestant] = []
        self.notes: list[str] = []
        self.is_whole = True  # no engine has failed
        self.limits: dict[str, Any] = {}
        self.device = ""
        self.matmul: dict[str, float] = {}
        self.weights_fit_cache = False  # as the last measurement of the bandwidth found
        self._probe: WorkerProcess | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        processes = [c.process for c in self.contestants] + [self._probe]
        for process in filter(None, processes):
            process.close()
            if error is None:  # the log of one that failed is kept
                process.log.unlink(missing_ok=True)

    # -- the machine -----------------------------------------------------------------------------

    def measure_limits(self) -> None:
        """Start the probe: which device it is, and what its products reach.

        Raises:
            WorkerError: the device cannot be used.
        """
        self._probe = self._start("probe", Path(sys.executable), _PROBE, {}, True)
        self.limits = self._probe.ask(
            "limits", device=self.options.device, threads=self.options.threads
        )
        self.device = self.limits["device"]
        self.bandwidth()
        self._measure_matmul()

    def _measure_matmul(self) -> None:
        """Measure FLOP/s of large matrix products; the peak is the best of all measurements."""
        assert self._probe is not None, "measure_limits comes first"
        dtypes = list(dict.fromkeys([self.options.dtype, "float32"]))
        for name, value in self._probe.ask("matmul", dtypes=dtypes)["matmul"].items():
            self.matmul[name] = max(value, self.matmul.get(name, 0.0))

    def bandwidth(self) -> float:
        """Bytes per second that reading reaches at this moment."""
        assert self._probe is not None, "measure_limits comes first"
        answer = self._probe.ask("bandwidth", weights=self.weight_bytes)
        self.weights_fit_cache = bool(answer["fits"])
        return float(answer["bandwidth"])

    @property
    def weight_bytes(self) -> int:
        """Weights that a decode step reads, in two bytes each or quantized."""
        if self.options.scheme:
            size = figures.size_of(self.model.config, "bfloat16", formats=self._scheme_formats())
            return int(size.decode_weight_bytes)
        return int(self.model.config.num_decode_parameters * 2)

    def _scheme_formats(self) -> Formats:
        """About, before anything is quantized; heads stay float, in two bytes at least."""
        return figures.stored_bits(self.model.config, SCHEMES[self.options.scheme].bits, 16)

    def matmul_peak(self, dtype: str) -> float:
        """Peak FLOP/s for weights of a dtype, at least that of float32 (weights can be widened)."""
        return max(self.matmul.get(dtype, 0.0), self.matmul["float32"])

    # -- loading ---------------------------------------------------------------------------------

    def load(
        self, contestants: Sequence[Contestant], cases: Sequence[Case], prefill_tokens: int
    ) -> None:
        """Load one after another; a peer that fails is left out, with a note.

        Raises:
            WorkerError: this toolkit's own engine failed.
            RuntimeError: together they cannot fit the memory.
        """
        for contestant in self._fitting(contestants, cases):
            self.say(f"loading {contestant.name}")
            with self._or_without(contestant):
                self._load(contestant, cases, prefill_tokens)

    def _load(self, contestant: Contestant, cases: Sequence[Case], prefill_tokens: int) -> None:
        engine, options = contestant.engine, self.options
        if self.device not in engine.devices:
            raise WorkerError(f"{engine.name} is measured on {', '.join(engine.devices)} only")
        python = interpreter(engine, options.cache)
        environment = {**engine.environment, **contestant.environment}
        needs_files = engine.converts or contestant.weights
        converted = self._convert(contestant, python) if needs_files else None
        contestant.process = self._start(
            contestant.name, python, engine.module, environment, not engine.pip
        )
        self.contestants.append(contestant)
        contestant.about = contestant.process.ask(
            "load",
            model=str(self.model.path),
            converted=str(converted) if converted else None,
            dtype=options.dtype,
            device=self.device,
            threads=options.threads,
            cases=[[case.batch, case.prompt, case.output] for case in cases],
            prefill_tokens=prefill_tokens,
            scratch=str(options.cache / "scratch"),
            weights=contestant.weights,
        )
        contestant.formats = self._formats(contestant, converted)

    def _formats(self, contestant: Contestant, converted: Path | None) -> Formats:
        """Of the linear layers that an engine has loaded."""
        if bits := contestant.about.get("bits"):
            return figures.stored_bits(self.model.config, *bits)
        if contestant.engine.name == OURS and contestant.weights and converted:
            from gptneox.weights.load import check_weights

            folder = converted / QUANTIZED
            return check_weights(folder, ModelConfig.from_pretrained(folder))
        return self.model.formats

    def _convert(self, contestant: Contestant, python: Path) -> Path:
        """The checkpoint in the engine's own form, made in a process that ends afterwards."""
        engine, weights = contestant.engine, contestant.weights
        folder = self.options.cache / "converted" / self.model.key
        folder /= "-".join(filter(None, (engine.name, self.options.dtype, weights)))
        recipe: dict[str, Any] = {
            "format": 1,
            "model": self.model.identity,
            "dtype": self.options.dtype,
            "pip": [list(arguments) for arguments in engine.pip],
        }

        if weights:
            recipe |= {"weights": weights, "version": __version__}

        def build(target: Path) -> None:
            what = f" to {weights}" if weights else ""
            self.say(f"converting {self.model.name}{what} for {engine.name}")
            process = self._start(
                f"{engine.name}-convert", python, engine.module, engine.environment, not engine.pip
            )
            try:
                process.ask(
                    "convert",
                    model=str(self.model.path),
                    target=str(target),
                    dtype=self.options.dtype,
                    weights=weights,
                )
            finally:
                process.close()
            process.log.unlink(missing_ok=True)

        return seal.make(folder, recipe, build, self.say)

    def _start(
        self,
        name: str,
        python: Path,
        module: str,
        extra: Mapping[str, str],
        same_interpreter: bool,
    ) -> WorkerProcess:
        options = self.options
        environment = worker_environment(
            os.environ, extra, options.threads, same_interpreter=same_interpreter
        )
        safe = "".join(c if c.isalnum() or c in ".-" else "_" for c in name)
        log = options.cache / "logs" / f"{safe}-{os.getpid()}.log"
        return WorkerProcess(name, python, module, environment, log, options.timeout_s)

    def _fitting(
        self, contestants: Sequence[Contestant], cases: Sequence[Case]
    ) -> Sequence[Contestant]:
        """The engines that fit the memory together; of them the float one may be left out.

        Raises:
            RuntimeError: the others do not fit.
        """
        config, dtype = self.model.config, self.options.dtype
        rows = max(case.batch * (case.prompt + case.output) for case in cases)

        def least(contestant: Contestant) -> float:
            formats = self._scheme_formats() if contestant.weights else self.model.formats
            size = figures.size_of(config, dtype, formats=formats)
            return size.weight_bytes + rows * size.token_bytes

        free = self.limits["free_bytes"]
        wanted, asked = sum(map(least, contestants)), list(contestants)
        if wanted > free:
            left_out = [c for c in asked if self.options.scheme and c.name == float_name(dtype)]
            asked = [c for c in asked if c not in left_out]
            self.notes += [f"{c.name} is left out: there is no memory for it" for c in left_out]
        wanted = sum(map(least, asked))
        if wanted > free:
            raise RuntimeError(
                f"{len(asked)} engines hold {self.model.name} at the same time, at least "
                f"{wanted / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free: name fewer "
                "in --against, or take a smaller model or batch"
            )
        return asked

    @contextmanager
    def _or_without(self, contestant: Contestant) -> Iterator[None]:
        """Drop a peer that fails in the block; reraise a failure of our own engine."""
        try:
            yield
        except WorkerError as error:
            if contestant.name == OURS:
                raise
            self._drop(contestant, error)

    def _drop(self, contestant: Contestant, error: WorkerError) -> None:
        self.is_whole = False
        self.notes.append(f"{contestant.name} is left out ({' '.join(error.reason.split())})")
        self.say(f"{contestant.name} is left out: {error}")
        if contestant.process:
            contestant.process.close()
        if contestant in self.contestants:
            self.contestants.remove(contestant)

    # -- measuring -------------------------------------------------------------------------------

    def measure(self, case: Case, num_rounds: int) -> dict[str, Any]:
        """Warm up, then run the same prompts on all engines in turn, `num_rounds` times."""
        for contestant in list(self.contestants):
            self.say(f"{case}: warming up {contestant.name}")
            with self._or_without(contestant):
                self._ask(contestant, "prepare", **vars(case))
                self._run(contestant, case, prompts(self.model.config.vocab_size, case, 0))
        self._measure_matmul()
        rounds = []
        for number in range(1, num_rounds + 1):
            self.say(f"{case}: round {number} of {num_rounds}")
            rounds.append(self._round(case, number))
        return self._summarize(case, rounds)

    def _round(self, case: Case, number: int) -> dict[str, Any]:
        bandwidth = self.bandwidth()
        rows = prompts(self.model.config.vocab_size, case, number)
        runs: dict[str, Any] = {}
        for contestant in list(self.contestants):
            with self._or_without(contestant):
                run = self._run(contestant, case, rows)
                dtype = contestant.about["dtype"]
                cache = contestant.about.get("kv_cache_dtype", "auto")
                size = figures.size_of(self.model.config, dtype, cache, contestant.formats)
                limits = {"bandwidth": bandwidth, "matmul": self.matmul_peak(dtype)}
                run |= figures.shares(run, case, size, limits)
                runs[contestant.name] = run
        return {"bandwidth": bandwidth, "runs": runs}

    def _summarize(self, case: Case, rounds: list[dict[str, Any]]) -> dict[str, Any]:
        by_name = {c.name: [r["runs"][c.name] for r in rounds] for c in self.contestants}
        dtypes = {c.name: c.about["dtype"] for c in self.contestants}
        everything = [run for runs in by_name.values() for run in runs]
        cores = os.cpu_count() or 1
        result: dict[str, Any] = vars(case) | {
            "foreign_share": sum(run["foreign_cpu_s"] for run in everything)
            / (sum(run["wall_s"] for run in everything) * cores),
            "bandwidth": figures.spread([r["bandwidth"] for r in rounds]),
            "summary": {name: figures.summarize(runs) for name, runs in by_name.items()},
            "ratios": {},
            "agreement": {},
            "rounds": rounds,
        }
        for name, runs in by_name.items():
            if name != OURS:
                result["ratios"][name] = figures.ratios(by_name[OURS], runs)
                share = result["agreement"][name] = figures.agreement(by_name[OURS], runs)
                if share < self._least_agreement(dtypes[OURS], dtypes[name]):
                    self.notes.append(
                        f"{case}: {name} chose {OURS}'s first token for {share:.0%} of the rows "
                        "only; rounding alone seldom does that, so look at its conversion"
                    )
        return result

    def serve(self, requests: Sequence[tuple[float, list[int], int]], num_rounds: int) -> Any:
        """Requests that arrive over time, after a few to warm up."""
        result: dict[str, Any] = {"requests": len(requests), "bandwidth": [], "runs": {}}
        for contestant in list(self.contestants):
            with self._or_without(contestant):
                self._ask(contestant, "arrivals", requests=requests[:2])
        for number in range(1, num_rounds + 1):
            self.say(f"{counted(len(requests), 'request')}: round {number} of {num_rounds}")
            result["bandwidth"].append(self.bandwidth())
            for contestant in list(self.contestants):
                with self._or_without(contestant):
                    answer = self._ask(contestant, "arrivals", requests=requests)
                    run = figures.arrival_figures(answer, requests)
                    result["runs"].setdefault(contestant.name, []).append(run)
        return result

    def _least_agreement(self, *dtypes: str) -> float:
        """Share of equal first tokens below which a peer may compute another model.

        Of four bits there is none: two ways to round differ as much as two models may.
        """
        if self.options.scheme and SCHEMES[self.options.scheme].bits < 8:
            return 0.0
        return 0.95 if set(dtypes) == {"float32"} and not self.options.scheme else 0.5

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Something that only this toolkit's own engine answers."""
        return self._ask(self.contestants[0], op, **arguments)

    def _run(
        self, contestant: Contestant, case: Case, rows: Sequence[Sequence[int]]
    ) -> dict[str, Any]:
        """Run one engine, and measure the processor time of everything else meanwhile."""
        idle = [c for c in self.contestants if c is not contestant]
        idle_before, busy_before = _cpu_seconds(idle), machine_busy_seconds()
        own_before = _cpu_seconds([contestant]) + sum(os.times()[:2])
        start = time.perf_counter()
        answer = self._ask(contestant, "run", prompts=rows, num_new=case.output)
        wall_s = time.perf_counter() - start
        own = _cpu_seconds([contestant]) + sum(os.times()[:2]) - own_before
        idle_s = _cpu_seconds(idle) - idle_before
        return figures.run_figures(answer, case) | {
            "wall_s": wall_s,
            "idle_engines_cpu_s": idle_s,
            "foreign_cpu_s": max(0.0, machine_busy_seconds() - busy_before - own - idle_s),
        }

    def _ask(self, contestant: Contestant, op: str, **arguments: Any) -> dict[str, Any]:
        assert contestant.process is not None, f"{contestant.name} was not started"
        return contestant.process.ask(op, **arguments)


def contestants(
    against: Sequence[str],
    variants: Sequence[tuple[str, dict[str, str]]],
    scheme: str = "",
    dtype: str = "",
) -> list[Contestant]:
    """All engines in the order of their turns: ours, its float weights, its variants, the others.

    Args:
        against: names of the others.
        variants: names, and environments.
        scheme: of quantized weights; "" for none, and no float ones beside them.
        dtype: of floats.
    """
    ours = ENGINES[OURS]
    weights = SCHEMES[scheme].weights if scheme else {}
    own = weights.get(OURS, "")
    return [
        Contestant(OURS, ours, weights=own),
        *([Contestant(float_name(dtype), ours)] if scheme else []),
        *(Contestant(name, ours, environment, own) for name, environment in variants),
        *(Contestant(name, ENGINES[name], weights=weights.get(name, "")) for name in against),
    ]


def prompts(vocab_size: int, case: Case, number: int) -> list[list[int]]:
    """The rows of a round, the same for every engine: random ids, never 0 (end of text)."""
    generator = random.Random(f"{PROMPT_SEED} {case} {number}")
    return [
        [generator.randrange(1, vocab_size) for _ in range(case.prompt)] for _ in range(case.batch)
    ]


def _cpu_seconds(group: Sequence[Contestant]) -> float:
    return sum(c.process.cpu_seconds() for c in group if c.process)


def machine_busy_seconds() -> float:
    """Processor time used by all programs since boot. Source: proc(5), stat."""
    try:
        text = Path("/proc/stat").read_text(encoding="ascii")
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, soft_irq = map(int, text.split("\n", 1)[0].split()[1:8])
    return (user + nice + system + irq + soft_irq) / os.sysconf("SC_CLK_TCK")
