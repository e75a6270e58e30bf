# SPDX-License-Identifier: Apache-2.0
"""tools/bench.py serve: its client against scripted services, its figures, whole runs."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
from support.processes import REPO
from tokenizers import Tokenizer

sys.path.append(str(REPO / "tools"))

import bench
from benchmark import arguments, client, models, results, servers, serving, traffic
from benchmark.client import Cost, Outcome, Request, Service
from benchmark.errors import UsageError, WorkerError
from benchmark.traffic import Lengths

from gptneox.engine.detokenizer import load_tokenizer

OK = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
Send = Callable[[bytes], None]


def event(content: Any) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def token(text: str = "a", finish_reason: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]})


def usage(prompt: int, tokens: int) -> bytes:
    counts = {"prompt_tokens": prompt, "completion_tokens": tokens}
    return event({"choices": [], "usage": counts})


class Scripted:
    """A service in a thread. What `script` yields for a completion is sent; numbers wait."""

    def __init__(self) -> None:
        self.script: Callable[[dict[str, Any], int], Iterator[bytes | float]] = steady
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.most_open = self.open = self.port = 0
        self._loop = asyncio.new_event_loop()
        self._is_up = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        self._is_up.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/"

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    def _serve(self) -> None:
        server = self._loop.run_until_complete(asyncio.start_server(self._answer, "127.0.0.1"))
        self.port = server.sockets[0].getsockname()[1]
        self._is_up.set()
        self._loop.run_forever()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.heads.append(head)
        if head.startswith("GET /v1/models "):
            models = json.dumps({"data": [{"id": "org/tiny"}]})
            writer.write(
                f"HTTP/1.1 200 OK\r\nContent-Length: {len(models)}\r\n\r\n{models}".encode()
            )
        elif head.startswith("POST /v1/completions "):
            size = int(head.lower().partition("content-length: ")[2].split("\r\n")[0])
            body = json.loads(await reader.readexactly(size))
            self.bodies.append(body)
            self.open += 1
            self.most_open = max(self.most_open, self.open)
            for item in self.script(body, len(self.bodies)):
                if isinstance(item, bytes):
                    writer.write(item)
                else:
                    await writer.drain()
                    await asyncio.sleep(item)
            self.open -= 1
        else:
            writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\nno")
        writer.close()


def steady(body: dict[str, Any], number: int) -> Iterator[bytes | float]:
    """As many tokens as are asked for, without a pause; the last two in one piece."""
    num_new = body["max_tokens"]
    yield (OK + "transfer-encoding: chunked\r\n\r\n").encode()
    pieces = [token() for _ in range(num_new - 1)]
    pieces.append(token(finish_reason="length") + usage(len(body["prompt"]), num_new))
    for piece in [*pieces, b": a comment\n\ndata: [DONE]\n\n"]:
        yield f"{len(piece):x}\r\n".encode() + piece + b"\r\n"
    yield b"0\r\n\r\n"


def plain(*pieces: bytes | float) -> Iterator[bytes | float]:
    """An answer without chunks, which ends with the connection."""
    yield (OK + "\r\n").encode()
    yield from pieces


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    service = Scripted()
    yield service
    service.close()


@pytest.fixture
def run_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs bench.py serve; returns its status, the result, what it printed, what it said."""

    def run(*argv: str) -> tuple[int, dict[str, Any], str, str]:
        status = bench.main(["serve", *argv, "--output-dir", str(tmp_path / "out")])
        paths = list((tmp_path / "out").glob("*.json"))
        printed = capsys.readouterr()
        return status, results.read(paths[0]) if paths else {}, printed.out, printed.err

    return run


