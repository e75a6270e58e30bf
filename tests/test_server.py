# SPDX-License-Identifier: Apache-2.0
"""The service as the program it is, over the embedded checkpoint: clients, start and end."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.processes import MAIN, REPO, clean_environ
from support.service import JSON, Program, program

from gptneox.cli import read_settings
from gptneox.config.errors import ConfigError
from gptneox.config.settings import EMBEDDED_CHECKPOINT, EngineSection
from gptneox.devices import create, ranks, select
from gptneox.engine.paged import PagedEngine
from gptneox.engine.sequence import SamplingParams
from gptneox.server import front
from gptneox.tasks import serve

PATH = "/v1/completions"
# Text that the checkpoint was trained to continue, emoji and blanks.
TEXTS = (
    "The capital of",
    "Once upon a time",
    "def f(x):\n        return",
    "\U0001f600 naïve 日本",
    " ",
)


KEY, FILE_KEY = "from-environment", "from-file"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A service with keys and a chat template."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "keys").write_text(f"# ours\n{FILE_KEY}\n")
    argv = ("--dtype", "float32", "--chat_template", "gpt-neoxt-chat", "--api_key_file", "keys")
    with program(*argv, "--debug", cwd=folder, GPTNEOX_API_KEY=KEY) as made:
        made.key = KEY
        yield made


@pytest.fixture(scope="module")
def engine() -> PagedEngine:
    """The same model in this process."""
    return PagedEngine.from_pretrained(
        EMBEDDED_CHECKPOINT, EngineSection(max_batch_size=4), select("cpu"), dtype="float32"
    )


# -- the same text as offline --------------------------------------------------------------------


@pytest.mark.parametrize("stop", [[], ["a", "the "]])
def test_answers_are_those_of_the_engine(
    served: Program, engine: PagedEngine, stop: list[str]
) -> None:
    prompts = [engine.tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    params = SamplingParams(
        max_new_tokens=24, temperature=0.9, seed=5, stop=tuple(stop), logprobs=2
    )
    expected = engine.generate(prompts, params)
    body = {"max_tokens": 24, "temperature": 0.9, "seed": 5, "stop": stop, "logprobs": 2}
    plain = served.post(PATH, {"prompt": list(TEXTS), **body}).json["choices"]
    streamed = served.post(PATH, {"prompt": prompts, **body, "stream": True}).chunks
    for i, completion in enumerate(expected):
        assert plain[i]["text"] == completion.text
        assert plain[i]["finish_reason"] == completion.finish_reason
        assert plain[i]["stop_reason"] == completion.stop_reason
        own = [c["choices"][0] for c in streamed if c["choices"][0]["index"] == i]
        assert "".join(choice["text"] for choice in own) == completion.text
        assert own[-1]["finish_reason"] == completion.finish_reason
        for name in ("tokens", "text_offset"):
            assert [x for c in own for x in c["logprobs"][name]] == plain[i]["logprobs"][name]
        scores = [entry.logprob for entry in completion.logprobs]
        for lists in (plain[i]["logprobs"], *(choice["logprobs"] for choice in own)):
            given = lists["token_logprobs"]
            assert given == pytest.approx(scores[: len(given)], abs=1e-4)
            scores = scores[len(given) :] if lists is not plain[i]["logprobs"] else scores


def test_scores_of_a_prompt_are_those_of_the_engine(served: Program, engine: PagedEngine) -> None:
    """With a leading end-of-text, with one token, and as long as the context allows."""
    ids = engine.tokenizer.encode("the cat sat on the mat. " * 400, add_special_tokens=False)
    prompts = [[0, *ids[:10]], [0], ids[:2047]]
    params = SamplingParams(max_new_tokens=1, prompt_logprobs=1, logprobs=1)
    expected = engine.generate(prompts, params)
    body = {"prompt": prompts, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    for completion, choice, prompt in zip(
        expected, served.post(PATH, body).json["choices"], prompts, strict=True
    ):
        logprobs = choice["logprobs"]
        assert {len(values) for values in logprobs.values()} == {len(prompt) + 1}
        entries = completion.prompt_logprobs + completion.logprobs
        assert logprobs["token_logprobs"][0] is None
        given = logprobs["token_logprobs"][1:]
        assert given == pytest.approx([entry.logprob for entry in entries], abs=2e-3)


# -- clients of others ---------------------------------------------------------------------------


def test_openai_s_client_with_strict_validation(served: Program) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(
        base_url=f"{served.url}/v1", api_key=KEY, max_retries=0, _strict_response_validation=True
    )
    name = client.models.list().data[0].id
    assert client.models.retrieve(name).id == name
    fields: dict[str, Any] = {"model": name, "prompt": ["The cat", "A dog"], "max_tokens": 6}
    made = client.completions.create(**fields, n=2, logprobs=3, seed=1)
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    echoed = client.completions.create(**fields, echo=True)
    assert [choice.text[:5] for choice in echoed.choices] == ["The c", "A dog"]
    # Its types allow no null in a chunk's finish_reason, which OpenAI sends too.
    lax = openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0)
    usage = {"include_usage": True}
    *_, last = lax.completions.create(**fields, stream=True, stream_options=usage)
    assert last.usage.prompt_tokens == made.usage.prompt_tokens
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="x")
    assert caught.value.code == "model_not_found"
    assert caught.value.request_id
    fields = {
        "model": name,
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 8,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    said = client.chat.completions.create(**fields).choices[0]
    assert said.finish_reason in ("stop", "length")
    pieces = list(client.chat.completions.create(**fields, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == said.message.content


def test_keys_are_in_no_log_no_command_line_and_no_rank(served: Program) -> None:
    for given in (KEY, FILE_KEY, "wrong"):
        headers = {"authorization": f"Bearer {given}"}
        made = urllib.request.Request(f"{served.url}/v1/models", headers=headers)
        assert served.send(made).status == (401 if given == "wrong" else 200)
    for pid in (served.process.pid, *descendants(served.process.pid)):
        assert KEY.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        if pid != served.process.pid:
            assert KEY.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
    log = "".join(served.lines)
    assert not any(secret in log for secret in (KEY, FILE_KEY, "wrong"))


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "num_concurrent"), [(1, 4), (8, 4)])
def test_lm_eval_scores_as_offline(
    served: Program, engine: PagedEngine, batch_size: int, num_concurrent: int
) -> None:
    """local-completions against the service, and the offline model of this toolkit, by sample."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model = LocalCompletionsAPI(
        model="neox-mini",
        base_url=served.url + PATH,
        tokenizer_backend="huggingface",
        tokenizer=str(EMBEDDED_CHECKPOINT),
        batch_size=batch_size,
        num_concurrent=num_concurrent,
        max_length=2048,
        header={"authorization": f"Bearer {KEY}"},
    )
    pairs = [(f"Question {i}: is the sky {w}?\nAnswer:", a) for i, w in enumerate(("blue", "green"))
             for a in (" yes", " no", "\n\n", " maybe it is blue")]  # fmt: skip
    pairs.append(("", " the"))
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    answers = model.loglikelihood(requests)
    for (context, continuation), (score, is_greedy) in zip(pairs, answers, strict=True):
        start = engine.tokenizer.encode(context) or [0]
        ids = engine.tokenizer.encode(context + continuation)
        ids = ids if context else [0, *ids]
        params = SamplingParams(max_new_tokens=1, prompt_logprobs=1)
        (completion,) = engine.generate([ids], params)
        entries = completion.prompt_logprobs[len(start) - 1 :]
        assert score == pytest.approx(sum(entry.logprob for entry in entries), abs=1e-3)
        assert is_greedy == all(entry.logprob >= max(entry.top.values()) for entry in entries)


