# SPDX-License-Identifier: Apache-2.0
"""Replicas in a Ray cluster of two nodes: the service, its faults, its scale, and offline work.

`pytest -m ray tests/test_ray.py` in a Python that has Ray. Offline work comes first, for the
service fills the cluster; each step starts where the last one ended.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.cluster import (
    PATIENCE_S,
    Outcome,
    TwoNodes,
    free_port,
    left_in,
    shared_memory,
    two_nodes,
    wait_for,
)
from support.processes import MAIN, REPO, run_main

logger = logging.getLogger(__name__)
pytestmark = pytest.mark.ray
pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[serve,data]'")

MODEL = REPO / "weights" / "neox-mini"
PROMPTS = [f"{start} of the {noun}" for start in ("The king", "A day", "The size", "One part")
    for noun in ("river", "house", "north")]  # fmt: skip
SAME = ("--model_path", MODEL, "--device", "cpu", "--dtype", "float32", "--num_blocks", "64")
NUM_LONG = 600  # tokens of a request that is under way for seconds


@pytest.fixture(scope="module")
def cluster() -> Iterator[TwoNodes]:
    before = shared_memory()
    with two_nodes() as nodes:
        yield nodes
    assert shared_memory() <= before


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The answers of one process, by prompt."""
    folder = tmp_path_factory.mktemp("reference")
    done = run_main(*answers_to(folder / "answers.jsonl"), cwd=folder)
    assert done.returncode == 0, done.stderr
    return [record["text"] for record in read(folder / "answers.jsonl")]


def answers_to(file: Path, *more: str) -> list[str]:
    options = ["--task", "inference", "--attention", "paged", "--max_output_length", "16"]
    options += [*map(str, SAME), "--output_file", str(file), *more, "--input_texts", *PROMPTS]
    return options


