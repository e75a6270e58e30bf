# SPDX-License-Identifier: Apache-2.0
"""Questions and prompts spread over the replicas of a cluster, by Ray Data.

Work is a list of pieces, each with a key. Every piece is computed by one replica, by the code and
with the settings of a run in one process, so an answer does not depend on where it was computed.
Pieces come back in any order.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
import threading
from asyncio.subprocess import PIPE
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import ray
import ray.data
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from gptneox.cli import Settings
from gptneox.cluster.collector import Collector
from gptneox.cluster.connection import connect, device_of, warn_without_room
from gptneox.cluster.group import FORCE_S, Hosts, end_with_node, tied
from gptneox.cluster.plan import Shape, engine_options
from gptneox.config.environment import Environment
from gptneox.config.model import ModelConfig
from gptneox.engine.api import Completion, NextToken
from gptneox.engine.detokenizer import load_tokenizer
from gptneox.engine.paged import score_by
from gptneox.engine.sequence import SamplingParams
from gptneox.evaluation.scoring import Question, Result, Scorer, evaluate
from gptneox.hub import find_checkpoint, is_model_id
from gptneox.parallel import TensorParallelGroup
from gptneox.server.front import rank_command, socket_folder
from gptneox.server.group import EngineGroup
from gptneox.server.wire import Limits
from gptneox.weights.load import find_part

logger = logging.getLogger(__name__)

NUM_STARTS = 3  # of a replica's ranks, for one piece of work
START_TIMEOUT_S, GRACE_S = 1800.0, 10.0
ROOM_S = 60.0  # between two questions whether there is room for a replica
MAX_BLOCKS = 1000

Piece = TypeVar("Piece")
Answer = TypeVar("Answer")


def first_rank(tp: int | None) -> TensorParallelGroup:
    """The place of a replica's first rank, whose part of a cut model has all but the weights."""
    return TensorParallelGroup(world_size=tp or 1)


class RanksLost(Exception):
    """The ranks of a replica have gone; that is no error of the work."""


@dataclass(frozen=True)
class ModelPlace:
    """Where a host finds the model, and what the run expects of it."""

    path: str  # of a folder, or an id on a hub
    revision: str
    positions: int  # [engine] max_position_embeddings
    dtype: str  # that results are labelled with
    trust_remote_code: bool
    load_tokenizer: bool
    heartbeat_timeout_s: float  # as [server] has it

    @classmethod
    def of(cls, settings: Settings, config: ModelConfig) -> ModelPlace:
        """As this run has it; `config` is the model's."""
        named = settings.given.get("model_path", "")
        is_on_hub = is_model_id(named)
        dtype = config.dtype if settings.model.dtype == "auto" else settings.model.dtype
        return cls(
            named if is_on_hub else str(settings.model_path.resolve()),
            settings.model.revision if is_on_hub else "",
            settings.engine.max_position_embeddings,
            dtype,
            settings.args.trust_remote_code,
            settings.args.load_tokenizer,
            settings.server.heartbeat_timeout_s,
        )


