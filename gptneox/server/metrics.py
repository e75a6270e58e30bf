# SPDX-License-Identifier: Apache-2.0
"""What /metrics shows. One process counts and takes the times of all requests.

The names are those of vLLM behind a prefix of ours, so that its dashboards and routers fit. Times
are in seconds. Counters of the engines are read from their last step when a scraper comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gptneox.server.wire import Output, Stats

# A CPU and an NPU differ by a factor of a thousand.
_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
    *(60.0, 120.0, 300.0, 600.0),
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000)


@dataclass
class EngineState:
    """An engine at a glance."""

    stats: Stats
    num_blocks: int
    heartbeat_age_s: float


class Metrics:
    """The counters and histograms of the service."""

    def __init__(
        self, prefix: str, model_name: str, engines: Callable[[], Seq[EngineState]]
    ) -> None:
        """Make the series.

        Args:
            prefix: first part of each name.
            model_name: value of the label model_name.
            engines: the present state of every engine that runs.
        """
        self.registry = CollectorRegistry()
        self._prefix, self._model_name = prefix, model_name
        self.registry.register(_EngineCollector(prefix, model_name, engines))
        self._received = self._counter("requests_received", "Requests admitted")
        self._success = self._counter("request_success", "Requests answered", "finished_reason")
        self._failure = self._counter("request_failure", "Requests that failed", "reason")
        self._cancelled = self._counter("requests_cancelled", "Requests whose client has gone")
        self._rejected = self._counter("requests_rejected", "Requests not admitted", "reason")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of started choices")
        self._generated = self._counter("generation_tokens", "Tokens generated")
        seconds = self._seconds
        self._first_token = seconds("time_to_first_token", "Request's arrival to its first token")
        self._interval = seconds("inter_token_latency", "Time between two tokens of a choice")
        self._per_token = seconds("time_per_output_token", "A choice's mean of the same")
        self._latency = seconds("e2e_request_latency", "Request's arrival to its end")
        self._queue_time = seconds("request_queue_time", "A choice's wait for its first step")
        self._prefill_time = seconds("request_prefill_time", "A choice's time in prefill")
        self._decode_time = seconds("request_decode_time", "A choice's first token to its last")
        self._prompt_lengths = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a choice", _TOKENS
        )
        self._answer_lengths = self._histogram(
            "request_generation_tokens", "Generated tokens of a choice", _TOKENS
        )
        self._step_tokens = self._histogram(
            "iteration_tokens_total", "Tokens computed in a step", _TOKENS
        )

    def text(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(self.registry)

    # -- what happens ----------------------------------------------------------------------------

    def rejected(self, reason: str) -> None:
        """A request was not admitted."""
        self._rejected.labels(self._model_name, reason).inc()

    def request_started(self) -> None:
        """A request was admitted."""
        self._received.labels(self._model_name).inc()

    def started(self, output: Output, num_prompt_tokens: int) -> None:
        """The first token of a choice has come."""
        self._prompt_tokens.labels(self._model_name).inc(num_prompt_tokens)
        self._prompt_lengths.labels(self._model_name).observe(num_prompt_tokens)
        self._queue_time.labels(self._model_name).observe(output.queued_s)
        self._prefill_time.labels(self._model_name).observe(output.prefill_s)

    def first_token(self, seconds: float) -> None:
        """The first token of a request has come."""
        self._first_token.labels(self._model_name).observe(seconds)

    def tokens(self, num_tokens: int) -> None:
        """Tokens were generated."""
        self._generated.labels(self._model_name).inc(num_tokens)

    def token_interval(self, seconds: float, num_tokens: int) -> None:
        """So many tokens of a choice came, so long after the one before."""
        for _ in range(num_tokens):
            self._interval.labels(self._model_name).observe(seconds / num_tokens)

    def choice_finished(self, decode_s: float, num_tokens: int) -> None:
        """A choice is complete."""
        self._answer_lengths.labels(self._model_name).observe(num_tokens)
        self._decode_time.labels(self._model_name).observe(decode_s)
        if num_tokens > 1:
            self._per_token.labels(self._model_name).observe(decode_s / (num_tokens - 1))

    def request_ended(self, outcome: str, finish_reason: str, seconds: float) -> None:
        """A request has ended.

        Args:
            outcome: "" for a complete answer, "cancelled", or why it failed.
            finish_reason: of the choice that ended last.
            seconds: since its arrival.
        """
        if not outcome:
            self._success.labels(self._model_name, finish_reason).inc()
            self._latency.labels(self._model_name).observe(seconds)
        elif outcome == "cancelled":
            self._cancelled.labels(self._model_name).inc()
        else:
            self._failure.labels(self._model_name, outcome).inc()

    def step(self, num_tokens: int) -> None:
        """An engine has computed a step."""
        self._step_tokens.labels(self._model_name).observe(num_tokens)

    # -- making them -----------------------------------------------------------------------------

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        counter = Counter(
            f"{self._prefix}:{name}", text, ("model_name", *labels), registry=self.registry
        )
        if not labels:
            counter.labels(self._model_name)  # shown as 0 from the start
        return counter

    def _histogram(self, name: str, text: str, buckets: Seq[float]) -> Histogram:
        histogram = Histogram(
            f"{self._prefix}:{name}",
            text,
            ("model_name",),
            registry=self.registry,
            buckets=buckets,
        )
        histogram.labels(self._model_name)
        return histogram

    def _seconds(self, name: str, text: str) -> Histogram:
        return self._histogram(f"{name}_seconds", text, _SECONDS)


class _EngineCollector(Collector):
    """What the engines said in their last step."""

    def __init__(
        self, prefix: str, model_name: str, engines: Callable[[], Seq[EngineState]]
    ) -> None:
        self._prefix, self._model_name, self._engines = prefix, model_name, engines

    def collect(self) -> Iterator[Metric]:
        """The sums over all engines."""
        states = self._engines()
        stats = [state.stats for state in states]
        num_blocks = sum(state.num_blocks for state in states)
        used = num_blocks - sum(each.num_free_blocks for each in stats)
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        yield self._family(
            gauge, "num_requests_running", "Choices running", sum(s.num_running for s in stats)
        )
        yield self._family(
            gauge, "num_requests_waiting", "Choices waiting", sum(s.num_waiting for s in stats)
        )
        yield self._family(
            gauge,
            "kv_cache_usage_perc",
            "Share of the KV-cache blocks in use, 0 to 1",
            used / num_blocks if num_blocks else 0.0,
        )
        yield self._family(
            gauge,
            "engine_heartbeat_age_seconds",
            "Seconds since the last sign of life of the engine that is silent longest",
            max([state.heartbeat_age_s for state in states], default=0.0),
        )
        yield self._family(
            counter, "num_preemptions", "Preemptions", sum(s.num_preemptions for s in stats)
        )
        yield self._family(
            counter,
            "prefix_cache_queries",
            "Prompt tokens looked up in the prefix cache",
            sum(s.num_prefix_queries for s in stats),
        )
        yield self._family(
            counter,
            "prefix_cache_hits",
            "Prompt tokens found in the prefix cache",
            sum(s.num_prefix_hits for s in stats),
        )

    def _family(
        self,
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
        name: str,
        text: str,
        value: float,
    ) -> Metric:
        family = kind(f"{self._prefix}:{name}", text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family
