# SPDX-License-Identifier: Apache-2.0
"""tools/bench.py: flags, seals, checkpoints, the protocol, figures, whole runs, the document."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.processes import REPO

sys.path.append(str(REPO / "tools"))

import bench
from benchmark import arguments, engines, figures, models, results, seal, tasks, traffic
from benchmark.arguments import Case
from benchmark.engines import OURS, Engine
from benchmark.errors import UsageError, WorkerError
from benchmark.process import WorkerProcess, worker_environment
from benchmark.session import Contestant, Options, Session, contestants, prompts
from benchmark.traffic import Lengths
from benchmark.workers.tensors import Tensors, query_key_value
from benchmark.workers.worker import SteppingWorker

from gptneox.config.model import ModelConfig
from gptneox.evaluation.timing import prefill_flops
from gptneox.weights.formats import scheme_of
from gptneox.weights.load import check_weights

TINY = models.Shape(2, 32, 2, vocab_size=96, max_position_embeddings=128)

# An engine that counts: its tokens are those after the prompt's last one.
FAKE_WORKER = """
import os, subprocess, sys, threading, time
from benchmark.workers.worker import Worker, serve

class Fake(Worker):
    def load(self, load):
        print("noise on standard output")
        os.system("echo noise of a child")
        if os.environ.get("SPIN"):
            threading.Thread(target=self.spin, daemon=True).start()
        if os.environ.get("CHILD"):
            self.child = subprocess.Popen(["sleep", "1000"])
            return {"dtype": load.dtype, "child": self.child.pid}
        return {"dtype": load.dtype}

    def spin(self):
        while True:
            pass

    def prepare(self, batch, prompt, output):
        if os.environ.get("FAIL") == "prepare":
            raise RuntimeError("no such luck")

    def generate(self, prompts, num_new):
        if os.environ.get("FAIL") == "die":
            sys.stderr.write("last words\\n")
            sys.stderr.flush()
            os._exit(7)
        if os.environ.get("FAIL") == "hang":
            time.sleep(1000)
        moments = []
        for _ in range(num_new - (os.environ.get("FAIL") == "short")):
            time.sleep(float(os.environ.get("PAUSE", "0.001")))
            moments.append(time.perf_counter())
        new = [[(row[-1] + i + 1) % 96 for i in range(len(moments))] for row in prompts]
        return new, [moments] * len(prompts)

    def arrivals(self, requests):
        return [[at + 0.5 + 0.25 * i for i in range(new)] for at, _, new in requests]

