# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend: what needs no GPU, its kernels through Triton's interpreter, and, with
`-m cuda`, everything on a card.

On a card the `device` fixture serves CUDA too, so that test_operators.py, test_model.py
and test_paged.py hold it to the base class and to Hugging Face in fp32.
"""

from __future__ import annotations

import copy
import fcntl
import importlib.util
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import checkpoints
from support.operators import BASE, assert_near, batch_on, make_batch, make_cache, randn
from support.processes import REPO, clean_environ
from support.ranks import free_port

from gptneox.devices import create, select
from gptneox.devices.cache import CacheShape, FloatKV, Int8KV
from gptneox.devices.cuda import operators as cuda_operators
from gptneox.devices.device import Memory
from gptneox.devices.graphs import SIZES, DecodeGraphs
from gptneox.devices.step import ForwardBatch, RotaryTables
from gptneox.engine.paged import PagedEngine
from gptneox.engine.sequence import SamplingParams

# Never in the main environment, where a CUDA build of torch wants exactly its own release. That one
# is not asked either: the interpreter of triton 3.6 fails with the numpy of today.
TRITON = "triton==3.7.0"
SITE = REPO / ".triton_site"  # ignored by git through a file of its own


@pytest.fixture(scope="session")
def triton_environment() -> dict[str, str]:
    """The environment of a process that can import triton; skips where it is not to be had."""
    SITE.mkdir(exist_ok=True)
    (SITE / ".gitignore").write_text("*\n", encoding="ascii")
    with (SITE / ".lock").open("a") as lock:  # tests run side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(SITE.glob(f"{TRITON.replace('==', '-')}.dist-info/RECORD")):
            command = ("pip", "install", "--no-deps", "--upgrade", "--target", str(SITE))
            done = subprocess.run(
                [sys.executable, "-m", *command, TRITON],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                last = done.stderr.strip().splitlines()[-1:]
                pytest.skip(f"{TRITON} cannot be had: {last}")
    inherited = {k: v for k, v in clean_environ().items() if not k.startswith("PYTEST_")}
    return inherited | {
        "PYTHONPATH": os.pathsep.join((str(REPO / "tests"), str(SITE))),
        "TRITON_CACHE_DIR": str(SITE / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }


def run_checks(name: str, folder: Path, environment: dict[str, str], *options: str) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "--tb=short"),
            *("-p", "no:cacheprovider", "-o", "python_files=check_*.py"),
            *("--basetemp", folder / "inner", *options, f"tests/{name}.py"),
        ],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_kernels_through_the_interpreter(triton_environment, tmp_path) -> None:
    run_checks("check_cuda_kernels", tmp_path, triton_environment | {"TRITON_INTERPRET": "1"})


def test_kernels_compile_for_gpus(triton_environment, tmp_path) -> None:
    run_checks("check_cuda_compiles", tmp_path, triton_environment)


@pytest.mark.slow
def test_kernels_compile_for_all_gpus(triton_environment, tmp_path) -> None:
    run_checks("check_cuda_compiles", tmp_path, triton_environment, "-m", "slow")


# -- decode graphs -------------------------------------------------------------------------------


class FakeModel:
    """A step that reads every input of the batch; rows of padding must not be looked at."""

    def __init__(self) -> None:
        self.num_runs, self.num_replays, self.sizes = 0, 0, []

    def step(self, batch: ForwardBatch) -> torch.Tensor:
        self.num_runs += 1
        self.sizes.append(len(batch.q_lens_list))
        unused = batch.slot_mapping < 0
        assert torch.equal(unused, batch.context_lens == 0)
        assert torch.equal(batch.cu_seqlens_q, torch.arange(len(unused) + 1))
        last = (batch.context_lens.clamp(min=1) - 1) // 16
        block = batch.block_tables.gather(1, last[:, None].long()).squeeze(1)
        parts = (batch.input_ids, batch.positions, batch.slot_mapping, batch.context_lens, block)
        return torch.stack([p.double() for p in parts], 1)

    def record(self, batch: ForwardBatch):
        out = self.step(batch)

        def replay() -> None:
            self.num_replays += 1
            out.copy_(self.step(batch))

        return replay, out


def decode_batch(num: int, seed: int = 0) -> ForwardBatch:
    lengths = [((7 * i + 13 * seed) % 60, 1) for i in range(num)]
    batch = make_batch(lengths, 16, seed)
    batch.input_ids = torch.arange(num) + 1000 * seed
    return batch


def test_replayed_steps_equal_eager_ones() -> None:
    model = FakeModel()
    graphs = DecodeGraphs(model.step, model.record, torch.device("cpu"), 4)
    for seed, num in enumerate((3, 1, 4, 2, 3, 5, 8, 6, 1, 256, 130)):
        batch = decode_batch(num, seed)
        expected = FakeModel().step(batch)
        assert torch.equal(graphs(batch), expected)
    assert sorted(graphs._captured) == [1, 2, 4, 8, 160, 256]
    assert model.num_replays == 11
    assert model.num_runs == 6 + 11
    assert set(model.sizes) <= set(SIZES)


def test_prompts_and_large_batches_run_eagerly() -> None:
    model = FakeModel()
    model.step = lambda batch: batch.input_ids
    graphs = DecodeGraphs(model.step, model.record, torch.device("cpu"), 4)
    for lengths in ([(0, 5)], [(3, 1), (0, 2)], [(0, 1)] * (SIZES[-1] + 1)):
        batch = make_batch(lengths, 16)
        assert graphs(batch) is batch.input_ids
    assert not graphs._captured


def test_a_step_that_cannot_be_captured_is_an_error() -> None:
    def record(batch):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    graphs = DecodeGraphs(FakeModel().step, record, torch.device("cpu"), 4)
    with pytest.raises(RuntimeError, match=r"2 sequences .* not permitted when stream") as error:
        graphs(decode_batch(2))
    assert "\n" not in str(error.value)


def test_running_out_of_memory_keeps_its_kind() -> None:
    def record(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    graphs = DecodeGraphs(FakeModel().step, record, torch.device("cpu"), 4)
    with pytest.raises(torch.OutOfMemoryError):
        graphs(decode_batch(1))


def test_graphs_of_a_model_share_a_pool(monkeypatch) -> None:
    """The order of torch's calls around a capture; the pool of a trial is not used again."""
    seen = []

    class Stream:
        def wait_stream(self, other):
            seen.append("wait")

    class Graph:
        def pool(self):
            return "pool"

        def replay(self):
            seen.append("replay")

    @contextmanager
    def graph(made, pool, stream, capture_error_mode):
        seen.append(("capture", pool, capture_error_mode))
        yield

    @contextmanager
    def on(stream):
        yield

    names = {"current_stream": Stream, "Stream": Stream, "CUDAGraph": Graph}
    for name, value in (names | {"graph": graph, "stream": on}).items():
        monkeypatch.setattr(torch.cuda, name, value)
    device, pools = create("cuda"), []
    for expected in (None, "pool"):
        replay, _ = device.record(lambda: seen.append("run"), pools)
        capture = ("capture", expected, "thread_local")
        assert seen == ["wait", "run", "run", "wait", capture, "run"]
        replay()
        assert seen.pop() == "replay"
        seen.clear()
    device.record(lambda: None, [])
    assert seen[2][1] is None