SCHEMATHESIS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


@pytest.mark.slow
def test_schemathesis_finds_no_fault(served: Program, tmp_path: Path) -> None:
    """Random requests that fit the description, and some that do not."""
    pytest.importorskip("schemathesis")
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json",
         "--checks", ",".join(SCHEMATHESIS), "--max-examples", "40", "--seed", "1", "--phases",
         "examples,fuzzing", "--suppress-health-check", "all",
         "--header", f"authorization: Bearer {KEY}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-500:]


# -- how it starts and ends ----------------------------------------------------------------------


def run_serve(*argv: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(MAIN), "--task", "serve", *argv],
        cwd=cwd,
        env=clean_environ(**{"TMPDIR": str(cwd), **environ}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--port", "{taken}"], "port {taken} cannot be listened at"),
        (["--host", "192.0.2.1"], "192.0.2.1 port 8000 cannot be listened at"),
        (["--host", "no.such.host.invalid"], "cannot be listened at"),
        (["--port", "0", "--ssl_certfile", "a", "--ssl_keyfile", "b"], "TLS with a, b"),
        (["--ssl_certfile", "a"], "go together"),
        (["--ssl_ca_certs", "a"], "needs ssl_certfile"),
        (["--port", "0", "--api_key_file", "{empty}"], "has no key"),
        (["--port", "0", "--api_key_file", "none"], "none"),
        (["--port", "0", "--chat_template", "none"], "--chat_template none"),
        (["--port", "0", "--model_path", "none"], "config.json"),
        (["--port", "70000"], "port is 70000; use 0 to 65535"),
        (["--attention", "flash"], "paged path alone"),
        (["--load_tokenizer", "False", "--input_ids", "1"], "needs the tokenizer"),
        (["--metrics_prefix", "a b"], "metrics_prefix"),
        (["--root_path", "llm"], "root_path"),
        (["--port", "0", "--replicas", "3"], "replicas is 3, but ASCEND_RT_VISIBLE_DEVICES=0,1"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(
    argv: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "empty").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"taken": str(taken.getsockname()[1]), "empty": str(tmp_path / "empty")}
        words = ["--task", "serve", *(word.format(**names) for word in argv)]
        with pytest.raises((ValueError, OSError), match=re.escape(text.format(**names))):
            serve.run(read_settings(words, tmp_path / "config.ini"))
    assert {path.name for path in tmp_path.iterdir()} == {"empty"}


def test_a_long_path_of_temporary_files_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with pytest.raises(OSError, match="TMPDIR"):
        serve.run(read_settings(["--task", "serve", "--port", "0"], tmp_path / "config.ini"))
    assert not list(long.iterdir())


def test_a_privileged_port_is_named_with_the_remedy() -> None:
    if int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) < 1024:
        pytest.skip("on this machine every user may take any port")
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(OSError, match=r"Permission denied; ports below 1024 .* --port"):
            front.listen("127.0.0.1", 1023)
    finally:
        os.seteuid(user)


