# SPDX-License-Identifier: Apache-2.0
"""engine/loop.py: rank 0 takes commands, every rank does the same."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from support import checkpoints
from support.ranks import Teams, open_teams

from gptneox.config.settings import EngineSection
from gptneox.devices import select
from gptneox.engine import loop as loop_module
from gptneox.engine.api import RequestFailed
from gptneox.engine.loop import EngineLoop
from gptneox.engine.paged import PagedEngine
from gptneox.engine.sequence import InvalidParameter, SamplingParams
from gptneox.parallel import TensorParallelGroup

PARAMS = SamplingParams(max_new_tokens=12, ignore_eos=True)
LONG = SamplingParams(max_new_tokens=100, ignore_eos=True)
PROMPTS = checkpoints.prompts((5, 17, 3, 9), 288, seed=3)


@pytest.fixture(scope="module")
def teams() -> Iterator[Teams]:
    with open_teams() as opened:
        yield opened


def run(teams: Teams, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What each rank's call gives; one rank needs no process of its own."""
    if world_size == 1:
        return [function(TensorParallelGroup(), *args)]
    return teams(world_size).run(function, *args)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("loop")
    checkpoints.write_checkpoint(directory, checkpoints.FAMILY["gpt-neox-20b"], sharpness=2.0)
    return directory


def open_loop(group: TensorParallelGroup, path: Path, **settings: int) -> EngineLoop:
    section = EngineSection(**{"max_batch_size": 4, "num_blocks": 40, "block_size": 16} | settings)
    engine = PagedEngine.from_pretrained(
        path, section, select("cpu"), group=group, dtype="float32", with_tokenizer=False
    )
    return EngineLoop(engine)


def drain(loop: EngineLoop) -> dict[int, list[int]]:
    """New tokens of the requests that finish."""
    done = {}
    while loop.has_work:
        done |= {number: c.token_ids for number, c in loop.round() if c.finished}
    return done


@pytest.fixture(scope="module")
def expected(path: Path) -> list[list[int]]:
    engine = open_loop(TensorParallelGroup(), path).engine
    return [c.token_ids for c in engine.generate(PROMPTS, PARAMS)]


def mixed(group: TensorParallelGroup, path: Path) -> tuple[dict[int, list[int]], int, int]:
    """Requests that come while others run, one that is aborted, all of it twice."""
    loop = open_loop(group, path)
    done: dict[int, list[int]] = {}
    if group.rank > 0:
        loop.follow()
    else:
        first = loop.add(PROMPTS[0], PARAMS)
        aborted = loop.add(PROMPTS[1], LONG)
        for _ in range(4):
            done |= {number: c.token_ids for number, c in loop.round() if c.finished}
        loop.abort(aborted)
        loop.abort(aborted)
        loop.abort(77)
        second = loop.add(PROMPTS[2], PARAMS)
        done |= drain(loop)
        assert set(done) == {first, second}
        outputs = loop.generate([PROMPTS[1], PROMPTS[3]], [PARAMS, PARAMS])
        done |= {7 + i: c.token_ids for i, c in enumerate(outputs)}
        loop.add(PROMPTS[0], LONG)  # forgotten when the loop ends
        loop.stop()
        loop.stop()
    engine = loop.engine
    assert not engine.has_work
    engine.block_manager.check([])
    return done, engine.stats.num_output_tokens, engine.stats.num_decode_steps


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_stay_alike(
    world_size: int, path: Path, expected: list[list[int]], teams: Teams
) -> None:
    answers = run(teams, world_size, mixed, path)
    done = answers[0][0]
    assert [done[i] for i in (0, 7, 2, 8)] == expected
    assert len({answer[1:] for answer in answers}) == 1, "the same steps on every rank"


def test_what_is_wrong_is_refused_before_others_hear_of_it(path: Path) -> None:
    loop = open_loop(TensorParallelGroup(), path)
    with pytest.raises(InvalidParameter, match="at least one token"):
        loop.add([], PARAMS)
    with pytest.raises(InvalidParameter, match="9999"):
        loop.generate([PROMPTS[0], [9999]], [PARAMS, PARAMS])
    assert not loop.has_work


def test_generate_keeps_the_completions_of_others(path: Path, expected: list[list[int]]) -> None:
    loop = open_loop(TensorParallelGroup(), path)
    queued = loop.add(PROMPTS[0], PARAMS)
    [own] = loop.generate([PROMPTS[1]], [PARAMS])
    assert own.token_ids == expected[1]
    assert loop.has_work
    assert drain(loop) == {queued: expected[0]}