# -- the device's life, without one --------------------------------------------------------------


def test_a_torch_without_cuda_says_so(monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeError, match=r"'cuda' cannot be used: .* without CUDA; install"):
        select("cuda")
    assert create("cuda").diagnose() == []
    with pytest.raises(RuntimeError, match="without CUDA"):
        create("cuda").setup(0)


@pytest.fixture
def gpus(monkeypatch):
    """Four GPUs, as far as torch's functions that ask for them go."""
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    chosen = SimpleNamespace(count=4, available=True, capability=(9, 0), taken=[])
    properties = SimpleNamespace(
        multi_processor_count=132, pci_domain_id=0, pci_bus_id=0xC1, pci_device_id=0
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: chosen.count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: chosen.available)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.taken.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d=None: chosen.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d=None: "Fake H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d=None: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d=None: (3 << 30, 4 << 30))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda d=None: 5)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    products = torch.backends.cuda.matmul
    before = (
        products.allow_fp16_reduced_precision_reduction,
        products.allow_bf16_reduced_precision_reduction,
    )
    yield chosen
    products.allow_fp16_reduced_precision_reduction = before[0]
    products.allow_bf16_reduced_precision_reduction = before[1]


def test_ranks_take_the_visible_gpus_in_order(gpus, monkeypatch) -> None:
    assert select("cuda").name == "cuda"
    for rank in range(4):
        create("cuda").setup(rank, 4)
    assert gpus.taken == [torch.device("cuda", i) for i in range(4)]
    assert create("cuda").count() == 4
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "3,1")
    device = create("cuda")
    device.setup(1, 2)
    assert device.torch_device == gpus.taken[-1] == torch.device("cuda", 1)
    assert device.memory() == Memory(3 << 30, 4 << 30, 5)
    assert device.pci_addresses() == ["0000:c1:00.0"] * 2
    with pytest.raises(RuntimeError, match=r"rank 2 has no GPU: 2 for 3 ranks; .*CUDA_VISIBLE"):
        create("cuda").setup(2, 3)
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,4")
    with pytest.raises(RuntimeError, match="=0,4 names a GPU that is not there: 4 visible"):
        create("cuda").setup(0, 2)