def test_a_port_that_is_taken_ends_it_with_status_1(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run_serve("--port", str(taken.getsockname()[1]), cwd=tmp_path)
    assert done.returncode == 1
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: 127.0.0.1 port")


@pytest.mark.slow
def test_an_engine_that_cannot_load_ends_the_service(tmp_path: Path) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (broken / name).write_bytes((EMBEDDED_CHECKPOINT / name).read_bytes())
    done = run_serve("--port", "0", "--model_path", str(broken), cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1
    assert "the service ends" in done.stderr
    assert not list(tmp_path.glob("gptneox-*/*.sock"))


@contextlib.contextmanager
def requests_in_flight(served: Program) -> Iterator[list[tuple[int, bytes]]]:
    """A stream and a plain request, both long; on exit they have been answered."""
    answers: list[tuple[int, bytes]] = []

    def ask(stream: bool) -> None:
        body = {"prompt": "The", "max_tokens": 2000, "ignore_eos": True, "stream": stream}
        made = urllib.request.Request(served.url + PATH, json.dumps(body).encode(), JSON)
        try:
            with urllib.request.urlopen(made, timeout=60) as answer:
                answers.append((answer.status, answer.read()))
        except urllib.error.HTTPError as error:
            answers.append((error.code, error.read()))
        except (OSError, http.client.HTTPException) as error:
            answers.append((0, repr(error).encode()))

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 20
    while b"num_requests_running" not in served.get("/metrics").body or not re.search(
        rb"num_requests_running\{[^}]*} 2", served.get("/metrics").body
    ):
        assert time.monotonic() < end
        time.sleep(0.05)
    yield answers
    for thread in threads:
        thread.join(60)


def descendants(pid: int) -> dict[int, str]:
    """Every process that `pid` has started, directly or not, and its RANK."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            parents[int(entry.name)] = int(fields[1])
    found: dict[int, str] = {}
    waiting = [pid]
    while waiting:
        parent = waiting.pop()
        for child in (c for c, p in parents.items() if p == parent):
            environ = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            ranks = [line[5:].decode() for line in environ if line.startswith(b"RANK=")]
            found[child] = ranks[0] if ranks else ""
            waiting.append(child)
    return found


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def assert_nothing_is_left(pids: list[int], folder: Path, timeout: float = 30) -> None:
    end = time.monotonic() + timeout
    while any(map(is_running, pids)):
        assert time.monotonic() < end, [pid for pid in pids if is_running(pid)]
        time.sleep(0.05)
    left = {path.name for path in folder.iterdir()}
    assert left <= {f"gptneox-ascend-{os.getuid()}"}, left  # the launchers' locks


@pytest.mark.parametrize(
    ("num_ranks", "victim"),
    [
        pytest.param(1, "front", marks=pytest.mark.slow),
        (1, "rank 0"),
        pytest.param(2, "front", marks=pytest.mark.slow),
        pytest.param(2, "rank 0", marks=pytest.mark.slow),
        pytest.param(2, "rank 1", marks=pytest.mark.slow),
        pytest.param(2, "torchrun", marks=pytest.mark.slow),
    ],
)
def test_nothing_outlives_a_process_that_is_killed(
    num_ranks: int, victim: str, tmp_path: Path
) -> None:
    with program(cwd=tmp_path, TP_WORLD_SIZE=str(num_ranks)) as served:
        front = served.process.pid
        started = descendants(front)
        by_rank = {rank: pid for pid, rank in started.items() if rank}
        launcher = next(pid for pid, rank in started.items() if not rank)
        pids = {"front": front, "torchrun": launcher, "rank 0": by_rank.get("0", launcher)}
        pids["rank 1"] = by_rank.get("1", 0)
        with requests_in_flight(served) as answers:
            os.kill(pids[victim], signal.SIGKILL)
        status = served.process.wait(timeout=30)
        assert_nothing_is_left([front, *started], tmp_path)
        if victim == "front":
            assert status == -signal.SIGKILL
            return
        assert status == 1
        (stream,) = [body for code, body in answers if code == 200]
        (plain,) = [body for code, body in answers if code == 503]
        assert b'"engine_lost"' in stream
        assert stream.endswith(b"data: [DONE]\n\n")
        assert b'"engine_lost"' in plain


def test_sigterm_lets_requests_finish_and_a_second_one_does_not(tmp_path: Path) -> None:
    with program("--shutdown_grace_s", "60", cwd=tmp_path) as served:
        started = list(descendants(served.process.pid))
        with requests_in_flight(served) as answers:
            served.process.send_signal(signal.SIGTERM)
            served.wait_for("SIGTERM")
            assert served.get("/ready").status == 503
            assert served.get("/health").status == 200
            refused = served.post(PATH, {"prompt": "x"})
            assert refused.status == 503
            assert int({k.lower(): v for k, v in refused.headers.items()}["retry-after"]) > 0
            assert served.process.poll() is None
            served.process.send_signal(signal.SIGTERM)
            assert served.process.wait(timeout=5) == 128 + signal.SIGTERM
        assert [code for code, _ in answers].count(503) == 0
        assert_nothing_is_left(started, tmp_path)


@pytest.mark.parametrize("when", ["loading", pytest.param("ready", marks=pytest.mark.slow)])
def test_sigterm_ends_it_with_status_0(when: str, tmp_path: Path) -> None:
    with program(cwd=tmp_path, wait=False) as served:
        served.wait_for("at http")
        started = list(descendants(served.process.pid))
        if when == "ready":
            served.port = int(served.wait_for(r"at http://.*:(\d+)")[1])
            served.wait_for("is ready")
            body = {"prompt": "The", "max_tokens": 100, "ignore_eos": True, "stream": True}
            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(served.post, PATH, body)
                time.sleep(0.2)
                served.process.send_signal(signal.SIGTERM)
                assert len(answer.result().chunks) >= 1
        else:
            served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(timeout=30) == 0
        assert_nothing_is_left(started, tmp_path)


@pytest.mark.slow
def test_a_grace_that_is_over_ends_what_runs(tmp_path: Path) -> None:
    with program("--shutdown_grace_s", "0.3", cwd=tmp_path) as served:
        with requests_in_flight(served) as answers:
            served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(timeout=30) == 0
        assert sorted(code for code, _ in answers) == [200, 503]
        assert all(b'"unavailable"' in body for _, body in answers)


@pytest.mark.slow
def test_an_engine_that_hangs_ends_the_service(tmp_path: Path) -> None:
    with program("--heartbeat_timeout_s", "3", cwd=tmp_path) as served:
        (engine,) = descendants(served.process.pid)
        with requests_in_flight(served) as answers:
            os.kill(engine, signal.SIGSTOP)
        assert served.process.wait(timeout=30) == 1
        served.wait_for("has been silent for")
        assert all(b'"engine_lost"' in body for _, body in answers)
        assert_nothing_is_left([engine], tmp_path)


# -- several ranks, engines and services ---------------------------------------------------------


def cpu_seconds(pids: list[int]) -> float:
    """What processes have computed."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    ("busy_s", "idle_s"), [(2, 2), pytest.param(60, 60, marks=pytest.mark.slow)]
)
def test_two_ranks_stay_alike_and_wait_without_work(
    busy_s: float, idle_s: float, tmp_path: Path
) -> None:
    """Eight clients ask and go away at random; then nothing comes; then a request."""
    with program(
        "--dtype", "float32", "--max_batch_size", "4", cwd=tmp_path, TP_WORLD_SIZE="2"
    ) as s:
        s.wait_for("2 rank")
        bodies = [
            {"prompt": text, "max_tokens": n, "temperature": 0, "ignore_eos": True}
            for text, n in zip(TEXTS, (3, 40, 17, 9, 60), strict=True)
        ]
        texts = [s.post(PATH, body).json["choices"][0]["text"] for body in bodies]
        end, counts = time.monotonic() + busy_s, {"whole": 0, "gone": 0}

        def client(seed: int) -> None:
            choose = random.Random(seed)
            while time.monotonic() < end:
                which = choose.randrange(len(bodies))
                if choose.random() < 0.4:
                    connection = http.client.HTTPConnection("127.0.0.1", s.port, timeout=60)
                    data = json.dumps({**bodies[which], "max_tokens": 400, "stream": True})
                    connection.request("POST", PATH, data, JSON)
                    time.sleep(choose.random() * 0.1)
                    connection.close()
                    counts["gone"] += 1
                else:
                    answer = s.post(PATH, bodies[which])
                    assert answer.json["choices"][0]["text"] == texts[which]
                    counts["whole"] += 1

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(client, range(8)))
        assert min(counts.values()) > 3
        time.sleep(1.5)
        resting = s.get("/metrics").body.decode()
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert re.search(rf"gptneox:{name}\{{[^}}]*}} 0\.0", resting), name
        started = [pid for pid, rank in descendants(s.process.pid).items() if rank]
        assert len(started) == 2
        before = cpu_seconds(started)
        time.sleep(idle_s)
        assert cpu_seconds(started) - before < 0.1 * idle_s  # of 2 * idle_s
        assert s.get("/health").status == 200
        assert s.post(PATH, bodies[1]).json["choices"][0]["text"] == texts[1]


