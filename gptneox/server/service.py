# SPDX-License-Identifier: Apache-2.0
"""Requests inside the service: admission, the way to an engine and back, and their end.

A dialect makes a `Request` of a body and an answer of `Delta`s. `Service.open` admits the request
as a `Running`, whose `deltas` the dialect reads. Every `Running` ends exactly once, in `_end`,
whatever ends it: its last token, an error, the deadline or the client. There the engine forgets it,
its share of the limit is given back, and the metrics count it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Protocol

from gptneox.config.settings import ServerSection
from gptneox.engine.sequence import NO_TOKEN, SamplingParams, TokenLogprobs
from gptneox.server.errors import Kind, ServiceError
from gptneox.server.metrics import Metrics
from gptneox.server.wire import Limits, Output

logger = logging.getLogger(__name__)

PING_S = 15.0  # proxies close a connection on which nothing comes
LOADING_RETRY_S, DRAINING_RETRY_S, MAX_RETRY_S = 5, 30, 60
LOST = "the engine has stopped, and the service ends"
_MAX_SEED = 2**63


@dataclass(frozen=True)
class Request:
    """What a client asks for, in terms of no dialect: `n` choices for each prompt.

    Choices are numbered prompt by prompt: prompt p, choice i is number p * n + i.
    """

    request_id: str  # in the log and in the answer's x-request-id
    prompts: Seq[Seq[int]]
    params: SamplingParams  # with a seed, choice i has the seed + i
    n: int = 1

    @property
    def num_choices(self) -> int:
        """Number of choices in all."""
        return len(self.prompts) * self.n

    def choice(self, index: int) -> tuple[Seq[int], SamplingParams]:
        """Prompt and parameters of a choice. The first one of a prompt scores it for all."""
        prompt, i = divmod(index, self.n)
        params = self.params
        if params.seed is not None and i:
            params = replace(params, seed=(params.seed + i) % _MAX_SEED)
        if params.prompt_logprobs is not None and i:
            params = replace(params, prompt_logprobs=None)
        return self.prompts[prompt], params


@dataclass
class Delta:
    """What was added to a choice since the last delta: one step's, or several steps' together."""

    index: int  # of the choice
    text: str = ""
    num_tokens: int = 0  # generated, whether their text is in `text` or still held back
    token_ids: list[int] = field(default_factory=list)  # those whose text is in `text`
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of `token_ids`, if asked for
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the 2nd token on
    finish_reason: str = ""  # "stop" | "length"; "" while the choice goes on
    stop_reason: str | int | None = None  # a stop string, or an id of stop_token_ids
    end_id: int | None = None  # the token that ended the choice; it has no text
    end_logprob: TokenLogprobs | None = None
    cut_ids: list[int] = field(default_factory=list)  # the tokens that a stop string cut
    cut_logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_cached_tokens: int = 0  # of the prompt, from the prefix cache
    queued_s: float = 0.0  # before the first step

    @classmethod
    def of(cls, index: int, output: Output) -> Delta:
        """A step's output for a choice."""
        return cls(
            index,
            output.text,
            output.num_tokens,
            list(output.token_ids),
            list(output.logprobs),
            list(output.prompt_logprobs),
            output.finish_reason,
            output.stop_reason,
            output.end_id,
            output.end_logprob,
            list(output.cut_ids),
            list(output.cut_logprobs),
            output.num_cached_tokens,
            output.queued_s,
        )

    def add(self, later: Delta) -> None:
        """Append the next delta of the same choice."""
        self.text += later.text
        self.num_tokens += later.num_tokens
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.prompt_logprobs += later.prompt_logprobs
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason
        self.end_id, self.end_logprob = later.end_id, later.end_logprob
        self.cut_ids, self.cut_logprobs = later.cut_ids, later.cut_logprobs
        self.num_cached_tokens = max(self.num_cached_tokens, later.num_cached_tokens)
        self.queued_s = max(self.queued_s, later.queued_s)