def test_reasons_not_to_use_a_gpu(gpus) -> None:
    gpus.available = False
    assert "bring it up to date" in create("cuda").why_unusable()
    gpus.count = 0
    assert "no GPU is visible" in create("cuda").why_unusable()


def test_diagnosis(gpus, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 29, 3))
    software, *devices = create("cuda").diagnose()
    assert "CUDA 13.0" in software.text
    assert len(devices) == 4
    assert "Fake H200, compute capability 9.0, 3.0 GiB free of 4.0 GiB" in devices[3].text
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "7")
    assert [f.ok for f in create("cuda").diagnose()] == [True, False]


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_bfloat16_needs_compute_capability_8(gpus, capability) -> None:
    gpus.capability = capability
    device = create("cuda")
    dtype, notice = device.resolve_dtype("bfloat16", "auto")
    assert dtype == (torch.bfloat16 if capability >= (8, 0) else torch.float16)
    assert ("bfloat16 weights run in float16: Fake H200" in notice) == (capability < (8, 0))
    assert device.resolve_dtype("bfloat16", "bfloat16") == (torch.bfloat16, "")
    assert device.resolve_dtype("float32", "auto") == (torch.float32, "")


@pytest.mark.parametrize(
    ("capability", "has_triton", "words"),
    [((7, 5), True, "need compute capability 8.0, Fake H200 has 7.5"),
     ((9, 0), False, "triton is not installed")],
)  # fmt: skip
def test_without_kernels_torch_serves(gpus, capability, has_triton, words, monkeypatch, caplog):
    gpus.capability = capability
    find = importlib.util.find_spec
    module = "json" if has_triton else "no_such_thing"
    monkeypatch.setattr(cuda_operators.importlib.util, "find_spec", lambda _: find(module))
    ops = create("cuda").operators()
    paged, steps, *_ = ops.operator_table(2, 96, 128, FloatKV(torch.float16))
    assert (paged.operator, steps.operator) == ("torch, fp32", "eager")
    assert words in paged.reason
    assert words in caplog.text
    found = ops.describe_operators(96, 24, 128, FloatKV(torch.bfloat16))
    assert [f.ok for f in found] == [None, None, True, True, True if capability >= (8, 0) else None]
    step = object()
    assert ops.capture(step) is step


