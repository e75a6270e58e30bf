# SPDX-License-Identifier: Apache-2.0
"""Decode steps as captured graphs: what they answer, what they launch, and where there are none."""

from __future__ import annotations

import logging

import pytest
import torch
from support import checkpoints

from gptneox.devices.npu.device import NpuDevice
from gptneox.devices.npu.operators import has_graph_updates
from gptneox.devices.npu.steps import NpuPagedStep
from gptneox.engine.sequence import SamplingParams

NUM_NEW = 16


@pytest.fixture
def make_engine(tmp_path):
    """Makes an engine of a fresh device, so that nothing of another one is left in it."""

    def make(graphs, name="gpt-neox-20b", **settings):
        path = tmp_path / name
        if not path.exists():
            checkpoints.write_checkpoint(path, checkpoints.FAMILY[name], dtype=torch.float16)
        device = NpuDevice()
        device.setup(0)
        return checkpoints.load_engine(path, device, "auto", graphs=graphs, **settings)

    return make


def answers(engine, vocab=288):
    """Requests that join and leave: batches of 5 down to 1, blocks that fill up on the way."""
    lengths = (3, 120, 40, 9, 126)
    params = [
        SamplingParams(max_new_tokens=NUM_NEW - 3 * i, ignore_eos=True, logprobs=0)
        for i in range(len(lengths))
    ]
    outputs = engine.generate(checkpoints.prompts(lengths, vocab, seed=4), params)
    return [(o.token_ids, [step.logprob for step in o.logprobs]) for o in outputs]


SETTINGS = {"num_blocks": 14, "max_batch_size": 5}


@pytest.fixture
def a2(npu, chip):
    if chip != "A2":
        pytest.skip("of an A2")
    if not has_graph_updates(npu.torch_npu):
        pytest.skip("this torch_npu has no update of captured operators")


@pytest.mark.parametrize(
    ("name", "block_size", "cache"),
    [
        ("gpt-neox-20b", 128, "auto"),
        ("redpajama-incite-3b", 16, "auto"),
        ("gpt-neox-20b", 128, "int8"),
    ],
)
def test_replays_answer_as_steps_do(a2, make_engine, name, block_size, cache):
    settings = SETTINGS | {"block_size": block_size, "kv_cache_dtype": cache}
    if block_size == 16:
        settings["num_blocks"] = 60
    expected = answers(make_engine("off", name, **settings))
    engine = make_engine("on", name, **settings)
    for _ in range(2):  # captured, then known
        found = answers(engine)
        assert [ids for ids, _ in found] == [ids for ids, _ in expected]
        for (_, ours), (_, theirs) in zip(found, expected, strict=True):
            assert ours == theirs  # the same kernels on the same numbers
    assert sorted(engine.runner.step._captured) == [1, 2, 4, 8]


def test_a_step_is_one_launch(a2, make_engine, trace):
    engine = make_engine("on", **SETTINGS)
    answers(engine)
    step, found = engine.runner.step, []

    def traced(batch):
        trace.clear()
        hidden = step(batch)
        found.append(trace.kernels())
        return hidden

    engine.runner.step = traced
    engine.generate(
        checkpoints.prompts([5], 288), SamplingParams(max_new_tokens=4, ignore_eos=True)
    )
    num_layers = checkpoints.FAMILY["gpt-neox-20b"]["num_hidden_layers"]
    copies = ["aclnnInplaceCopy"] * 5  # into the buffers
    updates = ["aclnnFusedInferAttentionScoreV2"] * num_layers  # arguments only
    assert len(found[0]) > len(copies) + num_layers + 1, "a prompt runs as it is"
    fills = ["aclnnInplaceFillScalar"] * 2  # torch_npu 2.9: of its generator of random numbers
    for kernels in found[1:]:
        assert [k for k in kernels if k not in copies + fills] == [*updates, "graph"]
        assert kernels.count("aclnnInplaceCopy") <= len(copies)
        assert kernels.count("aclnnInplaceFillScalar") <= len(fills)


def test_batches_beyond_the_largest_graph_run_as_they_are(a2, make_engine, monkeypatch):
    monkeypatch.setattr("gptneox.devices.npu.operators.MAX_GRAPH_ROWS", 2)
    expected = answers(make_engine("off", **SETTINGS))
    engine = make_engine("on", **SETTINGS)
    assert answers(engine) == expected
    assert sorted(engine.runner.step._captured) == [1, 2]


def test_a_replay_without_an_update_is_caught(a2, make_engine):
    emulator = pytest.importorskip("emulator.operators", reason="a real device would hang")
    engine = make_engine("on", **SETTINGS)
    answers(engine)
    _, replay, _ = engine.runner.step._captured[1]
    with torch.inference_mode(), pytest.raises(emulator.DeviceLimit, match="wait for ever"):
        replay.args[0].replay()


def test_what_cannot_be_captured_is_an_error(a2, make_engine, monkeypatch):
    pytest.importorskip("emulator.operators", reason="the message is the emulator's")
    engine = make_engine("on", **SETTINGS)
    attend = NpuPagedStep.attend_rotated

    def waits(self, layer, q, *args):
        q.sum().item()
        return attend(self, layer, q, *args)

    monkeypatch.setattr(NpuPagedStep, "attend_rotated", waits)
    with pytest.raises(RuntimeError, match=r"cannot be captured as a graph \(.*--graphs off"):
        answers(engine)


def test_off_by_default_and_loud_where_there_are_none(make_engine, npu, chip, caplog):
    engine = make_engine("auto", **SETTINGS)
    assert engine.runner.step == engine.runner._forward
    with caplog.at_level(logging.WARNING):
        engine = make_engine("on", **SETTINGS)
    said = [r.message for r in caplog.records if "graphs are on, but" in r.message]
    if chip == "A2" and has_graph_updates(npu.torch_npu):
        assert said == []
        return
    assert engine.runner.step == engine.runner._forward
    reason = "no update of captured" if chip == "A2" else "documented for Atlas A2 only"
    assert [reason in line for line in said] == [True]