class Engine(Protocol):
    """An engine as the service sees it; see `gptneox.server.group.EngineGroup`."""

    limits: Limits | None  # None while it loads

    def add(self, prompt: Seq[int], params: SamplingParams, on_output: OnOutput) -> int:
        """Start a choice; returns its number. Its outputs go to `on_output`."""

    def abort(self, number: int) -> None:
        """Forget a choice in any state; one that has finished is ignored."""

    def cost(self, prompt: Seq[int]) -> tuple[float, float]:
        """How well it suits a prompt; the engine with the least gets it."""


OnOutput = Callable[[Output], None]


@dataclass
class _Times:
    """When the tokens of a choice came."""

    first: float
    last: float
    num_tokens: int = 0


class Running:
    """An admitted request."""

    def __init__(self, service: Service, request: Request) -> None:
        self.request = request
        self.start = time.monotonic()
        self.deadline = self.start + service.settings.request_timeout_s
        self._service = service
        self._numbers: dict[int, tuple[Engine, int]] = {}  # choice -> where it runs
        self._awaited: dict[int, Engine] = {}  # first choice of a prompt -> where the others will
        self._times: dict[int, _Times] = {}  # choice -> when its tokens came
        self._pending: dict[int, Delta] = {}
        self._arrived = asyncio.Event()
        self._error: ServiceError | None = None
        self._ended = False
        loop = asyncio.get_running_loop()
        settings = service.settings
        self._timers = [loop.call_later(settings.request_timeout_s, self._time_out, "its answer")]
        if settings.queue_timeout_s:
            self._timers.append(
                loop.call_later(settings.queue_timeout_s, self._time_out, "its first token")
            )

    def submit(self) -> None:
        """Hand every choice to the engine that suits its prompt; those of one prompt together.

        Where the first one spares the others work, they start once it has computed the prompt; it
        answers for all where nothing is generated.
        """
        for first in range(0, self.request.num_choices, self.request.n):
            prompt, params = self.request.choice(first)
            engine = self._service.choose(prompt)
            if not params.max_new_tokens:
                self._start(first, engine, num_alike=self.request.n)
                continue
            self._start(first, engine)
            shares = engine.limits is not None and engine.limits.shares(len(prompt))
            if self.request.n > 1 and (shares or params.prompt_logprobs is not None):
                self._awaited[first] = engine
            else:
                self._start_others(first, engine)

    async def wait(self, timeout_s: float) -> bool:
        """Wait for the first delta; False if none has come in time.

        Raises:
            ServiceError: the request has failed.
        """
        try:
            await asyncio.wait_for(self._arrived.wait(), timeout_s)
        except (asyncio.TimeoutError, TimeoutError):
            return False
        if self._error and not self._pending:
            raise self._error
        return True

    async def batches(self) -> AsyncIterator[list[Delta]]:
        """The deltas that have come since the last batch, until all choices have finished.

        A reader that is late gets the deltas of several steps in one, so that none pile up. An
        empty batch says that nothing has come for `PING_S`.

        Raises:
            ServiceError: the request has failed; what came before it has been yielded.
        """
        while True:
            try:
                await asyncio.wait_for(self._arrived.wait(), PING_S)
            except (asyncio.TimeoutError, TimeoutError):
                yield []
                continue
            self._arrived.clear()
            pending, self._pending = self._pending, {}
            if pending:
                yield list(pending.values())
            if self._pending:
                continue  # the event is set again
            if self._error:
                raise self._error
            if self._ended:
                return

    async def gather(self) -> list[Delta]:
        """The whole answer: one delta for each choice, in order.

        Raises:
            ServiceError: the request has failed.
        """
        whole = [Delta(index) for index in range(self.request.num_choices)]
        async for batch in self.batches():
            for delta in batch:
                whole[delta.index].add(delta)
        return whole

    def uses(self, engine: Engine) -> bool:
        """Whether one of the choices runs there."""
        return any(own is engine for own, _ in self._numbers.values())

    def fail(self, error: ServiceError) -> None:
        """End the request with an error."""
        if not self._ended:
            self._error = error
            self._end(error.kind.value)

    def close(self) -> None:
        """End the request, unless it has ended: nobody reads it any more."""
        self._end("cancelled")

    # -- inside ----------------------------------------------------------------------------------

    def _start(
        self,
        index: int,
        engine: Engine,
        scores: Seq[TokenLogprobs] = (),
        num_alike: int = 1,
    ) -> None:
        """Start a choice.

        Args:
            index: its number.
            engine: where it runs.
            scores: those of its prompt, if another choice has found them.
            num_alike: so many choices from this one on have its answer.
        """
        alike = range(index, index + num_alike)

        def take(output: Output) -> None:
            nonlocal scores
            if scores:
                output.prompt_logprobs, scores = scores, ()
            for each in alike:
                if not self._ended:
                    self._take(each, output)

        prompt, params = self.request.choice(index)
        number = engine.add(prompt, params, take)
        self._numbers |= dict.fromkeys(alike, (engine, number))

    def _start_others(self, first: int, engine: Engine, scores: Seq[TokenLogprobs] = ()) -> None:
        """Start all choices of a prompt but its first."""
        for index in range(first + 1, first + self.request.n):
            self._start(index, engine, scores)

    def _take(self, index: int, output: Output) -> None:
        if output.error:
            logger.error("%s, choice %d: %s", self.request.request_id, index, output.error)
            message = "the model's output for this request was not finite numbers"
            if output.error == NO_TOKEN:
                message = output.error
            self.fail(ServiceError(Kind.FAILED, message))
            return
        if index in self._awaited:
            self._start_others(index, self._awaited.pop(index), output.prompt_logprobs)
        self._measure(index, output)
        delta = Delta.of(index, output)
        if index in self._pending:
            self._pending[index].add(delta)
        else:
            self._pending[index] = delta
        if output.finish_reason:
            del self._numbers[index]
            self._service.release(1)
        if not self._numbers:
            self._end("", output.finish_reason)
        self._arrived.set()

    def _measure(self, index: int, output: Output) -> None:
        now, times, metrics = time.monotonic(), self._times, self._service.metrics
        if output.num_tokens:
            metrics.tokens(output.num_tokens)
            if index in times:
                metrics.token_interval(now - times[index].last, output.num_tokens)
                times[index].last = now
            else:
                if not times:
                    metrics.first_token(now - self.start)
                metrics.started(output, len(self.request.choice(index)[0]))
                times[index] = _Times(now, now)
            times[index].num_tokens += output.num_tokens
        for timer in self._timers[1:]:  # the one for the first token, or for what is in its place
            timer.cancel()
        if output.finish_reason and index in times:
            metrics.choice_finished(now - times[index].first, times[index].num_tokens)

    def _time_out(self, what: str) -> None:
        seconds = time.monotonic() - self.start
        self.fail(ServiceError(Kind.TIMEOUT, f"{what} did not come within {seconds:.0f} s"))

    def _end(self, outcome: str, finish_reason: str = "") -> None:
        """The one place where a request ends.

        Args:
            outcome: "" for an answer that is complete, "cancelled", or the kind of the error.
            finish_reason: of the choice that ended last, if the answer is complete.
        """
        if self._ended:
            return
        self._ended = True
        for timer in self._timers:
            timer.cancel()
        for engine, number in dict.fromkeys(self._numbers.values()):  # choices may share one
            engine.abort(number)
        self._service.release(len(self._numbers) + len(self._awaited) * (self.request.n - 1))
        self._numbers.clear()
        self._awaited.clear()
        self._service.forget(self)
        seconds = time.monotonic() - self.start
        self._service.metrics.request_ended(outcome, finish_reason, seconds)
        self._arrived.set()