@pytest.mark.parametrize(
    ("num_engines", "num_ranks"), [(1, 1), pytest.param(2, 2, marks=pytest.mark.slow)]
)
def test_two_services_on_one_host(num_engines: int, num_ranks: int, tmp_path: Path) -> None:
    """They start at once, with the same folder for temporary files, and share nothing."""
    options = ("--device", "cpu", "--replicas", str(num_engines), "--max_batch_size", "2")
    environ = {"TP_WORLD_SIZE": str(num_ranks), "BIND_CPU": "0"}
    with (
        program(*options, cwd=tmp_path, wait=False, **environ) as one,
        program(*options, cwd=tmp_path, wait=False, **environ) as two,
    ):
        for served in (one, two):
            served.port = int(served.wait_for(r"at http://.*:(\d+)", 120)[1])
        for served in (one, two):
            for index in range(num_engines):
                served.wait_for(f"engine {index} is ready", 240)
        body = {"prompt": "The cat", "max_tokens": 20, "temperature": 0}
        texts = [served.post(PATH, body).json["choices"][0]["text"] for served in (one, two)]
        assert texts[0] == texts[1]
        assert one.port != two.port
        sockets = list(tmp_path.glob("gptneox-*/*.sock"))
        assert len({socket.parent for socket in sockets}) == 2
        assert len(sockets) == 2 * num_engines
        started = list(descendants(one.process.pid))
        assert not set(started) & set(descendants(two.process.pid))
        one.process.kill()
        end = time.monotonic() + 30
        while any(map(is_running, started)):
            assert time.monotonic() < end
            time.sleep(0.05)
        assert two.post(PATH, body).json["choices"][0]["text"] == texts[0]