serve(Fake())
"""


def quiet(_: str) -> None:
    pass


@pytest.fixture
def fake(tmp_path: Path) -> Engine:
    """An engine whose worker is FAKE_WORKER."""
    folder = tmp_path / "fake"
    folder.mkdir()
    (folder / "fake_worker.py").write_text(FAKE_WORKER)
    paths = {"PYTHONPATH": f"{REPO}:{folder}"}
    return Engine("fake", "fake_worker", takes_arrivals=True, environment=paths)


@pytest.fixture
def start(fake: Engine, tmp_path: Path):
    """Starts fake workers and ends them."""
    started = []

    def make(timeout_s: float = 20.0, **extra: str) -> WorkerProcess:
        environment = worker_environment(
            {}, {**fake.environment, **extra}, 1, same_interpreter=True
        )
        log = tmp_path / "logs" / "fake.log"
        python = Path(sys.executable)
        started.append(WorkerProcess("fake", python, fake.module, environment, log, timeout_s))
        started[-1].ask("load", **load_arguments(tmp_path))
        return started[-1]

    yield make
    for process in started:
        process.close()


def load_arguments(folder: Path) -> dict:
    return {
        "model": str(folder),
        "converted": None,
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "cases": [[1, 4, 3]],
        "prefill_tokens": 4,
        "scratch": str(folder),
    }


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.make_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny", TINY, "float32", quiet)


# -- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--batch", "1,zero"], ["--batch", "'zero'", "whole number"]),
        (["--batch", "8,8"], ["--batch", "twice"]),
        (["--runs", "0"], ["--runs", "'0'"]),
        (["--dtype", "int8"], ["--dtype", "int8", "bfloat16"]),
        (["--against", "onnx"], ["'onnx'", "transformers"]),
        (["--against", "vllm,vllm"], ["name of its own"]),
        (["--variant", "slow"], ["'slow'", "NAME:KEY=VALUE"]),
        (["--variant", "vllm:A=1"], ["'vllm'", "another"]),
        (["--output", "1"], ["--output", "2"]),
        (["--points", "1,2"], ["--points", "--curve"]),
        (["--curve", "batch", "--overhead"], ["--curve", "--overhead"]),
        (["--overhead", "--against", "vllm"], ["--overhead", "vllm"]),
        (["--curve", "requests", "--against", "llama.cpp"], ["llama.cpp", "vllm"]),
        (["--scheme", "int4"], ["--scheme", "int4", "w8a8"]),
        (["--scheme", "w4a16", "--against", "ctranslate2"], ["eight bits at least", "llama.cpp"]),
        (["--scheme", "w8a16", "--against", "vllm"], ["vllm", "none is made", "ctranslate2"]),
        (["--scheme", "w8a8", "--against", "transformers"], ["transformers", "widen"]),
        (["--scheme", "w8a8", "--variant", "gptneox bfloat16:A=1"], ["name of its own"]),
        (["--arrivals", "-1"], ["--arrivals", "'-1'"]),
        (["--write-docs", "x.md"], ["--write-docs", "--from"]),
        (["--unheard-of"], ["--unheard-of"]),
        (["--model", "no/such/place"], ["no/such/place", "pythia-160m"]),
        (["--against", "llama.cpp", "--cache", "/nonexistent"], ["llama.cpp", "--install"]),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench.main(argv) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("bench.py: error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_cases_of_curves_end_where_the_positions_end():
    def found(*argv: str) -> list[Case]:
        return arguments.cases(arguments.parse(argv), 2048)

    assert found("--batch", "1,8") == [Case(1, 256, 64), Case(8, 256, 64)]
    assert [case.batch for case in found("--curve", "batch")] == [1, 2, 4, 8, 16, 32, 64]
    assert found("--curve", "prompt", "--points", "16,2048") == [Case(1, 16, 2), Case(1, 2046, 2)]
    context = found("--curve", "context", "--batch", "1,8", "--output", "32")
    assert [case.prompt + case.output for case in context] == [128, 256, 512, 1024, 2048] * 2
    with pytest.raises(UsageError, match="2100 positions, the model has 2048"):
        found("--prompt", "2036")
    with pytest.raises(UsageError, match="longer than --output 64"):
        found("--curve", "context", "--points", "64")


def test_the_document_names_real_flags_only():
    text = (REPO / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    flags = (arguments.parser(), arguments.service_parser())
    known = {flag for each in flags for action in each._actions for flag in action.option_strings}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - {"--task"}
    assert named <= known, named - known
    assert known - {"-h", "--help", "--install", "--max-batch"} <= named | {"--no"}, known - named
    assert text.count(results.BEGIN) == text.count(results.END) == 1


# -- folders that are whole ----------------------------------------------------------------------


def test_a_folder_is_built_once_and_again_when_it_is_not_whole(tmp_path):
    folder, built = tmp_path / "cache" / "thing", []

    def build(target: Path) -> None:
        assert not list(target.glob("*.bin"))
        built.append(target)
        (target / "a.bin").write_bytes(b"1234")

    recipe = {"version": 1}
    for _ in range(2):
        assert seal.make(folder, recipe, build, quiet) == folder
    assert len(built) == 1
    (folder / "a.bin").write_bytes(b"123")  # cut short
    assert not seal.is_sealed(folder, recipe)
    seal.make(folder, recipe, build, quiet)
    seal.make(folder, {"version": 2}, build, quiet)
    assert len(built) == 3
    assert not seal.is_sealed(folder, recipe)


def test_an_interrupted_build_does_not_count(tmp_path):
    folder = tmp_path / "thing"

    def interrupted(target: Path) -> None:
        (target / "a.bin").write_bytes(b"12")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        seal.make(folder, {}, interrupted, quiet)
    assert (folder / "a.bin").is_file()
    assert not seal.is_sealed(folder, {})
    seal.make(folder, {}, lambda target: (target / "b.bin").touch(), quiet)
    assert seal.is_sealed(folder, {})
    assert not (folder / "a.bin").exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RuntimeError, match="not made here"):
        seal.make(tmp_path, {}, lambda _: None, quiet)
    assert (tmp_path / "thesis.txt").is_file()


def test_two_builders_at_once_build_once(tmp_path):
    built, notices = [], []

    def build(target: Path) -> None:
        built.append(target)
        time.sleep(0.2)

    def make() -> None:
        seal.make(tmp_path / "thing", {}, build, notices.append)

    threads = [threading.Thread(target=make) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert any("waiting" in notice for notice in notices)


# -- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_random_checkpoints_are_whole_and_the_same_each_time(dtype, tmp_path):
    first = models.make_checkpoint(tmp_path / "a", TINY, dtype, quiet)
    second = models.make_checkpoint(tmp_path / "b", TINY, dtype, quiet)
    tensors = load_file(first / "model.safetensors")
    assert {x.dtype for x in tensors.values()} == {getattr(torch, dtype)}
    config = ModelConfig.from_pretrained(first)
    assert config.dtype == dtype
    assert sum(x.numel() for x in tensors.values()) == config.num_parameters
    name = "model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()
    weight = tensors["embed_out.weight"].float()
    assert weight.std().item() == pytest.approx(TINY.hidden_size**-0.5, rel=0.1)
    norm = tensors["gpt_neox.final_layer_norm.weight"].float()
    assert norm.mean().item() == pytest.approx(1, abs=0.02)


def test_large_checkpoints_come_in_shards_with_the_same_values(tmp_path, monkeypatch):
    whole = models.make_checkpoint(tmp_path / "whole", TINY, "float32", quiet)
    monkeypatch.setattr(models, "MAX_SHARD_BYTES", 20_000)
    cut = models.make_checkpoint(tmp_path / "cut", TINY, "float32", quiet)
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    shards = {name: load_file(cut / name) for name in set(index["weight_map"].values())}
    assert len(shards) > 2
    for name, x in load_file(whole / "model.safetensors").items():
        assert torch.equal(shards[index["weight_map"][name]][name], x)


def test_the_shapes_have_the_published_sizes():
    sizes = {"pythia-14m": 14e6, "pythia-160m": 162e6, "pythia-1.4b": 1.41e9, "neox-20b": 20.55e9}
    for name, size in sizes.items():
        config = ModelConfig.from_dict(models.SHAPES[name].config("float16"))
        assert config.num_parameters == pytest.approx(size, rel=0.01)


def test_a_changed_checkpoint_has_other_conversions(tiny_model, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tiny_model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    before = models.open_model(str(copy), "float32", tmp_path, quiet)
    assert before.name == "copy"
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes() + b" ")
    assert models.open_model(str(copy), "float32", tmp_path, quiet).key != before.key


def test_tensors_are_read_without_torch(tmp_path):
    exact = torch.randn(5, 3)
    stored = {
        "a": exact,
        "b": exact.bfloat16(),
        "c": exact.half(),
        "lm_head.weight": exact[:2].clone(),
    }
    save_file(stored, tmp_path / "model.safetensors")
    tensors = Tensors(tmp_path)
    for name, x in stored.items():
        assert tensors.shape(name) == tuple(x.shape)
        np.testing.assert_array_equal(tensors(name), x.float().numpy())
    np.testing.assert_array_equal(tensors.head(), exact[:2].numpy())


def test_query_key_value_are_taken_apart_by_kind():
    config = ModelConfig.from_dict(TINY.config("float32"))
    heads, dim = config.num_heads, config.head_dim
    x = np.arange(heads * 3 * dim, dtype=np.float32)
    y = query_key_value(x, config)
    expected = [
        x[(h * 3 + kind) * dim + d] for kind in range(3) for h in range(heads) for d in range(dim)
    ]
    np.testing.assert_array_equal(y, expected)
    wide = np.stack([x, -x], axis=1)
    np.testing.assert_array_equal(query_key_value(wide, config), np.stack([y, -y], axis=1))


# -- figures -------------------------------------------------------------------------------------


def test_figures_of_a_run_by_hand():
    case = Case(2, 10, 3)
    times = [[1.0, 1.5, 2.0], [2.0, 2.5, 4.0]]  # the second row begins when the first is done
    answer = {"times": times, "token_ids": [[7, 8, 9], [5, 5, 5]], "peak_bytes": 123}
    run = figures.run_figures(answer, case)
    assert run["prefill_s"] == 2.0
    assert run["first_token_ms"] == 1500
    assert run["prefill_tokens_per_s"] == 10
    assert run["decode_tokens_per_s"] == 1.0  # two tokens in the two seconds after the last prompt
    assert run["inter_token_ms"] == [500, 500, 500, 1500]
    assert run["first_token_ids"] == [7, 5]
    assert figures.intervals_ms([[1.0, 2.0], [1.0, 2.0]]) == [1000]  # rows that move together


def test_shares_count_the_bytes_and_operations_of_the_model():
    config = ModelConfig.from_dict(models.SHAPES["pythia-160m"].config("bfloat16"))
    run = {"decode_tokens_per_s": 80.0, "prefill_s": 0.5}
    limits = {"bandwidth": 40e9, "matmul": 800e9}
    size = figures.size_of(config, "bfloat16")
    shares = figures.shares(run, Case(8, 256, 64), size, limits)
    num_bytes = size.decode_bytes(8, 288)
    assert num_bytes == 2 * config.num_decode_parameters + 8 * 288 * 2 * 12 * 768 * 2
    smaller = figures.size_of(config, "bfloat16", "int8").decode_bytes(8, 288)
    assert num_bytes - smaller == 8 * 288 * 2 * 12 * (768 - 12 * 4)
    assert shares["share_of_bandwidth"] == pytest.approx(num_bytes / 0.1 / 40e9)
    assert shares["share_of_matmul"] == pytest.approx(prefill_flops(config, 8, 256) / 0.5 / 800e9)


def test_shares_count_the_bytes_of_quantized_weights():
    config = ModelConfig.from_dict(TINY.config("bfloat16"))
    formats = figures.stored_bits(config, 4.5, 16)
    bits = figures.size_of(config, "bfloat16", formats=formats).decode_weight_bytes
    layers = 2 * 32 * (3 * 32 + 32 + 2 * 4 * 32)
    rest = config.num_decode_parameters - layers  # norms, biases, the head
    assert bits == layers * 4.5 / 8 + rest * 2
    # A peer whose head is quantized, and the rest in float32.
    formats = figures.stored_bits(config, 8, 8)
    bits = figures.size_of(config, "float32", formats=formats).decode_weight_bytes
    assert bits == layers + 96 * 32 + (rest - 96 * 32) * 4


def test_ratios_pair_the_rounds():
    def run(speed: float) -> dict:
        return dict.fromkeys(figures.COMPARED, speed) | {"first_token_ids": [1, int(speed)]}

    ours, theirs = [run(10), run(4), run(9)], [run(5), run(4), run(3)]
    ratio = figures.ratios(ours, theirs)["decode_tokens_per_s"]
    assert ratio == {"median": 2, "min": 1, "max": 3}
    assert figures.agreement(ours, theirs) == 4 / 6


def test_first_tokens_of_requests_count_from_their_arrival():
    requests = [(0.0, [1] * 10, 2), (2.0, [1] * 30, 3)]
    times = [[0.5, 1.0], [3.0, 3.25, 4.0]]
    run = figures.arrival_figures({"times": times, "peak_bytes": 1}, requests)
    assert run["seconds"] == 4
    assert run["output_tokens_per_s"] == 5 / 4
    assert run["prompt_tokens_per_s"] == 10
    assert run["first_token_ms"]["p50"] == 750
    assert run["inter_token_ms"]["p50"] == 500


def test_requests_are_drawn_alike_every_time():
    requests = traffic.draw_requests(400, 4.0, Lengths(16, 8), 96)
    assert requests == traffic.draw_requests(400, 4.0, Lengths(16, 8), 96)
    moments = [at for at, _, _ in requests]
    assert moments[0] == 0
    assert moments == sorted(moments)
    assert moments[-1] == pytest.approx(100, rel=0.2)
    lengths = [len(prompt) for _, prompt, _ in requests]
    assert (min(lengths), max(lengths)) == (1, 31)
    assert {new for _, _, new in requests} == set(range(1, 16))
    assert all(1 <= token < 96 for _, prompt, _ in requests for token in prompt)


def test_prompts_of_a_round_are_fixed_and_differ_between_rounds():
    case = Case(2, 16, 4)
    assert prompts(96, case, 1) == prompts(96, case, 1) != prompts(96, case, 2)
    assert all(1 <= token < 96 for row in prompts(96, case, 1) for token in row)


class Queue(SteppingWorker):
    """Two requests run at once, one token each per step."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}
        self.most = 0

    def add(self, prompt: list[int], num_new: int) -> str:
        name = f"{len(prompt)}"
        self.left[name] = num_new
        return name

    def step(self) -> list[tuple[str, list[int]]]:
        time.sleep(0.001)
        running = [name for name, left in self.left.items() if left][:2]
        self.most = max(self.most, sum(map(bool, self.left.values())))
        for name in running:
            self.left[name] -= 1
        return [(name, [self.left[name]]) for name in running]