# -- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["--url", "--model"]),
        (["--url", "http://h", "--model", "pythia-14m"], ["--url", "--model"]),
        (["--url", "127.0.0.1:8000"], ["'127.0.0.1:8000'", "http://"]),
        (["--url", "ftp://h"], ["'ftp://h'", "http://"]),
        (["--url", "http://h:port"], ["'http://h:port'"]),
        (["--url", "http://h", "--against", "vllm"], ["--against", "--model"]),
        (["--url", "http://h", "--arrivals", "2", "--concurrency", "3"], ["--arrivals", "one"]),
        (["--url", "http://h", "--arrivals", "2,-1"], ["'-1'"]),
        (["--url", "http://h", "--text", "nowhere.txt"], ["--text", "nowhere.txt"]),
        (["--url", "http://h", "--batch", "8"], ["--batch"]),
        (["--model", "pythia-14m", "--against", "vllm", "--cache", "/nonexistent"], ["--install"]),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(argv: Any, words: Any, run_serve: Any) -> None:
    status, _, out, err = run_serve(*argv)
    assert (status, out) == (2, "")
    assert err.startswith("bench.py: error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_a_service_that_is_not_there_is_one_line_and_status_1(run_serve: Any) -> None:
    status, _, out, err = run_serve("--url", f"http://127.0.0.1:{servers.free_port()}")
    assert (status, out) == (1, "")
    assert "no connection: Connect call failed" in err or "refused" in err
    assert "--url" in err


# -- requests ------------------------------------------------------------------------------------


def test_requests_are_drawn_alike_for_every_service() -> None:
    moments = traffic.draw_arrivals(2000, 5.0, "0 1")
    assert moments == traffic.draw_arrivals(2000, 5.0, "0 1") != traffic.draw_arrivals(2000, 5.0, 2)
    gaps = [b - a for a, b in pairwise(moments)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.2, rel=0.1)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance == pytest.approx(0.04, rel=0.25)  # of a Poisson process: the mean squared
    fixed = traffic.draw_prompts(5, Lengths(7, 3, is_uniform=False), 0, 96)
    assert {(len(ids), new) for ids, new in fixed} == {(7, 3)}
    assert fixed != traffic.draw_prompts(5, Lengths(7, 3, is_uniform=False), 1, 96)
    words = ["the", "cat", "and", "the", "dog", "sat", "on", "the", "mat"]
    for text, _ in traffic.draw_texts(20, Lengths(4, 3, is_uniform=False), 0, words):
        assert text in " ".join(words)
        assert len(text.split()) == 4
    with pytest.raises(UsageError, match="9 words, a prompt of 10"):
        traffic.draw_texts(1, Lengths(10, 3, is_uniform=False), 0, words)


def test_every_load_has_prompts_of_its_own_and_the_fields_of_vllm(
    scripted: Scripted, run_serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    scripted.script = lambda body, number: chain([0.1], steady(body, number))
    argv = ["--url", scripted.url, "--concurrency", "1,3", "--requests", "6", "--warmup", "2"]
    status, result, out, _ = run_serve(*argv, "--prompt", "5", "--output", "4", "--seed", "9")
    assert status == 0
    assert len(scripted.bodies) == 2 + 2 * 6
    assert scripted.most_open == 3
    assert len({json.dumps(body["prompt"]) for body in scripted.bodies}) == 14  # no cache helps
    body = scripted.bodies[0]
    assert len(body.pop("prompt")) == 5
    assert body == {
        "model": "org/tiny", "max_tokens": 4, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True}, "ignore_eos": True,
    }  # fmt: skip
    assert all("authorization: Bearer secret\r\n" in head for head in scripted.heads)
    assert "secret" not in json.dumps(result)
    assert result["command"].startswith("serve --url URL --concurrency 1,3")
    assert [case["load"] for case in result["cases"]] == [{"concurrency": 1}, {"concurrency": 3}]
    for case in result["cases"]:
        run = case["runs"]["service"]
        assert (run["answered"], run["errors"], run["num_short"]) == (6, {}, 0)
        assert run["output_tokens_per_s"] == pytest.approx(24 / run["seconds"])
        assert run["prompt_tokens_per_s"] == pytest.approx(30 / run["seconds"])
        assert run["pieces_per_token"] == 1
        assert len(run["outcomes"]) == 6
    assert "3 at a time" in out
    assert "The client itself used up to" in out


def test_a_text_and_end_of_text(scripted: Scripted, run_serve: Any, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat and the dog sat on the mat\n" * 3)
    argv = ["--url", scripted.url, "--text", str(tmp_path / "text.txt"), "--prompt", "3"]
    argv += ["--stop-at-eos", "--requests", "2", "--output", "4", "--served-model", "other"]
    status, result, out, _ = run_serve(*argv, "--arrivals", "1000")
    assert status == 0
    assert "ignore_eos" not in scripted.bodies[-1]
    assert len(scripted.bodies[-1]["prompt"].split()) == 3
    assert scripted.bodies[-1]["model"] == result["model"]["name"] == "other"
    assert "1000 per second" in out
    assert str(tmp_path) not in json.dumps(result)


# -- figures -------------------------------------------------------------------------------------


def answered(at: float, *pieces: float) -> Outcome:
    return Outcome(at, at, list(pieces), 10, len(pieces))


def test_figures_of_known_moments() -> None:
    outcomes = [answered(i, i + 0.1 * (i + 1), i + 0.1 * (i + 1) + 0.02) for i in range(10)]
    outcomes.append(Outcome(3.0, 3.0, error="HTTP 429", detail="busy"))
    requests = [Request(outcome.at_s, b"", 2) for outcome in outcomes]
    run = serving.load_figures(requests, outcomes, Cost(0.5, [0.001] * 9), (500.0, 30.0))
    assert run["seconds"] == pytest.approx(10.02)
    assert run["first_token_ms"] == pytest.approx({"p50": 550, "p90": 910, "p99": 991})
    assert run["inter_token_ms"] == pytest.approx({"p50": 20, "p90": 20, "p99": 20})
    assert run["whole_ms"] == pytest.approx({"p50": 570, "p90": 930, "p99": 1011})
    assert run["requests_per_s"] == pytest.approx(10 / 10.02)
    assert (run["good_requests"], run["goodput_per_s"]) == (5, pytest.approx(5 / 10.02))
    assert (run["answered"], run["errors"]) == (10, {"HTTP 429": 1})
    assert run["details"] == ["HTTP 429: busy"]
    assert run["client"]["us_per_token"] == pytest.approx(0.5 / 20 * 1e6)
    late = serving.load_figures(requests, outcomes, Cost(), (None, 19.0))
    assert late["good_requests"] == 0
    assert serving.load_figures(requests, outcomes, Cost(), (None, None))["goodput_per_s"] is None


def test_a_latency_counts_from_the_arrival_not_from_the_sending() -> None:
    late = Outcome(1.0, 1.5, [1.75], 10, 1)
    run = serving.load_figures([Request(1.0, b"", 1)], [late], Cost(), (None, None))
    assert run["first_token_ms"]["p50"] == 750
    assert run["client"]["late_ms"]["p50"] == 500
    assert run["inter_token_ms"] is None


def test_nothing_answered_is_no_figure() -> None:
    failed = Outcome(0.0, error="timeout")
    run = serving.load_figures([Request(0.0, b"", 1)], [failed], Cost(), (1.0, None))
    assert (run["seconds"], run["first_token_ms"], run["goodput_per_s"]) == (0.0, None, 0.0)


def test_delays_of_a_service_are_what_is_measured(scripted: Scripted, run_serve: Any) -> None:
    """Every second answer is late, by far more than this machine could be."""

    def script(body: dict[str, Any], number: int) -> Iterator[bytes | float]:
        is_late = number > 1 and number % 2
        pieces = [token(), 0.2, token(""), 0.2, token(), usage(5, 3), b"data: [DONE]\n\n"]
        return plain(1.5 if is_late else 0.0, *pieces)

    scripted.script = script
    argv = ["--url", scripted.url, "--concurrency", "8", "--requests", "8", "--warmup", "1"]
    argv += ["--prompt", "5", "--output", "3", "--ttft-limit", "1400", "--itl-limit", "5000"]
    status, result, out, _ = run_serve(*argv)
    assert status == 0
    run = result["cases"][0]["runs"]["service"]
    assert run["good_requests"] == 4
    assert run["goodput_per_s"] == pytest.approx(4 / run["seconds"])
    assert run["seconds"] >= 1.9
    assert (
        run["first_token_ms"]["p99"]
        >= 1500
        > 1400
        > min(1e3 * (moments[1] - moments[0]) for moments, *_ in run["outcomes"])
    )
    assert run["inter_token_ms"]["p50"] >= 199
    assert run["whole_ms"]["p99"] >= 1900
    assert "Good: the first token within 1400 ms, the others on average within 5000 ms." in out


# -- what goes wrong -----------------------------------------------------------------------------

BUSY = b'HTTP/1.1 429 No\r\ncontent-length: 37\r\n\r\n{"error": {"message": "come\\nlater"}}  '
FAULTS = {
    "HTTP 429: come later": [BUSY],
    "HTTP 502: <b> bad": [b"HTTP/1.1 502 No\r\n\r\n<b>\n bad"],
    "error in the stream: too bad": [
        (OK + "\r\n").encode(), token(), event({"error": {"message": "too bad"}}),
    ],
    "connection broken: the stream has no [DONE]": [(OK + "\r\n").encode(), token()],
    "connection broken: 0 bytes read": [b""],
    "answer not understood": [(OK + "\r\n").encode(), b"data: {\n\n"],
    "answer not understood: the answer is no HTTP": [b"SSH-2.0\r\n\r\n"],
    "no token": [(OK + "\r\n").encode(), usage(5, 0), b"data: [DONE]\n\n"],
    "timeout: no end within 0.5 s": [(OK + "\r\n").encode(), token(), 1.0],
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_errors_are_counted_by_their_kind(fault: str, scripted: Scripted) -> None:
    scripted.script = lambda body, number: iter(FAULTS[fault]) if number == 2 else steady(body, 0)
    service = Service.of(scripted.url, "", 0.5 if "timeout" in fault else 20.0)
    body = json.dumps({"prompt": [1], "max_tokens": 2}).encode()
    requests = [Request(0.0, body, 2)] * 3
    outcomes, _ = asyncio.run(client.send_all(service, requests, 1))
    assert [bool(outcome.error) for outcome in outcomes] == [False, True, False]
    assert f"{outcomes[1].error}: {outcomes[1].detail}".removesuffix(": ").startswith(fault)


def test_failed_requests_end_in_status_1_with_the_others_measured(
    scripted: Scripted, run_serve: Any
) -> None:
    scripted.script = lambda body, number: iter([BUSY]) if number % 2 else steady(body, 0)
    argv = ["--url", scripted.url, "--requests", "6", "--warmup", "1", "--output", "3"]
    status, _, _, err = run_serve(*argv)
    assert status == 1  # the first request of all fails, so nothing is measured
    assert "the first requests failed: HTTP 429: come later" in err
    status, result, out, _ = run_serve(*argv)
    assert status == 1
    assert result["cases"][0]["runs"]["service"]["errors"] == {"HTTP 429": 3}
    assert "Failed, service at 8 at a time: HTTP 429 (3)." in out


def test_a_key_that_is_missing_is_told(scripted: Scripted) -> None:
    async def refuse(service: Service, path: str) -> Any:
        raise client.Refused("HTTP 401", "a valid key is needed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "get_json", refuse)
        with pytest.raises(WorkerError, match="OPENAI_API_KEY"):
            asyncio.run(client.find_model(Service.of(scripted.url, "", 1.0)))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h", ("h", 80, "", False)),
        ("https://h/", ("h", 443, "", True)),
        ("http://[::1]:8000/llm/v1/", ("::1", 8000, "/llm", False)),
    ],
)
def test_urls(url: str, expected: tuple[Any, ...]) -> None:
    service = Service.of(url, "", 1.0)
    assert (service.host, service.port, service.path, service.is_tls) == expected
    assert url.removesuffix("/").removesuffix("/v1").startswith(service.url.partition(":")[0])


# -- services that are started -------------------------------------------------------------------


def test_a_made_up_tokenizer_has_a_token_for_every_id(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(servers.make_tokenizer(50304)))
    tokenizer = Tokenizer.from_file(str(path))
    assert tokenizer.get_vocab_size() == 50304
    text = "What's deep learning? \u00e9 \U0001f600\n"
    ids = tokenizer.encode(text).ids
    assert len(ids) < len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(servers.END_OF_TEXT).ids == [0]
    small = servers.make_tokenizer(96)["model"]
    assert len(small["vocab"]) == 96
    assert not small["merges"]


def test_a_model_without_a_tokenizer_is_served_with_a_made_up_one(tmp_path: Path) -> None:
    shape = models.Shape(1, 32, 2, vocab_size=400, max_position_embeddings=128)
    folder = models.make_checkpoint(tmp_path / "tiny", shape, "float32", str)
    model = models.open_model(str(folder), "float32", tmp_path, str)
    served = servers.with_tokenizer(model, tmp_path, str)
    assert served.path != folder
    assert (served.path / "model.safetensors").samefile(folder / "model.safetensors")
    assert load_tokenizer(served.path, 400).decode([0]) == servers.END_OF_TEXT
    assert servers.with_tokenizer(served, tmp_path, str) is served


def test_a_server_that_dies_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('last words'); raise SystemExit(3)"]
    server = servers.Server("ours", command, {}, servers.free_port(), tmp_path / "log")
    with pytest.raises(
        WorkerError, match=r"ours: the service ended with status 3(.|\n)*last words"
    ):
        server.wait_until_ready(20.0)
    server.close()


def test_a_peer_that_does_not_start_is_left_out_with_a_note(
    scripted: Scripted, run_serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of our own service the scripted one runs, in place of vLLM's a program that ends."""

    def start(name: str, *_: Any) -> servers.Server:
        code = "import time; time.sleep(60)" if name == "gptneox" else "raise SystemExit(3)"
        log = tmp_path / f"{name}.log"
        server = servers.Server(name, [sys.executable, "-c", code], {}, scripted.port, log)
        if name == "gptneox":
            server.wait_until_ready = lambda: None  # type: ignore[method-assign]
        return server

    monkeypatch.setattr(servers, "start", start)
    monkeypatch.setattr(serving, "interpreter", lambda *_: Path(sys.executable))
    shape = models.Shape(1, 32, 2, vocab_size=400, max_position_embeddings=128)
    folder = models.make_checkpoint(tmp_path / "tiny", shape, "float32", str)
    argv = ["--model", str(folder), "--against", "vllm", "--device", "cpu", "--requests", "3"]
    status, result, out, err = run_serve(*argv, "--cache", str(tmp_path / "cache"))
    assert status == 1
    assert "vllm is left out" in err
    assert "Note: vllm is left out (vllm: the service ended with status 3)." in out
    assert list(result["engines"]) == list(result["cases"][0]["runs"]) == ["gptneox"]
    assert str(tmp_path) not in json.dumps(result)


@pytest.mark.slow
def test_our_own_service_is_started_measured_and_ended(run_serve: Any, tmp_path: Path) -> None:
    shape = models.Shape(2, 32, 2, vocab_size=400, max_position_embeddings=128)
    folder = models.make_checkpoint(tmp_path / "tiny", shape, "float32", str)
    argv = ["--model", str(folder), "--dtype", "float32", "--device", "cpu", "--threads", "1"]
    argv += ["--cache", str(tmp_path / "cache"), "--requests", "6", "--concurrency", "3"]
    status, result, out, err = run_serve(*argv, "--prompt", "9", "--output", "5")
    assert status == 0, err
    run = result["cases"][0]["runs"]["gptneox"]
    assert (run["answered"], run["num_short"]) == (6, 0)
    assert run["prompt_tokens_per_s"] == pytest.approx(6 * 9 / run["seconds"])
    assert result["engines"]["gptneox"]["versions"]["torch"]
    assert result["description"]
    assert "gptneox" in out


@pytest.mark.parametrize("kind", ["arrivals_per_s", "concurrency"])
def test_a_result_becomes_a_picture_and_a_section(kind: str, tmp_path: Path) -> None:
    run = serving.load_figures(
        [Request(0.0, b"", 2)], [answered(0.0, 0.1, 0.2)], Cost(0.1, [0.001]), (200.0, None)
    )
    result = {
        **results.head(["serve", "--url", "http://secret.host"], "tiny"),
        "kind": "serve", "model": {"name": "tiny"}, "dtype": "", "device": "", "description": "",
        "threads": 0, "engines": {"service": {"dtype": "", "versions": {}}}, "notes": [],
        "lengths": {**vars(Lengths(4, 2)), "unit": "tokens"}, "requests": 1, "seed": 0,
        "limits": {"first_token_ms": 200.0, "inter_token_ms": None},
        "cases": [{"load": {kind: n}, "runs": {"service": run}} for n in (1, 2)],
    }  # fmt: skip
    document = tmp_path / "page.md"
    document.write_text(f"{results.BEGIN}\n{results.END}\n")
    results.write(result, tmp_path / "a.json")
    results.write_docs(document, [tmp_path / "a.json"])
    text = document.read_text()
    assert "### tiny: a service under load" in text
    assert "bench.py serve --url URL\n" in text
    assert "secret.host" not in text
    table = [line for line in text.splitlines() if line.startswith("| service |")]
    assert any(" 100.0 | 100.0 | 100.0 | 100.0 |" in line for line in table)
    pytest.importorskip("matplotlib")
    from benchmark.plots import write_plot

    (path,) = write_plot(tmp_path / "a.json", result)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_flags_have_defaults_that_measure_something() -> None:
    args = arguments.parse_service(["--url", "http://h"])
    assert (args.concurrency, args.arrivals, args.requests) == ([8], None, 100)
    assert arguments.parse_service(["--url", "http://h", "--arrivals", "0.5,2"]).arrivals == [
        0.5,
        2,
    ]