class RemoteEngine:
    """The engine of a replica, in the actor that started it; see `gptneox.engine.api.Answering`."""

    def __init__(self, shape: Shape, options: Seq[str], model: ModelPlace) -> None:
        """Start its ranks, and wait until they have loaded the model.

        Args:
            shape: of the replica.
            options: main.py's.
            model: for its tokenizer and its limits.

        Raises:
            RanksLost: they have ended.
            RuntimeError: they compute in another number format than the run says.
        """
        folder = find_checkpoint(
            model.path, model.revision, from_modelscope=Environment.read().use_modelscope
        )
        path, config = find_part(folder, first_rank(shape.tp))
        self.tokenizer = None
        if model.load_tokenizer:
            self.tokenizer = load_tokenizer(
                path, config.vocab_size, trust_remote_code=model.trust_remote_code
            )
        self.max_positions = config.positions(model.positions)
        self.group = TensorParallelGroup()  # to its caller it is one process
        self._waiting: set[asyncio.Future[Any]] = set()
        self._lost = ""
        self._loop = asyncio.new_event_loop()
        self._open = contextlib.ExitStack()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._open.callback(self._loop.call_soon_threadsafe, self._loop.stop)
        try:
            limits: Limits = self._run(self._start(shape, list(options), model))
            if limits.dtype != model.dtype:
                raise RuntimeError(
                    f"the replicas compute in {limits.dtype}, but {model.dtype} is expected; give "
                    f"--dtype {limits.dtype}"
                )
        except BaseException:
            self.close()
            raise

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _start(self, shape: Shape, options: list[str], model: ModelPlace) -> Limits:
        folder = self._open.enter_context(socket_folder())
        hosts = Hosts(shape, options, GRACE_S)
        self._open.callback(hosts.stop)
        self._ranks = EngineGroup(
            "0",
            folder / "0.sock",
            heartbeat_timeout_s=model.heartbeat_timeout_s,
            on_lost=lambda ranks: self._lose(ranks.lost),
            on_step=lambda num_tokens: None,
        )
        self._open.callback(lambda: self._run(self._ranks.stop()))
        command = tied(rank_command(options, self._ranks.path, []), GRACE_S, folder)
        await self._ranks.start(command, hosts.environ, stdin=PIPE)
        hosts.watch(lambda reason: self._loop.call_soon_threadsafe(self._lose, reason))
        end = self._loop.time() + START_TIMEOUT_S
        while self._ranks.limits is None:
            self._check()
            if self._loop.time() > end:
                raise RanksLost(f"the ranks are not ready after {START_TIMEOUT_S:.0f} s")
            await asyncio.sleep(0.05)
        return self._ranks.limits

    def _lose(self, reason: str) -> None:
        self._lost = self._lost or reason
        self._ranks.kill()
        for future in self._waiting:
            if not future.done():
                future.set_exception(RanksLost(self._lost))

    def _check(self) -> None:
        if self._lost:
            raise RanksLost(self._lost)

    def close(self) -> None:
        """End the ranks; nothing of them is left."""
        self._open.close()

    def generate(
        self, prompts: Seq[Seq[int]], params: SamplingParams | Seq[SamplingParams]
    ) -> list[Completion]:
        """See `gptneox.engine.api.Engine`.

        Raises:
            RanksLost: the ranks have gone.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        answers: list[Completion] = self._run(self._generate(list(zip(prompts, each, strict=True))))
        return answers

    async def _generate(self, work: list[tuple[Seq[int], SamplingParams]]) -> list[Completion]:
        self._check()
        futures = [self._loop.create_future() for _ in work]
        self._waiting = set(futures)
        collectors = [Collector(partial(_resolve, future)) for future in futures]
        self._ranks.add_together(
            [(*request, each.take) for request, each in zip(work, collectors, strict=True)]
        )
        return list(await asyncio.gather(*futures))

    def score_next(self, prompts: Seq[Seq[int]], token_ids: Seq[int]) -> list[NextToken]:
        """See `gptneox.engine.api.Engine`."""
        return score_by(self.generate, prompts, token_ids)


def _resolve(future: asyncio.Future[Completion], completion: Completion) -> None:
    if not future.done():  # the ranks may have been given up meanwhile
        future.set_result(completion)


# -- the pieces ----------------------------------------------------------------------------------


class Worker:
    """Computes pieces, one after the other: an actor in the first bundle of its replica."""

    def __init__(
        self,
        compute: Callable[[RemoteEngine, Any], Any],
        shape: Shape,
        options: list[str],
        model: ModelPlace,
    ) -> None:
        self._compute = compute
        self._arguments = (shape, options, model)
        self._engine: RemoteEngine | None = None

    def compute(self, pieces: list[bytes]) -> tuple[list[bytes], list[str]]:
        """Their answers, and for each what is wrong with it."""
        answers, errors = [], []
        for packed in pieces:
            computed, error = self._compute_piece(pickle.loads(packed))  # noqa: S301 - our own
            answers.append(pickle.dumps(computed))
            errors.append(error)
        return answers, errors

    def _compute_piece(self, piece: Any) -> tuple[Any, str]:
        lost = ""
        for _ in range(NUM_STARTS):
            try:
                if self._engine is None:
                    self._engine = RemoteEngine(*self._arguments)
                return self._compute(self._engine, piece), ""
            except RanksLost as error:
                lost = str(error)
                logger.warning("%s; they are started again", lost)
                self.close()
            except (ValueError, OSError, RuntimeError) as error:
                return None, str(error)
        return None, f"{lost}, {NUM_STARTS} times in a row; the logs of Ray's workers say why"

    def close(self) -> None:
        """End the ranks."""
        if self._engine:
            self._engine.close()
        self._engine = None


class Feeder:
    """What Ray Data starts for each replica: an actor that finds room for it, and feeds it.

    The room is a placement group, which this actor makes, for Ray Data gives its actors none of
    their own. It has no core itself. Where it dies, Ray takes back all that it has made.
    """

    def __init__(
        self,
        compute: Callable[[RemoteEngine, Any], Any],
        shape: Shape,
        options: list[str],
        model: ModelPlace,
    ) -> None:
        """Wait until there is room: Ray Data gives pieces to none that is still being made."""
        end_with_node()
        self._group = ray.util.placement_group(**shape.placement)
        while not self._group.wait(ROOM_S):
            pass
        worker = ray.remote(Worker).options(
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, 0),
            max_restarts=-1,
            max_task_retries=NUM_STARTS - 1,
            **shape.actor_options,
        )
        self._worker = worker.remote(compute, shape, options, model)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Have the pieces of a batch computed; what is wrong with one is its `error`."""
        pieces = list(batch["piece"])
        try:
            answers, errors = ray.get(self._worker.compute.remote(pieces))
        except ray.exceptions.RayActorError as error:
            said = " ".join(str(error).split())[:300]
            answers, errors = [b""] * len(pieces), [f"a replica was lost: {said}"] * len(pieces)
        return {"key": batch["key"], "answer": answers, "error": errors}

    def __del__(self) -> None:
        """Ray Data lets go of it before its actor ends."""
        if hasattr(self, "_worker"):
            ray.wait([self._worker.close.remote()], timeout=GRACE_S + FORCE_S)
        ray.util.remove_placement_group(self._group)