@pytest.mark.parametrize(
    ("environ", "num_found", "lists"),
    [
        ({"ASCEND_RT_VISIBLE_DEVICES": "4,5,6,7"}, None, ["4,5", "6,7"]),
        ({}, 8, ["0", "1"]),
        ({"TP_WORLD_SIZE": "2"}, 4, ["0,1", "2,3"]),
        ({}, 0, [None, None]),
        ({}, 1, "replicas is 2 with 1 rank.* take 2 devices, but 1 are there"),
        ({"TP_WORLD_SIZE": "2"}, 3, "with 2 rank.* take 4 devices, but 3 are there"),
        ({"ASCEND_RT_VISIBLE_DEVICES": "1,2,3"}, None, "lists 3"),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a"}, 8, "one host"),
    ],
)
def test_engines_share_the_devices(
    environ: dict[str, str], num_found: int | None, lists: list[str | None] | str
) -> None:
    """Those listed, else those that there are; the devices are only counted where that matters."""

    def count() -> int:
        assert num_found is not None
        return num_found

    if isinstance(lists, str):
        with pytest.raises(ConfigError, match=lists):
            ranks.split_host(environ, 2, count)
        return
    shares = ranks.split_host({**environ, "MASTER_PORT": "1"}, 2, count)
    assert [share.environ.get("ASCEND_RT_VISIBLE_DEVICES") for share in shares] == lists
    assert [share.environ.get("MASTER_PORT") for share in shares] == ["1", None]
    if num_found == 0 and len(os.sched_getaffinity(0)) > 1:
        first, second = (set(share.cores) for share in shares)
        assert first
        assert second
        assert not first & second
    for share in shares:  # the ranks that each engine starts
        assert ranks.read_ranks(share.environ).local == int(environ.get("TP_WORLD_SIZE", 0)) or (
            "TP_WORLD_SIZE" not in environ
        )