class Service:
    """Admits requests and spreads them over the engines."""

    def __init__(self, settings: ServerSection, engines: Seq[Engine], metrics: Metrics) -> None:
        self.settings, self.engines, self.metrics = settings, engines, metrics
        self.log_prompt: Callable[[str, Seq[int]], None] | None = None  # of request id and prompt
        self.num_open = 0  # choices that run or wait
        self.is_draining = False
        self.lost = ""  # why there is no engine any more
        self._running: set[Running] = set()
        self._ends: deque[float] = deque(maxlen=64)  # when choices ended lately

    @property
    def is_ready(self) -> bool:
        """Whether a request would be admitted, unless there are too many."""
        return not (self.why_unready or self.is_draining)

    @property
    def why_unready(self) -> str:
        """Empty when all engines run."""
        if self.lost:
            return self.lost
        return "" if all(engine.limits for engine in self.engines) else "the model is being loaded"

    @property
    def why_refusing(self) -> str:
        """Empty when a request of one choice would be admitted now."""
        if self.why_unready:
            return self.why_unready
        if self.is_draining:
            return "the service is ending"
        is_full = self.num_open >= self.settings.max_concurrent_requests
        return "there are too many requests" if is_full else ""

    @property
    def num_running(self) -> int:
        """Number of requests that have not ended."""
        return len(self._running)

    @property
    def most_choices(self) -> int:
        """Most choices of one request."""
        return min(self.settings.max_choices, self.settings.max_concurrent_requests)

    def limits(self) -> Limits:
        """The engines' limits; they are alike.

        Raises:
            ServiceError: there is no engine yet, or no longer.
        """
        self._check_available()
        limits = self.engines[0].limits
        assert limits is not None
        return limits

    def open(self, request: Request) -> Running:
        """Admit a request and start it, or refuse it at once.

        The caller reads `Running.deltas` and calls `Running.close` when it is done, whatever
        happened.

        Raises:
            ServiceError: the engines are not there, or there are too many requests.
        """
        self._check_available()
        limit = self.settings.max_concurrent_requests
        if self.num_open + request.num_choices > limit:
            self.metrics.rejected("overloaded")
            raise ServiceError(
                Kind.OVERLOADED,
                f"{self.num_open} choices run or wait, {limit} are the most; try again later",
                retry_after_s=self._retry_after_s(request.num_choices),
            )
        if self.log_prompt:
            for prompt in request.prompts:
                self.log_prompt(request.request_id, prompt)
        running = Running(self, request)
        self.num_open += request.num_choices
        self._running.add(running)
        self.metrics.request_started()
        running.submit()
        return running

    def choose(self, prompt: Seq[int]) -> Engine:
        """The engine that suits a prompt best."""
        if len(self.engines) == 1:
            return self.engines[0]
        return min(self.engines, key=lambda engine: engine.cost(prompt))

    def release(self, num_choices: int) -> None:
        """Give back the share of choices that have ended; for `Running`."""
        self.num_open -= num_choices
        assert self.num_open >= 0, "a choice was released twice"
        self._ends.extend([time.monotonic()] * min(num_choices, self._ends.maxlen or 0))

    def forget(self, running: Running) -> None:
        """The request has ended; for `Running`."""
        self._running.discard(running)

    def lose(self, engine: Engine, reason: str) -> None:
        """An engine has gone: its requests fail, those of others go on, new ones are refused."""
        self.lost = self.lost or reason
        for running in list(self._running):
            if running.uses(engine):
                running.fail(ServiceError(Kind.ENGINE_LOST, LOST))

    def fail_all(self, error: ServiceError) -> None:
        """End every request with an error."""
        for running in list(self._running):
            running.fail(error)

    def _check_available(self) -> None:
        if self.lost:
            raise ServiceError(Kind.ENGINE_LOST, LOST)
        if self.is_draining:
            self.metrics.rejected("draining")
            raise ServiceError(
                Kind.UNAVAILABLE, "the service is ending", retry_after_s=DRAINING_RETRY_S
            )
        if reason := self.why_unready:
            self.metrics.rejected("loading")
            raise ServiceError(Kind.UNAVAILABLE, reason, retry_after_s=LOADING_RETRY_S)

    def _retry_after_s(self, num_choices: int) -> int:
        """Seconds until so many choices will have ended, by the rate of the last ones."""
        if len(self._ends) < 2:
            return 1
        per_choice = (time.monotonic() - self._ends[0]) / len(self._ends)
        return max(1, min(MAX_RETRY_S, math.ceil(per_choice * num_choices)))