def test_steps_become_rows():
    token_ids, moments = Queue().generate([[1], [1, 1], [1, 1, 1]], 3)
    assert token_ids == [[2, 1, 0]] * 3
    assert moments[0] == moments[1]
    assert moments[2][0] > moments[0][-1]


def test_requests_wait_for_their_time():
    queue = Queue()
    times = queue.arrivals([(0.0, [1], 2), (0.02, [1, 1], 2), (0.2, [1, 1, 1], 2)])
    assert [len(row) for row in times] == [2, 2, 2]
    assert times[1][0] >= 0.02
    assert times[2][0] >= 0.2
    assert queue.most <= 2


# -- the protocol --------------------------------------------------------------------------------


def test_an_answer_is_what_the_worker_returned(start):
    answer = start().ask("run", prompts=[[5], [94]], num_new=3)
    assert answer["token_ids"] == [[6, 7, 8], [95, 0, 1]]
    assert len(answer["times"]) == 2
    assert 0 < answer["times"][0][0] < answer["times"][0][2] <= answer["seconds"]
    assert answer["peak_bytes"] > 1 << 20


def test_a_waiting_process_takes_no_processor_time(start):
    process = start(SPIN="1")
    process.ask("run", prompts=[[5]], num_new=3)
    time.sleep(0.05)  # until the signal has arrived
    before = process.cpu_seconds()
    time.sleep(0.3)
    assert process.cpu_seconds() == before
    process.ask("run", prompts=[[5]], num_new=30)  # it runs again, and its thread spins
    assert process.cpu_seconds() > before


