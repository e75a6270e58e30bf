# SPDX-License-Identifier: Apache-2.0
"""server/group.py, wire.py and worker.py: between the front and the ranks."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from support import checkpoints
from support.processes import REPO
from support.service import LIMITS, EngineThread, eventually

from gptneox.cluster.collector import Collector
from gptneox.config.settings import EngineSection, ServerSection
from gptneox.devices import select
from gptneox.engine.api import Completion
from gptneox.engine.loop import EngineLoop
from gptneox.engine.paged import PagedEngine
from gptneox.engine.sequence import SamplingParams, TokenLogprobs
from gptneox.server import wire, worker
from gptneox.server.group import EngineGroup
from gptneox.server.metrics import Metrics
from gptneox.server.service import Delta, Request, Service
from gptneox.server.wire import Output, Stats

# Rank 0 without a model: it connects, says that it is ready, and does what its argument says.
RANK = """
import socket, sys, time
sys.path.insert(0, {repo!r})
from gptneox.server import wire
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
send = lambda message: connection.sendall(wire.encode(message))
send({{"type": "hello", "rank": 0, "pid": 0}})
send({{"type": "ready", "limits": {limits!r}}})
def step(*outputs):
    send({{"type": "step", "outputs": list(outputs), "stats": {stats!r}}})
while True:
    message = wire.receive(connection)
    if message is None or message["type"] == "stop":
        break
    if message["type"] == "abort":
        step({{"number": message["number"], "text": "late"}}, {{"number": 99, "text": "unknown"}})
        continue
    {behaviour}