def spread(
    settings: Settings,
    model: ModelPlace,
    compute: Callable[[RemoteEngine, Piece], Answer],
    pieces: Iterable[tuple[int, Piece]],
) -> Iterator[tuple[int, Answer]]:
    """Compute pieces on the replicas of a cluster; yields keys and answers as they come.

    Args:
        settings: of the run; `--ray` and what goes with it choose the replicas.
        model: for the replicas.
        compute: called in the actor of a replica; it travels there, and so do the pieces.
        pieces: each with its key.

    Raises:
        RuntimeError: there is no cluster, or a piece failed.
    """
    args, rows = settings.args, [{"key": k, "piece": pickle.dumps(piece)} for k, piece in pieces]
    if not rows:
        return
    connect(args.ray_address)
    device = device_of(settings.model.device)
    shape = Shape(args.tp or 1, args.ray_hosts, args.ray_cpus, device)
    warn_without_room(shape, args.ray)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)).map_batches(
        Feeder,
        fn_constructor_args=(compute, shape, engine_options(settings), model),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=args.ray, max_tasks_in_flight_per_actor=2),
        num_cpus=0,
    )
    for row in dataset.iter_rows():
        if row["error"]:
            raise RuntimeError(row["error"])
        yield row["key"], pickle.loads(row["answer"])  # noqa: S301 - our own


def ask(
    engine: RemoteEngine, questions: list[Question], scorer: Scorer, max_tokens: int | None
) -> list[Result]:
    """A batch of questions, as a run in one process asks it."""
    results: list[Result] = []
    evaluate(
        questions, scorer, engine, len(questions), results.extend, max_prompt_tokens=max_tokens
    )
    return results


def answer_prompts(
    engine: RemoteEngine, requests: list[tuple[list[int], SamplingParams]]
) -> list[Completion]:
    """Prompts, each with its parameters."""
    return engine.generate([prompt for prompt, _ in requests], [params for _, params in requests])