def test_out_of_memory_is_one_line_with_a_remedy(gpus, monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nGPU 0 …")

    ops = create("cuda").operators()
    monkeypatch.setattr(ops, "operator_table", lambda *shapes: [])
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(RuntimeError) as error:
        ops.allocate_kv_cache(CacheShape(64, 128, 16, 128), FloatKV(torch.float16))
    text = "the KV cache (0.06 GiB per layer): 3.00 GiB free of 4.00 GiB; .* lower --num_blocks"
    assert error.match(text.replace("(", r"\(").replace(")", r"\)"))
    assert "\n" not in str(error.value)
    weight = SimpleNamespace(contiguous=refuse, shape=(1, 1))
    with pytest.raises(RuntimeError, match=r"memory for the weights: 3\.00 GiB"):
        ops.pack_linear(weight, None)


# -- on a card -----------------------------------------------------------------------------------


@pytest.fixture
def card():
    device = create("cuda")
    if reason := device.why_unusable():
        pytest.skip(reason)
    device.setup(0)
    return device


@pytest.mark.cuda
def test_the_card_takes_its_own_kernels(card) -> None:
    """Otherwise the tests below would compare torch with torch."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        paged, steps, *_ = card.operators().operator_table(4, 96, 128, FloatKV(dtype))
        assert paged.operator == "Triton", paged.reason
        assert steps.operator == "CUDA graphs", steps.reason
        [paged, *_] = card.operators().operator_table(4, 96, 128, Int8KV(dtype))
        assert paged.operator == "Triton", paged.reason


@pytest.mark.cuda
@given(
    decodes=st.lists(st.integers(0, 3000), max_size=20),
    prompts=st.lists(st.tuples(st.integers(0, 600), st.integers(2, 600)), max_size=4),
    block_size=st.sampled_from((16, 32, 128, 256)),
    heads=st.sampled_from((1, 3, 8, 16)),
    head_dim=st.sampled_from((16, 32, 48, 64, 80, 96, 128, 256)),
    share=st.sampled_from((8, 4, 2)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_shapes(card, decodes, prompts, block_size, heads, head_dim, share, dtype, seed):
    lengths = [(n, 1) for n in decodes] + prompts
    if not lengths:
        return
    batch = make_batch(lengths, block_size, seed)
    num = sum(batch.q_lens_list)
    qkv = torch.stack(
        [randn(num, heads, head_dim, seed=seed + i, dtype=dtype) for i in range(3)], 2
    )
    qkv[:, :, 0] *= 2
    angles = 7 * randn(max(batch.context_lens_list), head_dim // share, seed=seed + 3)
    results = []
    for which in (BASE, card.operators()):
        cache = make_cache(which, batch, block_size, heads, head_dim, dtype)
        place = which.torch_device
        tables = RotaryTables(angles.cos().to(place), angles.sin().to(place))
        out = cache.begin(batch_on(batch, place), tables).attend(0, qkv.to(place))
        results.append((out, *(x.cpu().nan_to_num() for x in cache.layers[0])))
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert_near(ours, theirs)


def greedy(engine: PagedEngine, prompts: list[list[int]], num: int) -> list[list[int]]:
    params = SamplingParams(max_new_tokens=num, ignore_eos=True)
    return [o.token_ids for o in engine.generate(prompts, params)]


@pytest.mark.cuda
@pytest.mark.parametrize("name", sorted(checkpoints.FAMILY))
def test_graphs_equal_eager_steps(card, name, tmp_path) -> None:
    checkpoints.write_checkpoint(tmp_path, checkpoints.FAMILY[name], sharpness=2.0)
    prompts = checkpoints.prompts(
        [40, 3, 1, 17, 60], checkpoints.FAMILY[name]["vocab_size"], seed=1
    )
    sizes = {"num_blocks": 60, "block_size": 16, "max_batch_size": 5, "max_prefill_tokens": 32}
    engine = checkpoints.load_engine(tmp_path, card, **sizes)
    assert isinstance(engine.runner.step, DecodeGraphs)
    replayed = greedy(engine, prompts, 50)
    assert engine.runner.step._captured
    engine.runner.step = engine.runner.step.step
    assert greedy(engine, prompts, 50) == replayed
    assert (
        greedy(checkpoints.load_engine(tmp_path, create("cpu"), **sizes), prompts, 50) == replayed
    )


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gpt-neox-20b", "pythia-2.8b", "pythia-1b", "relu-serial"])
def test_half_precision_against_hugging_face(card, name, dtype, tmp_path) -> None:
    """Whatever is chosen is as likely as the best choice, within Hugging Face's own rounding."""
    model = checkpoints.write_checkpoint(tmp_path, checkpoints.FAMILY[name], dtype=dtype)
    half = copy.deepcopy(model).to(dtype)
    prompts = checkpoints.prompts([40, 3, 17], checkpoints.FAMILY[name]["vocab_size"], seed=3)
    engine = checkpoints.load_engine(tmp_path, card, "auto", num_blocks=40, max_batch_size=3)
    for prompt, new in zip(prompts, greedy(engine, prompts, 64), strict=True):
        ids = torch.tensor([prompt + new])
        exact = model(ids).logits[0]
        error = (half(ids).logits[0].float() - exact).abs().max()
        rows = exact[len(prompt) - 1 : -1]
        chosen = rows.gather(1, torch.tensor(new)[:, None]).squeeze(1)
        assert (rows.max(1).values - chosen).max() <= 3 * error


@pytest.mark.cuda
def test_two_ranks_equal_one(card, tmp_path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    checkpoints.write_checkpoint(tmp_path, checkpoints.FAMILY["pythia-14m"], sharpness=2.0)
    prompts = [",".join(map(str, p)) for p in checkpoints.prompts([30, 5, 9], 304, seed=2)]
    answers = []
    for ranks in (1, 2):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)),
                *("--master_port", str(free_port()), "main.py", "--device", "cuda"),
                *("--model_path", tmp_path),
                *("--attention", "paged", "--load_tokenizer", "False", "--input_ids", *prompts),
                *("--max_output_length", "40", "--max_batch_size", "3", "--ignore_eos"),
            ],
            cwd=REPO,
            env=clean_environ(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        answers.append([line for line in done.stdout.splitlines() if "Answer" in line])
    assert answers[0] == answers[1]
    assert len(answers[0]) == 3