def read(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


# -- offline -------------------------------------------------------------------------------------


def ini(folder: Path, **section: object) -> Path:
    lines = ["[precision]", *(f"{name} = {value}" for name, value in section.items())]
    (folder / "config.ini").write_text("\n".join(lines), "utf-8")
    return folder / "config.ini"


def test_boolq_over_two_replicas_equals_one_process(cluster: TwoNodes, tmp_path: Path) -> None:
    questions = (MODEL / "eval" / "boolq" / "dev.jsonl").read_text("utf-8").splitlines(True)[:60]
    logs = []
    for name, ray in (("one", ()), ("two", ("--ray", "2", "--tp", "2"))):
        folder = tmp_path / name
        (folder / "data" / "boolq").mkdir(parents=True)
        (folder / "data" / "boolq" / "dev.jsonl").write_text("".join(questions), "utf-8")
        config = ini(folder, mode="boolq", batch=4, work_dir=folder)
        options = ["--task", "precision", *SAME, "--attention", "paged", "--config", config]
        done = cluster.run(*options, *ray, cwd=folder)
        assert done.returncode == 0, done.stderr
        logs.append((folder / "test_result" / "device0.log").read_text("utf-8"))
        again = cluster.run(*options, *ray, cwd=folder)  # nothing is left to ask
        assert again.stdout == done.stdout
        assert "eprecat" not in done.stderr, "of Ray"
    one, two = (tmp_path / name / "test_result" for name in ("one", "two"))
    assert (one / "cache0.csv").read_text() == (two / "cache0.csv").read_text()
    assert (one / "cache0.json").read_text() == (two / "cache0.json").read_text()
    scores = [re.findall(r"log p: False (\S+), True (\S+)", log) for log in logs]
    assert len(scores[0]) == len(scores[1]) == 60
    for own, other in zip(*scores, strict=True):
        assert [float(x) for x in own] == pytest.approx([float(x) for x in other], abs=2e-5)


def test_prompts_go_on_where_they_were_interrupted(cluster: TwoNodes, tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert cluster.run(*answers_to(one), cwd=tmp_path).returncode == 0
    command = [sys.executable, str(MAIN), *answers_to(two, "--ray", "2")]
    process = subprocess.Popen(command, env=cluster.environ, stdout=subprocess.DEVNULL)
    partial = tmp_path / "two.jsonl.partial"
    wait_for(lambda: partial.exists() and partial.read_text().count("\n") > 2, "answers")
    process.kill()
    process.wait()
    kept = partial.read_text().count("\n") - 1
    assert not two.exists()
    done = cluster.run(*answers_to(two, "--ray", "2"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{len(PROMPTS) - kept} prompts" in done.stdout
    assert two.read_text() == one.read_text()
    assert not partial.exists()
    wait_for(lambda: not cluster.processes(), "the replicas to end")
    assert left_in(cluster.folder) == []


def test_a_cut_checkpoint(cluster: TwoNodes, tmp_path: Path) -> None:
    """Each rank of a replica reads its part; the whole model is not there."""
    parts, one, two = tmp_path / "parts", tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    command = [sys.executable, REPO / "cut_model_util.py", "--world_size", "2"]
    command += ["--input_path", MODEL, "--output_path", parts]
    subprocess.run(command, check=True, capture_output=True)
    assert cluster.run(*answers_to(one), cwd=tmp_path).returncode == 0
    cut = ("--model_path", str(parts), "--ray", "1", "--tp")
    done = cluster.run(*answers_to(two, *cut, "2"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert two.read_text() == one.read_text()
    refused = cluster.run(*answers_to(tmp_path / "x", *cut, "1"), cwd=tmp_path)
    assert refused.returncode == 1
    assert "was cut for 2 ranks, but 1 run" in refused.stderr.splitlines()[-1]


def test_ids_need_no_tokenizer(cluster: TwoNodes, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(MODEL / name, tmp_path)
    options = ["--task", "inference", "--attention", "paged", *map(str, SAME), "--input_ids", "5,6"]
    options += ["--model_path", str(tmp_path), "--load_tokenizer", "False"]
    answers = []
    for name, ray in (("one", ()), ("two", ("--ray", "1"))):
        file = tmp_path / f"{name}.jsonl"
        done = cluster.run(*options, *ray, "--output_file", str(file), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        answers.append(file.read_text())
    assert answers[0] == answers[1]


def test_what_is_wrong_is_said_in_a_line(cluster: TwoNodes, tmp_path: Path) -> None:
    refused = cluster.run(*answers_to(tmp_path / "x", "--ray", "1", "--stream"), cwd=tmp_path)
    assert refused.returncode == 2
    assert "--stream" in refused.stderr
    lost = answers_to(tmp_path / "x", "--ray", "1", "--ray_address", "127.0.0.1:1")
    failed = cluster.run(*lost, cwd=tmp_path)
    assert failed.returncode == 1
    assert "ray start --head" in failed.stderr.splitlines()[-1]
    unknown = cluster.run("ray", "delete", "--name", "other")
    assert unknown.returncode == 1
    assert unknown.stderr.splitlines()[-1].startswith("error: no application 'other' runs")


# -- the service -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(cluster: TwoNodes) -> Iterator[TwoNodes]:
    """Two replicas of two ranks; each fills a node."""
    cluster.deploy(*SAME, "--replicas", "2", "--tp", "2")
    cluster.wait_until_ready(2)
    yield cluster
    if cluster.fronts():
        cluster.delete()


def test_answers_equal_a_single_run(service: TwoNodes, expected: list[str]) -> None:
    assert len(service.ranks()) == 4
    for fields in ({}, {"stream": True}):
        outcomes = service.complete_all(PROMPTS, max_tokens=16, **fields)
        assert [outcome.error for outcome in outcomes] == [""] * len(PROMPTS)
        assert [outcome.text for outcome in outcomes] == expected
    assert all(service.generated_by(front) > 0 for front in service.fronts()), "one did it all"


def test_errors_and_other_routes_pass_through(service: TwoNodes) -> None:
    wrong = service.complete("x", max_tokens=-1)
    assert wrong.status == 400
    assert "max_tokens" in wrong.error
    too_large = service.complete("x" * (5 << 20))
    assert too_large.status == 413, too_large
    models = json.loads(service.get("/v1/models", service.port))
    assert models["data"][0]["id"] == "neox-mini"
    assert "<html" in service.get("/", service.port)


def test_a_reader_that_goes_away_ends_its_request(service: TwoNodes) -> None:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
    body = {"prompt": "The", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body),
        {"content-type": "application/json"})  # fmt: skip
    assert connection.getresponse().read(20)
    assert num_running(service) == 1
    connection.close()
    wait_for(lambda: num_running(service) == 0, "the request to end")


def num_running(service: TwoNodes) -> int:
    text = "".join(service.get("/metrics", front.port) for front in service.fronts())
    counts = re.findall(r"^gptneox:num_requests_running\S* (\S+)", text, re.MULTILINE)
    return sum(int(float(count)) for count in counts)


# -- what dies -----------------------------------------------------------------------------------


def while_running(service: TwoNodes, kill: object) -> list[Outcome]:
    """Kill something while long requests run on both replicas; their outcomes."""
    outcomes: list[Outcome] = []

    def ask(prompt: str) -> None:
        outcomes.append(service.complete(prompt, max_tokens=NUM_LONG, ignore_eos=True, stream=True))

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in PROMPTS[:8]]
    for thread in threads:
        thread.start()
    wait_for(lambda: num_running(service) == 8, "all requests to run")
    assert callable(kill)
    kill()
    for thread in threads:
        thread.join()
    return outcomes


def check_recovery(
    service: TwoNodes, outcomes: list[Outcome], lost: list[int], expected: list[str]
) -> None:
    """Nobody took half an answer for a whole one, others were served, and all is as before."""
    whole = [outcome for outcome in outcomes if outcome.is_whole]
    assert whole, "the other replica did not go on"
    assert len(whole) < len(outcomes), "the killed one ran nothing"
    assert all(outcome.num_tokens == NUM_LONG for outcome in whole)
    seconds = service.wait_until_ready(2)
    logger.info("ready again %.1f s after the last answer", seconds)
    alive = {process.pid for process in service.processes()}
    assert not alive & set(lost)
    assert len(service.ranks()) == 4, "ranks of the dead are left"
    answers = service.complete_all(PROMPTS, max_tokens=16)
    assert [answer.text for answer in answers] == expected
    assert len(left_in(service.folder)) == 2, "each service has its folder of sockets"


def test_a_killed_rank(service: TwoNodes, expected: list[str]) -> None:
    ranks = service.ranks_of(service.fronts()[0])
    lost = [rank.pid for rank in ranks]
    assert len(lost) == 2
    outcomes = while_running(service, ranks[1].kill)
    check_recovery(service, outcomes, lost, expected)


def test_a_killed_replica(service: TwoNodes, expected: list[str]) -> None:
    replicas = service.actors("ServeReplica")
    assert len(replicas) == 2
    lost = [process.pid for process in service.processes()]
    outcomes = while_running(service, replicas[0].kill)
    alive = {process.pid for process in service.processes()} & set(lost)
    check_recovery(service, outcomes, [pid for pid in lost if pid not in alive], expected)


def test_a_killed_node(service: TwoNodes, expected: list[str]) -> None:
    """Its processes end by themselves; the replica comes back where there is room."""
    node = service.nodes.pop()
    raylet = node.all_processes["raylet"][0].process
    before = {process.pid for process in service.processes()}
    outcomes = while_running(service, lambda: raylet.send_signal(signal.SIGKILL))
    wait_for(lambda: len(service.ranks()) == 2, "the ranks of the dead node to end")
    service.cluster.remove_node(node, allow_graceful=False)
    service.add_node()
    lost = before - {process.pid for process in service.processes()}
    assert lost
    check_recovery(service, outcomes, list(lost), expected)


# -- scale ---------------------------------------------------------------------------------------


def test_scaling_under_load_loses_nothing(cluster: TwoNodes, service: TwoNodes) -> None:
    """From one replica to two and back; every request is answered whole."""
    scaling = ("--min_replicas", "1", "--max_replicas", "2", "--target_requests", "2")
    service.deploy(*SAME, "--tp", "2", *scaling, "--downscale_delay_s", "4")
    wait_for(lambda: len(service.fronts()) == 1, "one replica")
    outcomes: list[Outcome] = []
    num_clients = 8

    def client(number: int) -> None:
        while number < num_clients:
            outcomes.append(service.complete(PROMPTS[number], max_tokens=100, ignore_eos=True))

    threads = [threading.Thread(target=client, args=(i,)) for i in range(num_clients)]
    for thread in threads:
        thread.start()
    try:
        service.wait_until_ready(2)
        fronts = service.fronts()
        wait_for(lambda: all(map(service.generated_by, fronts)), "both to take part")
        num_clients = 1  # one request at a time
        wait_for(lambda: len(service.fronts()) == 1, "one replica again")
    finally:
        num_clients = 0
        for thread in threads:
            thread.join()
    logger.info("%d requests", len(outcomes))
    assert len(outcomes) > 20
    assert [outcome.error for outcome in outcomes if not outcome.is_whole] == []
    assert {outcome.num_tokens for outcome in outcomes} == {100}
    wait_for(lambda: len(service.ranks()) == 2, "the ranks of the other to end")


# -- a replica over two hosts, and devices that Ray lists ----------------------------------------


def test_a_replica_over_two_hosts(cluster: TwoNodes, expected: list[str]) -> None:
    """One rank on each node, with the device that Ray gave it; a lost one ends and restarts all."""
    if cluster.fronts():
        cluster.delete()
    ports = ("--env", "HCCL_HOST_SOCKET_PORT_RANGE=60000-60050")
    cluster.deploy(*SAME, "--tp", "2", "--hosts", "2", "--on", "npu", *ports)
    seen = []
    for rank in cluster.ranks():
        environ = Path(f"/proc/{rank.pid}/environ").read_text().split("\0")
        variables = dict(line.partition("=")[::2] for line in environ if line)
        names = ("NODE_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "RANK")
        seen.append([variables.get(name) for name in names])
        assert variables["ASCEND_RT_VISIBLE_DEVICES"] in ("0", "1")
        assert variables["HCCL_HOST_SOCKET_PORT_RANGE"] == "60000-60050"
    assert sorted(seen) == [["0", "1", "2", "0"], ["1", "1", "2", "1"]]
    answers = cluster.complete_all(PROMPTS, max_tokens=16)
    assert [answer.text for answer in answers] == expected
    lost = {rank.pid for rank in cluster.ranks()}
    follower = next(rank for rank in cluster.ranks() if "--server_socket -" in rank.command)
    follower.kill()
    wait_for(lambda: not lost & {p.pid for p in cluster.processes()}, "the other rank to end")
    logger.info("ready again after %.1f s", cluster.wait_until_ready(1))
    cluster.delete()


# -- the YAML ------------------------------------------------------------------------------------


def shipped_yaml(port: int) -> dict[str, Any]:
    """The file in deploy/, for this checkout, this model and two CPUs."""
    whole = yaml.safe_load((REPO / "deploy" / "ray-serve.yaml").read_text("utf-8"))
    (application,) = whole["applications"]
    args = application["args"]
    del args["autoscaling"]
    args |= {"replicas": 2, "tp": 1, "cpus": 1, "device": "cpu", "options": [*map(str, SAME)]}
    application["runtime_env"] = {"env_vars": {"PYTHONPATH": str(REPO)}}
    whole["http_options"]["port"] = port
    return whole


def printed_yaml(port: int) -> dict[str, Any]:
    """What `ray config` prints."""
    done = run_main(
        "ray", "config", *map(str, SAME), "--replicas", "2", "--port", str(port), cwd=REPO
    )
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


@pytest.mark.parametrize("source", [shipped_yaml, printed_yaml])
def test_two_replicas_by_a_yaml_and_their_end(
    source: Callable[[int], dict[str, Any]],
    cluster: TwoNodes,
    expected: list[str],
    tmp_path: Path,
) -> None:
    """By Ray's own command, at a port of its own: Ray Serve of the tests before has ended."""
    cluster.shutdown()
    cluster.port = free_port()
    (tmp_path / "service.yaml").write_text(yaml.safe_dump(source(cluster.port)), "utf-8")
    command = [sys.executable, "-m", "ray.serve.scripts", "run", "--non-blocking"]
    done = subprocess.run([*command, str(tmp_path / "service.yaml")], env=cluster.environ,
        capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    cluster.wait_until_ready(2)
    wait_for(lambda: cluster.complete("a", max_tokens=1).is_whole, "the routes")

    def both_answer() -> bool:
        answers = cluster.complete_all(PROMPTS, max_tokens=16)
        assert [answer.text for answer in answers] == expected
        return all(cluster.generated_by(front) > 0 for front in cluster.fronts())

    wait_for(both_answer, "the proxy to know both replicas")
    cluster.shutdown()


def test_a_killed_worker_loses_no_answer(
    cluster: TwoNodes, expected: list[str], tmp_path: Path
) -> None:
    """Ray starts it again in its place, and its piece is computed anew."""
    file = tmp_path / "answers.jsonl"
    command = [sys.executable, str(MAIN), *answers_to(file, "--ray", "2")]
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(command, env=cluster.environ, stderr=stderr)
    partial = tmp_path / "answers.jsonl.partial"
    wait_for(lambda: partial.exists() and partial.read_text().count("\n") > 2, "answers")
    worker = cluster.actors("ray::Worker")[0]
    worker.kill()
    assert process.wait(PATIENCE_S) == 0, (tmp_path / "stderr").read_text()
    assert [record["text"] for record in read(file)] == expected
    assert worker.pid not in {each.pid for each in cluster.actors("ray::Worker")}
    wait_for(lambda: not cluster.processes(), "the replicas to end")
    assert left_in(cluster.folder) == []