def test_devices_that_cannot_be_counted_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # the package is found from anywhere
    assert front.count_devices("cpu", clean_environ()) == 0
    if create("npu").why_unusable():
        with pytest.raises(
            RuntimeError, match=r"counted \(.*'npu' cannot be used: .*\); list them"
        ):
            front.count_devices("npu", clean_environ())


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificates")
def test_tls_and_certificates_of_clients(tmp_path: Path) -> None:
    for name in ("server", "client", "stranger"):
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
             "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1",
             "-keyout", f"{name}.key", "-out", f"{name}.crt"],
            cwd=tmp_path, check=True, capture_output=True, timeout=60,
        )  # fmt: skip
    argv = ("--ssl_certfile", "server.crt", "--ssl_keyfile", "server.key")
    argv += ("--ssl_ca_certs", "client.crt")

    def status(name: str) -> int:
        context = ssl.create_default_context(cafile=str(tmp_path / "server.crt"))
        if name:
            context.load_cert_chain(tmp_path / f"{name}.crt", tmp_path / f"{name}.key")
        connection = http.client.HTTPSConnection("127.0.0.1", served.port, context=context)
        try:
            connection.request("GET", "/v1/models")
            return connection.getresponse().status
        finally:
            connection.close()

    with program(*argv, cwd=tmp_path, wait=False) as served:
        served.port = int(served.wait_for(r"at https://.*:(\d+)")[1])
        assert status("client") == 200
        for name in ("", "stranger"):
            with pytest.raises((ssl.SSLError, OSError)):
                status(name)
        with pytest.raises((http.client.HTTPException, OSError)):
            urllib.request.urlopen(f"http://127.0.0.1:{served.port}/health", timeout=10)
        assert status("client") == 200


@pytest.mark.slow
def test_two_engines_on_one_host(tmp_path: Path) -> None:
    """Their answers are alike, and both have work."""
    with program("--replicas", "2", cwd=tmp_path, BIND_CPU="0") as served:
        for index in range(2):
            served.wait_for(f"engine {index} is ready")
        body = {"prompt": "The cat", "max_tokens": 20, "temperature": 0}
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: served.post(PATH, body).json, range(8)))
        assert len({answer["choices"][0]["text"] for answer in answers}) == 1
        started = list(descendants(served.process.pid))
        assert len(started) == 2
        os.kill(started[0], signal.SIGKILL)
        assert served.process.wait(timeout=30) == 1
        assert_nothing_is_left(started, tmp_path)


def test_the_front_needs_no_torch() -> None:
    code = (
        "import sys, gptneox.server.front\n"
        "heavy = {'torch', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True, timeout=60)