def test_generate_ends_with_the_loop(path: Path) -> None:
    """Aborted requests and a stopped loop are an error, not an endless wait."""
    loop = open_loop(TensorParallelGroup(), path)
    advance = loop._advance

    def abort_all(commands):
        completions = advance(commands)
        for number in list(loop._request_ids):
            loop.abort(number)
        return completions

    loop._advance = abort_all
    with pytest.raises(RequestFailed, match="aborted"):
        loop.generate([PROMPTS[0]], [LONG])
    loop._advance = advance
    loop.stop()
    with pytest.raises(RequestFailed, match="stopped"):
        loop.generate([PROMPTS[0]], [PARAMS])


def test_no_collective_follows_a_failed_round(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks are somewhere else then: `stop` at exit must not wait for them."""
    loop = open_loop(TensorParallelGroup(), path)
    loop.add(PROMPTS[0], PARAMS)

    def fail() -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loop.engine, "step", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        loop.round()
    sent = []
    monkeypatch.setattr(loop, "_exchange", sent.append)
    loop.stop()
    assert sent == []


def failing(group: TensorParallelGroup, path: Path, bad: int) -> list[tuple[list[int], str]]:
    loop = open_loop(group, path)
    if group.rank > 0:
        loop.follow()
        return []
    outputs = loop.generate([PROMPTS[0], [4, bad], PROMPTS[2]], [PARAMS] * 3)
    again = loop.generate([PROMPTS[3]], [PARAMS])
    loop.stop()
    return [(c.token_ids, c.finish_reason) for c in outputs + again]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_failing_request_ends_alone_on_every_rank(
    world_size: int, path: Path, expected: list[list[int]], teams: Teams, tmp_path: Path
) -> None:
    """The row of one token in the embedding holds NaN; the loop goes on after it."""
    used = {token for prompt in PROMPTS for token in prompt} | {t for ids in expected for t in ids}
    bad = next(token for token in range(288) if token not in used)
    copied = checkpoints.copy_checkpoint(path, tmp_path / "copied")
    tensors = load_file(copied / "model.safetensors")
    tensors["gpt_neox.embed_in.weight"][bad] = float("nan")
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    [answers, *_] = run(teams, world_size, failing, copied, bad)
    reasons = [reason for _, reason in answers]
    assert reasons == ["length", "error", "length", "length"]
    assert [ids for ids, reason in answers if reason == "length"] == [
        expected[0],
        expected[2],
        expected[3],
    ]


def waiting(group: TensorParallelGroup, path: Path) -> tuple[int, list[list[int]]]:
    """Rank 0 does something else for a while; the others hear from it."""
    loop_module.HEARTBEAT_S = 0.05
    loop = open_loop(group, path)
    rounds = 0
    advance = loop._advance

    def count(*args):
        nonlocal rounds
        rounds += 1
        return advance(*args)

    loop._advance = count
    if group.rank > 0:
        loop.follow()
        return rounds, []
    with loop.idle():
        time.sleep(0.5)
    outputs = loop.generate(PROMPTS[:1], [PARAMS])
    loop.stop()
    return rounds, [c.token_ids for c in outputs]


def waiting_apart(group: TensorParallelGroup, path: Path) -> tuple[list[list[int]], set[bool]]:
    """As on an NPU, whose own collectives stand still: another group carries the commands.

    It gives up after a second, and rank 0 is silent for longer.
    """
    loop_module.HEARTBEAT_S = 0.2
    group.host_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=1))
    loop = open_loop(group, path)
    are_apart: set[bool] = set()
    broadcast = dist.broadcast

    def note(*args: Any, **options: Any) -> Any:
        are_apart.add(options["group"] is group.host_group)
        return broadcast(*args, **options)

    dist.broadcast = note
    try:
        if group.rank > 0:
            loop.follow()
            return [], are_apart
        with loop.idle():
            time.sleep(2.0)
        assert are_apart == {True}
        outputs = loop.generate(PROMPTS[:2], [PARAMS] * 2)
        loop.stop()
        return [c.token_ids for c in outputs], are_apart
    finally:
        dist.broadcast = broadcast
        group.host_group = None


def test_commands_have_a_group_of_their_own(
    path: Path, expected: list[list[int]], teams: Teams
) -> None:
    (answers, _), (_, followed) = teams(2).run(waiting_apart, path)
    assert answers == expected[:2]
    assert followed == {True}


def busy(group: TensorParallelGroup, path: Path) -> list[list[int]]:
    """Heartbeats as fast as they can come, while requests run; then a loop that has stopped."""
    loop_module.HEARTBEAT_S = 0.0
    loop = open_loop(group, path)
    if group.rank > 0:
        loop.follow()
        return []
    answers = []
    with loop.idle():
        for _ in range(20):
            answers += [c.token_ids for c in loop.generate(PROMPTS[:2], [PARAMS] * 2)]
    loop.stop()
    assert loop.round() == []
    return answers


def test_heartbeats_take_nothing_from_a_caller(
    path: Path, expected: list[list[int]], teams: Teams
) -> None:
    answers, _ = teams(2).run(busy, path)
    assert answers == expected[:2] * 20


def test_ranks_that_wait_hear_from_rank_0(
    path: Path, expected: list[list[int]], teams: Teams
) -> None:
    (rounds, answers), (followed, _) = teams(2).run(waiting, path)
    assert rounds == followed
    assert rounds > 3 + 12, "heartbeats besides the steps"
    assert answers == expected[:1]


def walk(
    group: TensorParallelGroup, path: Path, seed: int
) -> tuple[list[Any], dict[int, list[int]], dict[int, tuple[int, int]]]:
    """Requests come and go at random; returns each round's block tables, and what became of them.

    The cache is small, so that requests wait, are preempted and hit the prefix cache.
    """
    rng = random.Random(seed)
    loop = open_loop(group, path, num_blocks=6, max_prefill_tokens=24)
    tables: list[Any] = []
    advance = loop._advance

    def note(commands: Any) -> Any:
        completions = advance(commands)
        scheduler = loop.engine.scheduler
        tables.append(
            [
                (s.request_id, list(s.block_table), s.num_computed_tokens, len(s.token_ids))
                for s in (*scheduler.running, *scheduler.waiting)
            ]
        )
        loop.engine.block_manager.check(scheduler.running)
        return completions

    loop._advance = note
    if group.rank > 0:
        loop.follow()
        return tables, {}, {}
    asked: dict[int, tuple[int, int]] = {}  # number -> prompt, new tokens
    done: dict[int, list[int]] = {}
    aborted: set[int] = set()
    for _ in range(120):
        if rng.random() < 0.5:
            which, num_new = rng.randrange(4), rng.randrange(1, 40)
            params = SamplingParams(max_new_tokens=num_new, ignore_eos=True)
            asked[loop.add(PROMPTS[which], params)] = which, num_new
        if asked and rng.random() < 0.2:
            aborted.add(number := rng.choice(sorted(asked)))
            loop.abort(number)
        for number, completion in loop.round():
            assert number not in done
            if completion.finished:
                done[number] = completion.token_ids
        stats = loop.stats()
        assert stats.num_free_blocks + sum({b: 1 for t in tables[-1] for b in t[1]}.values()) == 6
    done |= drain(loop)
    assert set(done) | aborted == set(asked)
    stats = loop.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, 6)
    assert stats.num_preemptions > 0
    assert 0 < stats.num_prefix_hits < stats.num_prefix_queries
    loop.stop()
    return tables, done, asked


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2))])
def test_a_random_walk_leaves_the_ranks_alike(seed: int, path: Path, teams: Teams) -> None:
    (tables, done, asked), (followed, *_) = teams(2).run(walk, path, seed)
    assert tables == followed
    assert any(tables)
    engine = open_loop(TensorParallelGroup(), path).engine
    whole = engine.generate(PROMPTS, SamplingParams(max_new_tokens=40, ignore_eos=True))
    for number, token_ids in done.items():
        which, num_new = asked[number]
        assert token_ids == whole[which].token_ids[:num_new]


def test_a_loop_waits_for_commands_of_other_threads(path: Path, expected: list[list[int]]) -> None:
    """As a service does: one thread steps, others add and abort."""
    loop = open_loop(TensorParallelGroup(), path)
    assert not loop.wait(0.0)
    assert loop.stats().num_waiting == 0
    done: dict[int, list[int]] = {}
    waits: list[bool] = []

    def serve() -> None:
        while not loop.is_stopped:
            waits.append(loop.wait(60.0))  # a missed wake-up would be seen
            done.update({n: c.token_ids for n, c in loop.round() if c.finished})

    server = threading.Thread(target=serve)
    server.start()
    clients = [threading.Thread(target=loop.add, args=(p, PARAMS)) for p in PROMPTS]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    loop.abort(loop.add(PROMPTS[0], LONG))
    while len(done) < 4 or loop.has_work:
        time.sleep(0.001)
    assert sorted(done.values()) == sorted(expected)
    loop.stop()
    server.join(30.0)
    assert not server.is_alive(), "a stop wakes up who waits"
    with pytest.raises(RequestFailed, match="stopped"):
        loop.add(PROMPTS[0], PARAMS)
    assert not loop.wait(60.0)


def test_stats_count_what_no_round_has_seen(path: Path) -> None:
    loop = open_loop(TensorParallelGroup(), path)
    for prompt in PROMPTS:
        loop.add(prompt, PARAMS)
    loop.abort(77)
    assert (loop.stats().num_running, loop.stats().num_waiting) == (0, 4)
    loop.round()
    stats = loop.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_blocks) == (4, 0, 40)
    assert stats.num_free_blocks == 40 - sum(-(-len(p) // 16) for p in PROMPTS)
    assert stats.num_prefix_queries == sum(map(len, PROMPTS))