"""


@contextlib.asynccontextmanager
async def group_of(
    behaviour: str, folder: Path, heartbeat_timeout_s: float = 30
) -> AsyncIterator[tuple[EngineGroup, list[EngineGroup]]]:
    lost: list[EngineGroup] = []
    group = EngineGroup(
        "0",
        folder / "0.sock",
        heartbeat_timeout_s=heartbeat_timeout_s,
        on_lost=lost.append,
        on_step=lambda num_tokens: None,
    )
    code = RANK.format(
        repo=str(REPO), limits=asdict(LIMITS), stats=asdict(Stats()), behaviour=behaviour
    )
    await group.start([sys.executable, "-c", code, str(group.path)], os.environ)
    try:
        await eventually(lambda: group.limits or group.lost, 30)
        yield group, lost
    finally:
        await group.stop()
        assert not list(folder.iterdir())
        assert group.status is not None


def test_outputs_find_their_choices_and_late_ones_are_ignored(tmp_path: Path) -> None:
    async def go() -> None:
        answer = 'step({"number": message["number"], "text": message["params"]["stop"][0]})'
        async with group_of(answer, tmp_path) as (group, lost):
            seen: dict[int, list[str]] = {0: [], 1: []}
            for i in range(2):
                number = group.add(
                    [1, 2],
                    SamplingParams(stop=(f"stop {i}",)),
                    lambda output, i=i: seen[i].append(output.text),
                )
                assert number == i
            await eventually(lambda: all(seen.values()))
            group.abort(0)
            group.abort(0)
            await asyncio.sleep(0.2)
            assert seen == {0: ["stop 0"], 1: ["stop 1"]}
            assert not lost
        assert group.status == 0  # it ended by command

    asyncio.run(go())


@pytest.mark.parametrize(
    "behaviour", ["import os; os._exit(7)", "connection.close(); time.sleep(60)"]
)
def test_an_engine_that_ends_is_lost_once(behaviour: str, tmp_path: Path) -> None:
    async def go() -> None:
        async with group_of(behaviour, tmp_path) as (group, lost):
            group.add([1], SamplingParams(), lambda output: None)
            await eventually(lambda: lost)
            await asyncio.sleep(0.1)
            assert lost == [group]
            assert group.lost

    asyncio.run(go())


def test_an_engine_that_hangs_is_lost(tmp_path: Path) -> None:
    async def go() -> None:
        async with group_of("time.sleep(60)", tmp_path, 0.4) as (group, lost):
            await eventually(lambda: lost)
            assert "silent" in group.lost
            group.kill()
            await eventually(lambda: group.status is not None)

    asyncio.run(go())


def test_the_engine_that_knows_the_beginning_is_cheaper(tmp_path: Path) -> None:
    async def go() -> None:
        async with group_of("pass", tmp_path) as (group, _):
            assert group.cost([1, 2, 3]) == (0, 0)
            number = group.add([1, 2, 3], SamplingParams(max_new_tokens=5), lambda output: None)
            assert group.cost([1, 2, 4]) == (8, -2)
            assert group.cost([9]) == (8, 0)
            group.abort(number)
            assert group.cost([1, 2, 3, 4]) == (0, -3)

    asyncio.run(go())


# -- messages ------------------------------------------------------------------------------------


def test_what_is_packed_is_unpacked() -> None:
    params = SamplingParams(
        max_new_tokens=3, stop=("a", "\ud800"), logit_bias=((1, -2.5),), logprob_token_ids=(4,)
    )
    entry = TokenLogprobs(5, -math.inf, {5: -math.inf, 3: -0.1})
    output = Output(
        *(7, "\U0001f600", 2, [5], [entry], [entry], "stop", "a", 0, entry, [6, 7], [entry] * 2),
        *("", 3, 0.5, 0.25),
    )
    first, second = socket.socketpair()
    with first, second:
        for message in (wire.pack_params(params), wire.pack_output(output)):
            first.sendall(wire.encode({"content": message}))
        received = [wire.receive(second), wire.receive(second)]
        assert wire.unpack_params(received[0]["content"]) == params
        assert wire.unpack_output(received[1]["content"]) == output
        first.sendall(wire.encode({})[:3])
        first.close()
        assert wire.receive(second) is None


def test_the_defaults_take_no_room() -> None:
    assert wire.pack_params(SamplingParams()) == {}
    assert wire.pack_output(Output(3)) == {"number": 3}


# -- the ranks -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> PagedEngine:
    """It writes abcabc…, or xyz and an end."""
    path = checkpoints.write_chain_checkpoint(tmp_path_factory.mktemp("x") / "chain", "abca", "xyz")
    section = EngineSection(max_batch_size=4, num_blocks=40, block_size=16)
    return PagedEngine.from_pretrained(path, section, select("cpu"), dtype="float32")


class FakeLink:
    """Instead of the socket: what the front sends, round by round, and what it gets."""

    def __init__(self, *rounds: list[Any]) -> None:
        self.rounds = list(rounds)
        self.sent: list[dict[str, Any]] = []

    def take(self, timeout_s: float) -> list[Any]:
        return self.rounds.pop(0) if self.rounds else []

    def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    def outputs(self, number: int) -> list[Output]:
        packed = [o for message in self.sent for o in message["outputs"] if o["number"] == number]
        return [wire.unpack_output(output) for output in packed]


def add(number: int, prompt: list[int], **params: Any) -> dict[str, Any]:
    packed = wire.pack_params(SamplingParams(**params))
    return {"type": "add", "number": number, "prompt": prompt, "params": packed}


def test_rank_0_answers_aborts_and_refuses(engine: PagedEngine) -> None:
    ids = {c: engine.tokenizer.encode(c)[0] for c in "abcxyz"}
    link = FakeLink(
        [
            add(10, [ids["a"]], max_new_tokens=4, prompt_logprobs=0, logprobs=1),
            add(11, [ids["x"], ids["x"]], max_new_tokens=9, logprobs=0, prompt_logprobs=0),
            add(12, [ids["a"]], max_new_tokens=100),
            add(13, [ids["a"]] * 3, max_new_tokens=10_000),
        ],
        [{"type": "abort", "number": 12}, {"type": "abort", "number": 77}],
        *[[]] * 8,
        [{"type": "stop"}],
    )
    worker.RankZero(EngineLoop(engine), link).run()  # type: ignore[arg-type]
    first = link.outputs(10)
    assert "".join(output.text for output in first) == "bcab"
    assert first[-1].finish_reason == "length"
    assert [entry.token_id for o in first for entry in o.logprobs] == [ids[c] for c in "bcab"]
    ended = link.outputs(11)
    assert "".join(output.text for output in ended) == "yz"
    assert (ended[-1].finish_reason, ended[-1].end_id) == ("stop", 0)
    assert ended[-1].end_logprob is not None
    assert sum(output.num_tokens for output in ended) == 3
    assert [len(output.prompt_logprobs) for output in ended] == [1, 0, 0]  # once
    assert len(link.outputs(12)) == 1
    (refused,) = link.outputs(13)
    assert refused.finish_reason == "error"
    assert "10000" in refused.error
    stats = [Stats(**message["stats"]) for message in link.sent]
    assert stats[0].num_running == 3
    assert stats[-1].num_running == stats[-1].num_waiting == 0
    assert stats[-1].num_free_blocks == 40


# -- several choices of one prompt ---------------------------------------------------------------


def run_choices(engine: PagedEngine, request: Request) -> tuple[list[Delta], list[int]]:
    """The answer, and how many tokens of prompts each step computed that computed any."""

    async def go() -> list[Delta]:
        thread = EngineThread(engine)
        service = Service(ServerSection(), [thread], Metrics("", "neox", list))
        running = service.open(request)
        async with thread:
            deltas = await asyncio.wait_for(running.gather(), 60)
        assert service.num_open == 0
        return deltas

    engine.stats.steps = []
    deltas = asyncio.run(go())
    engine.block_manager.check([])
    counts = [step.num_prefill_tokens for step in engine.stats.steps]
    return deltas, [count for count in counts if count]


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, PagedEngine]:
    """A random model with a prefix cache of blocks of 16 tokens, and without one."""
    path = tmp_path_factory.mktemp("twins")
    checkpoints.write_checkpoint(path, checkpoints.FAMILY["gpt-neox-20b"], sharpness=2.0)
    section = EngineSection(max_batch_size=4, num_blocks=64, block_size=16)
    return {
        caching: PagedEngine.from_pretrained(
            *(path, replace(section, enable_prefix_caching=caching), select("cpu")),
            dtype="float32",
            with_tokenizer=False,
        )
        for caching in (False, True)
    }


@pytest.mark.parametrize(
    ("caching", "num_prompt", "num_left"),
    [
        (True, 40, 8),  # two full blocks are shared
        (True, 33, 1),
        (True, 32, 16),  # the last token has to be computed, so that one block alone is shared
        (True, 16, 16),  # nothing can be shared, so that nobody waits
        (True, 5, 5),
        (False, 40, 40),
    ],
)
@pytest.mark.parametrize("scores", [False, True])
def test_a_prompt_is_computed_once_for_all_its_choices(
    caching: bool,
    num_prompt: int,
    num_left: int,
    scores: bool,
    twins: dict[bool, PagedEngine],
) -> None:
    prompt = checkpoints.prompts((num_prompt,), 288, seed=num_prompt + 100 * scores)[0]
    params = SamplingParams(
        max_new_tokens=6, temperature=1.0, seed=3, ignore_eos=True, logprobs=1,
        prompt_logprobs=1 if scores else None,
    )  # fmt: skip
    request = Request("id", [prompt], params, 4)
    deltas, computed = run_choices(twins[caching], request)
    assert sum(computed) == num_prompt + 3 * num_left
    waits = scores or num_left < num_prompt
    assert computed[0] == (num_prompt if waits else 4 * num_prompt)
    alone = [twins[False].generate([prompt], replace(params, seed=3 + i))[0] for i in range(4)]
    assert [delta.token_ids for delta in deltas] == [c.token_ids for c in alone]
    assert len({tuple(delta.token_ids) for delta in deltas}) == 4
    for delta in deltas:
        scored = alone[0].prompt_logprobs
        assert [entry.token_id for entry in delta.prompt_logprobs] == [t.token_id for t in scored]
        assert [entry.logprob for entry in delta.prompt_logprobs] == pytest.approx(
            [entry.logprob for entry in scored], abs=1e-4
        )


def test_choices_of_several_prompts_may_end_at_their_first_token(
    twins: dict[bool, PagedEngine],
) -> None:
    prompts = checkpoints.prompts((40, 50), 288, seed=9)
    params = SamplingParams(max_new_tokens=1, temperature=1.0, seed=3, ignore_eos=True)
    deltas, computed = run_choices(twins[True], Request("id", prompts, params, 3))
    assert [delta.num_tokens for delta in deltas] == [1] * 6
    assert sum(computed) == 40 + 2 * 8 + 50 + 2 * 2


def test_a_prompt_that_is_only_scored_is_computed_once(twins: dict[bool, PagedEngine]) -> None:
    prompts = checkpoints.prompts((40, 5), 288, seed=11)
    params = SamplingParams(max_new_tokens=0, prompt_logprobs=1)
    deltas, computed = run_choices(twins[False], Request("id", prompts, params, 3))
    assert sum(computed) == 45
    alone = twins[False].generate(prompts, params)
    for delta in deltas:
        scored = alone[delta.index // 3].prompt_logprobs
        assert [entry.token_id for entry in delta.prompt_logprobs] == [t.token_id for t in scored]
        assert [entry.logprob for entry in delta.prompt_logprobs] == pytest.approx(
            [entry.logprob for entry in scored], abs=1e-4
        )
        assert (delta.finish_reason, delta.num_tokens) == ("length", 0)


def test_what_comes_together_is_computed_together(engine: PagedEngine) -> None:
    """And the outputs make the completions that the engine itself gives."""
    ids = {c: engine.tokenizer.encode(c)[0] for c in "abcxyz"}
    prompts = [[ids["a"]], [ids["x"], ids["x"]], [ids["b"]] * 3, [ids["a"], ids["b"]]]
    params = [
        SamplingParams(max_new_tokens=5, logprobs=1, prompt_logprobs=0),
        SamplingParams(max_new_tokens=9, logprobs=0),
        SamplingParams(max_new_tokens=9, logprobs=0, stop=("abc",)),
        SamplingParams(
            max_new_tokens=1,
            logprobs=0,
            detokenize=False,
            ignore_eos=True,
            obey_rules=False,
            logprob_token_ids=(ids["a"], ids["c"]),
        ),
    ]
    messages = [
        {"type": "add", "number": i, "prompt": prompt, "params": wire.pack_params(each)}
        for i, (prompt, each) in enumerate(zip(prompts, params, strict=True))
    ]
    link = FakeLink([{"type": "together", "messages": messages}], *[[]] * 12, [{"type": "stop"}])
    worker.RankZero(EngineLoop(engine), link).run()  # type: ignore[arg-type]
    assert Stats(**link.sent[0]["stats"]).num_running == 3, "all but the one that ended in a step"
    for i, expected in enumerate(engine.generate(prompts, params)):
        found: list[Completion] = []
        collector = Collector(found.append)
        for output in link.outputs(i):
            collector.take(output)
        (completion,) = found
        for name in ("text", "token_ids", "finish_reason", "stop_reason", "error"):
            assert getattr(completion, name) == getattr(expected, name), name
        assert completion.new_text == expected.text
        for name in ("logprobs", "prompt_logprobs"):
            own, other = getattr(completion, name), getattr(expected, name)
            assert [entry.token_id for entry in own] == [entry.token_id for entry in other]
            assert [e.top for e in own] == [pytest.approx(e.top, abs=1e-5) for e in other]


def test_a_rank_notices_that_the_front_has_gone(tmp_path: Path) -> None:
    """It ends itself where its loop does not, and removes the socket."""
    path = tmp_path / "private" / "0.sock"
    path.parent.mkdir()
    wire.log_dir(path).mkdir()
    code = (
        "import sys, time\nfrom gptneox.server import worker\nworker.EXIT_GRACE_S = 0.2\n"
        "worker.FrontLink(sys.argv[1], 1)\ntime.sleep(60)"
    )
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        rank = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=REPO)
        connection, _ = listener.accept()
        hello = wire.receive(connection)
        assert hello == {"type": "hello", "rank": 1, "pid": rank.pid}
    connection.close()
    assert rank.wait(timeout=20) == 1
    assert not path.parent.exists()


def test_a_rank_whose_front_never_was_fails_at_once(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        worker.FrontLink(str(tmp_path / "0.sock"), 0)