def test_what_a_process_started_ends_with_it(start, tmp_path):
    process = start(CHILD="1")
    child = process.ask("load", **load_arguments(tmp_path))["child"]
    assert Path(f"/proc/{child}").exists()
    process.close()
    assert gone(child)


def test_a_stopped_process_does_not_outlive_its_parent(fake, tmp_path):
    code = f"""
import os, sys
from pathlib import Path
from benchmark.process import WorkerProcess, worker_environment
environment = worker_environment({{}}, {dict(fake.environment)!r}, 1, same_interpreter=True)
log = Path({str(tmp_path / "log")!r})
process = WorkerProcess("fake", Path(sys.executable), "fake_worker", environment, log)
process.ask("load", **{load_arguments(tmp_path)!r})
print(process._process.pid, flush=True)
os._exit(1)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=REPO / "tools", capture_output=True, text=True, timeout=60, check=False
    )
    assert gone(int(done.stdout)), done.stderr


def gone(process_id: int) -> bool:
    """Whether a process ends within two seconds, or only waits to be collected."""
    stat = Path(f"/proc/{process_id}/stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        ("short", "3 new tokens were asked for, rows of \\[2\\] came"),
        ("die", "status 7 during run(.|\\n)*last words"),
        ("hang", "no answer to run within 0.2 s"),
    ],
)
def test_failures_of_a_worker_are_told(fail, message, start):
    process = start(FAIL=fail)
    process.timeout_s = 0.2 if fail == "hang" else 20
    with pytest.raises(WorkerError, match=message):
        process.ask("run", prompts=[[5]], num_new=3)


def test_a_worker_sees_its_own_packages_only():
    base = {"PYTHONPATH": "/mine", "PYTHONHOME": "/home", "PATH": "/bin"}
    own = worker_environment(base, {"A": "1"}, 3, same_interpreter=False)
    assert own["PYTHONPATH"] == str(REPO)
    assert "PYTHONHOME" not in own
    assert (own["A"], own["PATH"], own["OMP_NUM_THREADS"]) == ("1", "/bin", "3")
    same = worker_environment(base, {}, 3, same_interpreter=True)
    assert same["PYTHONPATH"] == f"{REPO}:/mine"


def test_an_engine_that_is_not_installed_names_the_flag(tmp_path):
    with pytest.raises(UsageError, match="add --install"):
        engines.interpreter(engines.ENGINES["vllm"], tmp_path)
    (tmp_path / "peers" / "vllm" / "bin").mkdir(parents=True)  # begun, not finished
    with pytest.raises(UsageError, match="add --install"):
        engines.interpreter(engines.ENGINES["vllm"], tmp_path)


@pytest.mark.slow
def test_an_engine_is_installed_into_its_own_environment(tmp_path):
    engine = Engine("tiny", "nothing", (("--version",), ("list",)))
    engines.install(engine, tmp_path, quiet)
    python = engines.interpreter(engine, tmp_path)
    assert python.is_file()
    assert tmp_path in python.parents
    broken = Engine("broken", "nothing", (("no-such-command",),))
    with pytest.raises(RuntimeError, match=r"no-such-command ended with status .*broken\.log"):
        engines.install(broken, tmp_path, quiet)
    with pytest.raises(UsageError):
        engines.interpreter(broken, tmp_path)


# -- engines side by side ------------------------------------------------------------------------


class FakeMachine(Session):
    """A session whose limits are given."""

    def measure_limits(self) -> None:
        self.limits = {"description": "paper", "free_bytes": 1 << 40}
        self.device = "cpu"
        self._measure_matmul()

    def _measure_matmul(self) -> None:
        self.matmul = {"float32": 1e12}

    def bandwidth(self) -> float:
        return 1e10


@pytest.fixture
def session(tiny_model, tmp_path):
    model = models.open_model(str(tiny_model), "float32", tmp_path, quiet)
    with FakeMachine(model, Options("cpu", "float32", 1, tmp_path, 20.0), quiet) as made:
        made.measure_limits()
        yield made


def test_engines_take_turns_on_the_same_prompts(session, fake):
    case = Case(2, 4, 5)
    pair = [Contestant(OURS, fake), Contestant("slow", fake, {"PAUSE": "0.02"})]
    session.load(pair, [case], 8)
    measured = session.measure(case, 3)
    assert [list(r["runs"]) for r in measured["rounds"]] == [[OURS, "slow"]] * 3
    ratio = measured["ratios"]["slow"]["decode_tokens_per_s"]
    assert 1 < ratio["min"] <= ratio["median"] <= ratio["max"]
    assert measured["agreement"] == {"slow": 1.0}
    for one in measured["rounds"]:
        assert all(run["idle_engines_cpu_s"] == 0 for run in one["runs"].values())
    assert not session.notes


@pytest.mark.parametrize("fail", ["prepare", "die", "hang", "short"])
def test_a_peer_that_fails_is_left_out_with_a_note(fail, session, fake):
    case = Case(1, 4, 3)
    session.load([Contestant(OURS, fake), Contestant("bad", fake, {"FAIL": fail})], [case], 4)
    for contestant in session.contestants:
        contestant.process.timeout_s = 1.0
    measured = session.measure(case, 2)
    assert list(measured["summary"]) == [OURS]
    assert [c.name for c in session.contestants] == [OURS]
    assert session.notes[0].startswith("bad is left out (bad: ")
    assert "/" not in session.notes[0]  # nobody else has this machine's log


def test_our_own_failure_ends_the_measurement(session, fake):
    session.load([Contestant(OURS, fake, {"FAIL": "prepare"})], [Case(1, 4, 3)], 4)
    with pytest.raises(WorkerError, match="no such luck"):
        session.measure(Case(1, 4, 3), 1)


def test_what_cannot_fit_is_refused_before_it_is_loaded(session, fake):
    session.limits["free_bytes"] = 300_000
    with pytest.raises(RuntimeError, match="3 engines hold tiny"):
        session.load([Contestant(n, fake) for n in (OURS, "b", "c")], [Case(1, 4, 3)], 4)
    assert not session.contestants


def test_of_what_cannot_fit_the_float_weights_are_left_out(session, fake):
    """They are beside quantized ones unless there is no memory for both; nothing has failed."""
    session.options = dataclasses.replace(session.options, scheme="w8a8")
    one = figures.size_of(session.model.config, "float32").weight_bytes
    session.limits["free_bytes"] = 1.4 * one
    names = [OURS, "gptneox float32"]
    pair = [Contestant(names[0], fake, weights="w8a8"), Contestant(names[1], fake)]
    assert session._fitting(pair, [Case(1, 4, 3)]) == pair[:1]
    assert session.notes == ["gptneox float32 is left out: there is no memory for it"]
    assert session.is_whole
    session.limits["free_bytes"] = 3 * one
    assert session._fitting(pair, [Case(1, 4, 3)]) == pair
    session.limits["free_bytes"] = 100
    with pytest.raises(RuntimeError, match="1 engines hold tiny"):
        session._fitting(pair, [Case(1, 4, 3)])


def test_each_engine_gets_its_form_of_a_scheme():
    found = contestants(["llama.cpp", "ctranslate2"], [("v", {"A": "1"})], "w8a8", "float16")
    assert [(c.name, c.weights) for c in found] == [
        (OURS, "w8a8_dynamic"),
        ("gptneox float16", ""),
        ("v", "w8a8_dynamic"),
        ("llama.cpp", "Q8_0"),
        ("ctranslate2", "int8"),
    ]
    assert [c.name for c in contestants([], [])] == [OURS]


def test_requests_over_time_become_a_table(session, fake, tmp_path):
    argv = ["--curve", "requests", "--points", "1,7", "--prompt", "4", "--output", "3"]
    args = arguments.parse([*argv, "--runs", "2"])
    session.load([Contestant(OURS, fake)], [Case(8, 7, 5)], 4)
    requests = traffic.draw_requests(7, args.arrivals, Lengths(args.prompt, args.output), 96)
    served = session.serve(requests, 2)
    assert served["requests"] == 7
    assert [run["first_token_ms"]["p50"] for run in served["runs"][OURS]] == [500, 500]


# -- whole runs ----------------------------------------------------------------------------------


@pytest.fixture
def run_bench(tmp_path, monkeypatch, capsys):
    """Runs tools/bench.py on one thread with the kernels of torch; returns result and table."""
    monkeypatch.setenv("GPTNEOX_CPU_KERNELS", "off")
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> tuple[dict, str]:
        common = ["--threads", "1", "--cache", str(tmp_path / "cache"), "--output-dir", "out"]
        assert bench.main([*argv, *common]) == 0, capsys.readouterr().err
        (path,) = (tmp_path / "out").glob("*.json")
        return results.read(path), capsys.readouterr().out

    return run


def test_ours_and_transformers_are_measured_alike(run_bench, tiny_model):
    argv = ["--model", str(tiny_model), "--dtype", "float32", "--against", "transformers"]
    argv += ["--batch", "1,3", "--prompt", "9", "--output", "4", "--runs", "2"]
    result, table = run_bench(*argv)
    flags = "--dtype float32 --against transformers --batch 1,3 --prompt 9 --output 4 --runs 2"
    assert result["command"] == f"--model {tiny_model.name} {flags} --threads 1"
    assert set(result["engines"]) == {OURS, "transformers"}
    assert result["engines"]["transformers"]["versions"]["transformers"]
    assert [case["batch"] for case in result["cases"]] == [1, 3]
    for case in result["cases"]:
        assert case["agreement"] == {"transformers": 1.0}
        assert len(case["rounds"]) == 2
        for one in case["rounds"]:
            assert one["bandwidth"] > 0
            for run in one["runs"].values():
                assert run["idle_engines_cpu_s"] == 0
                assert len(run["inter_token_ms"]) == 3
                assert 0 < run["prefill_s"] < run["seconds"] <= run["wall_s"]
                assert run["share_of_bandwidth"] > 0
                assert run["peak_bytes"] > 50 << 20
    assert len(re.findall("^ *transformers ", table, re.MULTILINE)) == 4  # speeds and ratios
    assert "fit the cache that the processor reports" in table


# The widths of the smallest shape that all schemes serve.
SMALL = models.Shape(2, 64, 2, vocab_size=96, max_position_embeddings=128)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16", pytest.param("w8a16", marks=pytest.mark.slow)])
def test_quantized_weights_are_measured_beside_float_ones(scheme, run_bench, tmp_path):
    model = models.make_checkpoint(tmp_path / "small", SMALL, "bfloat16", quiet)
    argv = ["--model", str(model), "--scheme", scheme, "--batch", "2", "--runs", "1"]
    result, table = run_bench(*argv, "--prompt", "9", "--output", "4")
    weights = {"w8a8": "w8a8_dynamic"}.get(scheme, scheme)
    assert result["scheme"] == scheme
    assert set(result["engines"]) == {OURS, "gptneox bfloat16"}
    assert result["engines"][OURS]["weights"] == weights
    assert "weights" not in result["engines"]["gptneox bfloat16"]
    assert re.search(rf"^ *gptneox \({weights}\) ", table, re.MULTILINE)
    assert set(result["cases"][0]["ratios"]) == {"gptneox bfloat16"}
    (made,) = (tmp_path / "cache" / "converted").glob(f"*/gptneox-bfloat16-{weights}")
    found = scheme_of(check_weights(made / "quantized", ModelConfig.from_pretrained(model)))
    assert weights in found.split("+")
    # Bytes of a step are those of what ran: shares are per byte, and the speeds are there.
    runs = result["cases"][0]["rounds"][0]
    bytes_per_step = {
        name: run["share_of_bandwidth"] * runs["bandwidth"] * 2 / run["decode_tokens_per_s"]
        for name, run in runs["runs"].items()
    }
    formats = check_weights(made / "quantized", ModelConfig.from_pretrained(model))
    size = figures.size_of(ModelConfig.from_pretrained(model), "bfloat16", formats=formats)
    assert bytes_per_step[OURS] == pytest.approx(size.decode_bytes(2, 9 + 2))
    assert bytes_per_step[OURS] < 0.8 * bytes_per_step["gptneox bfloat16"]
    quantized = ["--model", str(made / "quantized"), "--scheme", scheme]
    assert bench.main([*quantized, "--cache", str(tmp_path / "cache")]) == 2


def test_the_time_beside_the_model_is_accounted_for(run_bench, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "QUEUE_SIZES", (20, 100))
    argv = ["--model", str(tiny_model), "--dtype", "float32", "--overhead"]
    result, table = run_bench(*argv, "--batch", "4", "--prompt", "8", "--output", "6")
    step = result["step"]
    assert step["steps"] == 10  # two runs, without their prefill
    names = ("schedule", "prepare", "model", "sample", "detokenize", "rest")
    assert tuple(step["parts_ms"]) == names
    assert sum(step["parts_ms"].values()) == pytest.approx(step["total_ms"])
    assert all(step["parts_ms"][name] > 0 for name in names)
    assert [size["requests"] for size in result["queue"]] == [20, 100]
    assert "detokenize" in table


# -- the document --------------------------------------------------------------------------------


def example(**changes: object) -> dict:
    """A result with two engines and one case."""
    case = Case(8, 256, 64)

    def run(speed: float) -> dict:
        return {
            **dict.fromkeys(figures.SUMMARIZED, speed),
            "inter_token_ms": [1.0, 2.0, 3.0],
            "first_token_ids": [1],
        }

    ours, theirs = [run(4.0), run(6.0)], [run(2.0), run(2.0)]
    return {
        "format": results.FORMAT,
        "kind": "cases",
        "curve": None,
        "date": "2026-01-02T03:04:05+00:00",
        "command": "--batch 8",
        "revision": "abc",
        "model": {"name": "pythia-160m"},
        "description": "a processor",
        "device": "cpu",
        "threads": 2,
        "dtype": "bfloat16",
        "runs": 2,
        "matmul": {"bfloat16": 8e11},
        "notes": ["something was odd"],
        "engines": {
            OURS: {"dtype": "bfloat16", "versions": {"torch": "2"}},
            "ctranslate2": {"dtype": "float32", "versions": {"ctranslate2": "4"}},
        },
        "cases": [
            {
                **vars(case),
                "bandwidth": figures.spread([4e10, 5e10]),
                "foreign_share": 0.03,
                "summary": {
                    OURS: figures.summarize(ours),
                    "ctranslate2": figures.summarize(theirs),
                },
                "ratios": {"ctranslate2": figures.ratios(ours, theirs)},
                "agreement": {"ctranslate2": 1.0},
            }
        ],
        **changes,
    }


def test_the_document_is_made_from_results(tmp_path):
    document, source = tmp_path / "page.md", tmp_path / "a.json"
    frame = f"# Title\n\n{results.BEGIN}\nold\n{results.END}\n\nThe end.\n"
    document.write_text(frame)
    results.write(example(), source)
    for _ in range(2):  # twice the same
        assert bench.main(["--write-docs", str(document), "--from", str(source)]) == 0
        text = document.read_text()
    assert text.startswith("# Title\n\n")
    assert text.endswith("\n\nThe end.\n")
    assert "old" not in text
    assert text.count("### pythia-160m, bfloat16: speed") == 1
    elsewhere = tmp_path / "b.json"
    results.write(example(description="another processor", revision="def"), elsewhere)
    assert bench.main(["--write-docs", str(document), "--from", str(elsewhere)]) == 0
    text = document.read_text()
    assert text.count("### pythia-160m, bfloat16: speed") == 2
    assert text.index("a processor, cpu") < text.index("another processor, cpu")
    assert "python tools/bench.py --batch 8\n" in text
    assert "| ctranslate2 (float32) | 8 | 256 | 64 | 2.0 | 2.0 |" in text
    assert "| 2.50 (2.00 to 3.00) |" in text
    assert "40.0 to 50.0 GB/s" in text
    assert "Note: something was odd." in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table[:4]}) == 1


@pytest.mark.parametrize(
    ("text", "content", "words"),
    [
        ("no marks", None, "must stand there once"),
        (f"{results.END}\n{results.BEGIN}", None, "in this order"),
        (f"{results.BEGIN}\n{results.END}", "{}", "not a result of this benchmark"),
        (f"{results.BEGIN}\n{results.END}", "[1", "not a result of this benchmark"),
    ],
)
def test_a_document_is_not_spoilt(text, content, words, tmp_path, capsys):
    document, source = tmp_path / "page.md", tmp_path / "a.json"
    document.write_text(text)
    source.write_text(content or json.dumps(example()))
    assert bench.main(["--write-docs", str(document), "--from", str(source)]) == 2
    assert words in capsys.readouterr().err
    assert document.read_text() == text


def test_products_of_integers_may_pass_those_of_floats():
    result = example(curve="prompt")
    for name in result["engines"]:
        result["cases"][0]["summary"][name]["share_of_matmul"] = {"median": 2.5}
    assert results.as_text(result).count("250% (limit wrong)") == 2
    result["engines"][OURS]["weights"] = "w8a8"
    table = results.as_text(result)
    assert table.count("250% (limit wrong)") == 1
    assert table.count("250%") == 2


def test_every_kind_of_result_has_a_table():
    spread = {"p50": 1.0, "p99": 2.0}
    served = {
        "seconds": 4.0,
        "prompt_tokens_per_s": 5.0,
        "output_tokens_per_s": 6.0,
        "first_token_ms": spread,
        "inter_token_ms": spread,
        "peak_bytes": 1 << 30,
    }
    requests = example(
        kind="requests",
        curve="requests",
        arrivals_per_s=4.0,
        max_batch=32,
        mean_lengths=[256, 64],
        cases=[{"requests": 10, "runs": {OURS: [served]}}],
    )
    overhead = example(
        kind="overhead",
        step={
            "batch": 32, "context": 288, "steps": 9, "total_ms": 10.0,
            "parts_ms": {"model": 9.0, "rest": 1.0},
        },
        queue=[{"requests": 1000, "add_s": 0.5, "steps_s": 0.5}],
    )  # fmt: skip
    assert "10.0%" in results.as_text(overhead)
    assert "1000.0" in results.as_text(overhead)
    for result in (example(curve="prompt"), requests, overhead):
        text, markdown = results.as_text(result), results.as_markdown(result)
        assert "Note: something was odd." in text
        assert "| --- | ---: |" in markdown
    assert "decode" not in results.as_text(example(curve="prompt")).split("Ratios")[0]


@pytest.mark.parametrize("curve", [None, "batch", "context", "prompt"])
def test_results_become_pictures(curve, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmark.plots import write_plot

    (path,) = write_plot(tmp_path / "a.json", example(curve=curve))
    assert path.read_bytes().startswith(b"\x89PNG")
