# SPDX-License-Identifier: Apache-2.0
"""Question sets, scorers and `--task precision`: answers, result files, resuming, refusals."""

from __future__ import annotations

import csv
import errno
import json
import os
import random
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import questions, ranks
from support.questions import NUM_BOOLQ, NUM_VAL, SUBJECTS
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptneox.cli import read_settings
from gptneox.config.errors import ConfigError, FileError
from gptneox.config.settings import EMBEDDED_CHECKPOINT
from gptneox.engine.api import Engine
from gptneox.evaluation import datasets, precision_results
from gptneox.evaluation.scoring import (
    GenerationScorer,
    NextTokenScorer,
    Question,
    Result,
    choice_from_reasoning,
    evaluate,
    first_character,
    first_letter,
    last_number,
    same_number,
)
from gptneox.evaluation.subjects import CEVAL_SUBJECTS, MMLU_SUBJECTS
from gptneox.parallel import TensorParallelGroup
from gptneox.session import load_engine, start
from gptneox.tasks import precision
from gptneox.weights.cut import cut_checkpoint

RESULTS = ("cache0.csv", "cache0.json", "result_0_classes_acc.json", "result_0_subject_acc.json")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return questions.write_model(tmp_path_factory.mktemp("model") / "checkpoint")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    questions.write_boolq(folder / "data" / "boolq")
    questions.write_mmlu(folder / "data")
    return folder


@pytest.fixture
def work(data: Path, tmp_path: Path) -> Path:
    """A work_dir of this test's own."""
    return Path(shutil.copytree(data, tmp_path / "work"))


def run(
    work: Path | str,
    model: Path,
    *,
    attention: str = "paged",
    dtype: str = "float32",
    **section: Any,
) -> Path:
    """`--task precision`; returns the result folder."""
    values = {"mode": "mmlu", "batch": 2, "shot": 2, "work_dir": work, **section}
    folder = Path(work or ".")
    ini = folder / f"{time.monotonic_ns()}.ini"
    lines = "".join(f"{key} = {value}\n" for key, value in values.items())
    ini.write_text("[precision]\n" + lines, encoding="utf-8")
    argv = ["--task", "precision", "--config", ini, "--model_path", model, "--dtype", dtype]
    argv += ["--attention", attention, "--device", "cpu", "--num_blocks", "16"]
    precision.run(read_settings([str(a) for a in argv], ini))
    return folder / "test_result"


def rows(folder: Path) -> list[list[str]]:
    with (folder / "cache0.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def result(folder: Path, name: str = "classes") -> dict[str, Any]:
    parsed = json.loads((folder / f"result_0_{name}_acc.json").read_text(encoding="utf-8"))
    assert isinstance(parsed, dict)
    return parsed


# -- values from text ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (" B", "B"),
        ("", "-1"),
        ("c)", "C"),
        ("12 + 3 = ?", "-1"),
        ("答案是 d", "D"),
        ("\n\n a", "A"),
    ],
)
def test_first_letter(text: str, value: str) -> None:
    assert first_letter(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [(" \n\tB.", "B"), ("   \n", "-1"), ("", "-1"), ("b", "b")]
)
def test_first_character(text: str, value: str) -> None:
    assert first_character(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("First A looks right, but the correct answer is (C).", "C"),
        ("The answer is option D because A is wrong", "D"),
        ("The answer is Apollo", "A"),  # the last pattern takes any of the letters
        ("经过分析，所以答案是B，而不是A", "B"),
        ("应该选择 D", "D"),
        ("I think\n(B) it is", "B"),
        ("\nC. the third one, not A", "C"),
        ("maybe B or so", "B"),
        ("ChoiceB: yes", "B"),
        ("no idea", ""),
        ("", ""),
    ],
)
def test_choice_from_reasoning(text: str, value: str) -> None:
    assert choice_from_reasoning(text) == value


@pytest.mark.parametrize(
    ("text", "value", "correct"),
    [
        ("12 apples, so 1,234 in all.", "1234", True),
        ("it is 1234.00005", "1234.00005", True),
        ("it is 1234.01", "1234.01", False),
        ("-1234", "-1234", False),
        ("none", "", False),
        ("9" * 400, "9" * 400, False),
    ],
)
def test_last_number(text: str, value: str, correct: bool) -> None:
    assert last_number(text) == value
    assert same_number(value, last_number("a + b = 1,234\n#### 1,234")) is correct


# -- reading -------------------------------------------------------------------------------------


def test_subjects() -> None:
    def sizes(subjects: dict[str, Any]) -> dict[str, int]:
        groups = [subject.group for subject in subjects.values()]
        return {group: groups.count(group) for group in groups}

    assert sizes(MMLU_SUBJECTS) == {
        "STEM": 18, "humanities": 13, "social sciences": 12, "other": 14,
    }  # fmt: skip
    assert sizes(CEVAL_SUBJECTS) == {
        "STEM": 20, "Social Science": 10, "Humanities": 11, "Other": 11,
    }  # fmt: skip


def test_boolq_prompt(tmp_path: Path) -> None:
    row = {"title": "Tide", "passage": "Water rises.", "question": "is it wet", "answer": True}
    text = json.dumps(row) + "\r\n\r\n"
    (tmp_path / "dev.jsonl").write_bytes(text.encode("utf-8-sig"))  # as Windows programs save it
    (question,) = datasets.read_boolq(tmp_path).questions
    (prompt,) = question.prompts()
    assert prompt == "Tide -- Water rises.\nQuestion: is it wet?\nAnswer:"
    assert (question.subject, question.answer) == ("dev", "True")


def test_mmlu_prompt(tmp_path: Path) -> None:
    dev = [["Q1", "a", "b", "c", "d", "A"], ["Q2", "e", "f", "g", "h", "D"], ["Q3", *"ijkl", "B"]]
    questions.write_rows(tmp_path / "dev" / "college_physics_dev.csv", dev)
    odd = ['say "no", then', "None", "NA", "1.0", "", "C"]
    questions.write_rows(tmp_path / "val" / "college_physics_val.csv", [odd])
    (question,) = datasets.read_mmlu(tmp_path, shots=2).questions
    header = (
        "The following are multiple choice questions (with answers) about  college physics.\n\n"
    )
    first, second = (
        "Q1\nA. a\nB. b\nC. c\nD. d\nAnswer: A\n\n",
        "Q2\nA. e\nB. f\nC. g\nD. h\nAnswer: D\n\n",
    )
    asked = 'say "no", then\nA. None\nB. NA\nC. 1.0\nD. \nAnswer:'
    assert list(question.prompts()) == [
        header + first + second + asked,
        header + first + asked,
        header + asked,
    ]
    (alone,) = datasets.read_mmlu(tmp_path, shots=0).questions
    assert list(alone.prompts()) == [header + asked]


def test_ceval_and_cmmlu(tmp_path: Path) -> None:
    columns = ["id", "question", "A", "B", "C", "D", "answer", "explanation"]
    dev = [columns, ["0", "问一", "甲", "乙", "丙", "丁", "B", "因为\n如此"]]
    path = tmp_path / "dev" / "logic_dev.csv"
    questions.write_rows(path, dev)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    asked = ["0", "问二", "1", "2", "3", "4", "D"]
    questions.write_rows(tmp_path / "val" / "logic_val.csv", [columns[:7], asked])
    read = datasets.read_ceval(tmp_path, shots=5)
    (question,) = read.questions
    assert next(iter(question.prompts())) == (
        "The following are multiple choice questions (with answers) about  logic.\n\n"
        "问一\nA. 甲\nB. 乙\nC. 丙\nD. 丁\nAnswer: B\n\n问二\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )
    assert len(read.missing) == 51
    assert read.groups == {"logic": "Humanities"}
    (question,) = datasets.read_ceval_generated(tmp_path).questions
    assert "逻辑学" in question.body

    for split, row in (("dev", dev[1][:7]), ("test", asked)):
        questions.write_rows(tmp_path / split / "agronomy.csv", [["", *columns[1:7]], row])
    mapping = {"cmmlu_all_sets": {"agronomy": "农学"}}
    (tmp_path / "subject_mapping.json").write_text(json.dumps(mapping), encoding="utf-8")
    (question,) = datasets.read_cmmlu(tmp_path).questions
    prompt = next(iter(question.prompts()))
    assert "农学" in prompt
    assert prompt.endswith("题目：问二\nA. 1\nB. 2\nC. 3\nD. 4\n答案是：")


def test_gsm8k(tmp_path: Path) -> None:
    row = {"question": "How many?", "answer": "2 * 600 = <<2*600=1200>>1,200\n#### 1,200"}
    (tmp_path / "GSM8K.jsonl").write_text(json.dumps(row), encoding="utf-8")
    read = datasets.read_gsm8k(tmp_path)
    (question,) = read.questions
    assert (question.body, question.answer, read.scorer.num_new_tokens) == (
        "How many?",
        "1200",
        512,
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"q,a,b,c,d,A\nq,a,b,c,A\n", "line 2: 5 columns"),
        (b"q,a,b,c,d,A\nq,a,b,c,d,E\n", "line 2: the answer is 'E'"),
        (b'"two\nlines",a,b,c,d,A\nq,a,b,c,d,\n', "line 3: the answer is ''"),
        (b'q,a,b,c,d,A\n"open,a,b,c,d,A\n', "after row 1"),
        (b"\xff,a,b,c,d,A\n", "not UTF-8"),
        ("q,a,b,c,d,A\n".encode("utf-16"), "is UTF-16"),
        (b"question,A,B,C,D,answer\n", "line 1: the answer is 'answer'"),
    ],
)
def test_malformed_csv(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "anatomy_val.csv").write_bytes(content)
    with pytest.raises(FileError, match=message) as caught:
        datasets.read_mmlu(tmp_path, shots=0)
    assert "anatomy_val.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"title": "t"}', "line 1: question is None"),
        ('{"title": "t", "question": "q", "passage": "p", "answer": 1}', "line 1: answer is 1"),
        ('{"title": "\\ud800", "question": "q", "passage": "p", "answer": true}', "surrogate"),
        ("\n[1]", "line 2: list"),
        ("{", "line 1: not JSON"),
        ("", "no questions"),
        ("\ufeff{}", "is UTF-16"),
    ],
)
def test_malformed_boolq(tmp_path: Path, content: str, message: str) -> None:
    encoding = "utf-16-le" if content.startswith("\ufeff") else "utf-8"
    (tmp_path / "dev.jsonl").write_text(content, encoding=encoding)
    with pytest.raises(FileError, match=message):
        datasets.read_boolq(tmp_path)


def test_no_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none of its 57 subjects"):
        datasets.read_mmlu(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        datasets.read_boolq(tmp_path / "nowhere")


# -- prompts that have to fit --------------------------------------------------------------------


@pytest.mark.parametrize(("drop_longest", "kept"), [(False, "<lonng>"), (True, "<s>")])
def test_examples_are_dropped(drop_longest: bool, kept: str) -> None:
    tokenizer = questions.make_tokenizer()

    class Encoder:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    question = Question(0, "x", "body", "A", "h:", ("<lonng>", "<s>"), drop_longest)
    lengths = [len(Encoder().encode(text, False)) for text in question.prompts()]
    assert lengths == sorted(lengths, reverse=True)
    prompt = question.fit(Encoder(), lengths[1])
    assert prompt
    assert (prompt.text, prompt.num_examples) == (f"h:{kept}body", 1)
    assert question.fit(Encoder(), lengths[2] - 1) is None


def test_too_long_questions(work: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = [" ".join(questions.WORDS * 60), "a", "b", "c", "d", "A"]
    path = work / "data" / "val" / "anatomy_val.csv"
    others = list(csv.reader(path.read_text().splitlines()))
    questions.write_rows(path, [others[0], long, *others[1:]])
    folder = run(work, model, batch=3)
    assert rows(folder)[1] == ["1", "anatomy", "A", "-1"]
    assert result(folder)["protocol"]["questions_too_long"] == 1
    assert result(folder)["protocol"]["questions"] == 3 * NUM_VAL + 1
    assert "1 questions too long for 511 tokens" in caplog.text
    right = sum(row[2] == row[3] for row in rows(folder))
    assert result(folder)["Avg"] == right / (3 * NUM_VAL + 1)
    before = [(folder / name).read_bytes() for name in RESULTS]
    run(work, model, batch=3)  # nothing left to ask: counted again, all the same
    assert [(folder / name).read_bytes() for name in RESULTS] == before


# -- answers -------------------------------------------------------------------------------------


def hf_answers(
    path: Path, asked: Any, labels: dict[str, str]
) -> tuple[list[str], list[list[float]]]:
    """Choices and log-probabilities of transformers in fp32, one prompt at a time."""
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = [tokenizer.encode(text, add_special_tokens=False)[-1] for text in labels.values()]
    values = []
    with torch.inference_mode():
        for question in asked:
            prompt = next(iter(question.prompts()))
            batch = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
            logits = reference(batch["input_ids"]).logits[0, -1]
            values.append(logits.log_softmax(-1)[ids].tolist())
    return [list(labels)[max(range(len(v)), key=v.__getitem__)] for v in values], values


def logged(folder: Path) -> list[list[float]]:
    """Log-probabilities in device0.log, which has six decimals."""
    lines = (folder / "device0.log").read_text(encoding="utf-8").splitlines()
    found = [line.removeprefix("[+] log p: ") for line in lines if line.startswith("[+] log p: ")]
    return [[float(part.split()[1]) for part in line.split(", ")] for line in found]


@pytest.mark.parametrize("mode", ["boolq", "mmlu"])
@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_answers_equal_transformers(work: Path, model: Path, mode: str, attention: str) -> None:
    folder = run(work, model, attention=attention, mode=mode, batch=3)
    if mode == "boolq":
        asked = datasets.read_boolq(work / "data" / "boolq").questions
        lead = "How can we learning machine learning:"
        labels = {"False": f"{lead} no", "True": f"{lead} yes"}
    else:
        asked = datasets.read_mmlu(work / "data", shots=2).questions
        labels = {letter: f"Answer: {letter}" for letter in "ABCD"}
    choices, values = hf_answers(model, asked, labels)
    assert [row[3] for row in rows(folder)] == choices
    assert [row[:3] for row in rows(folder)] == [[str(q.index), q.subject, q.answer] for q in asked]
    torch.testing.assert_close(
        torch.tensor(logged(folder)), torch.tensor(values), rtol=0, atol=2e-5
    )
    right = [choice == q.answer for choice, q in zip(choices, asked, strict=True)]
    assert result(folder)["Avg"] == sum(right) / len(right)
    if mode == "mmlu":
        for i, subject in enumerate(SUBJECTS):
            share = sum(right[i * NUM_VAL : (i + 1) * NUM_VAL]) / NUM_VAL
            assert result(folder, "subject")[subject] == share
        physics = result(folder, "subject")["college_physics"]
        assert result(folder)["Avg(Hard)"] == result(folder)["STEM"] == physics
    else:
        assert result(folder)["boolq"] == result(folder)["Avg"]
        assert result(folder)["Avg(Hard)"] is None


def run_on_rank(group: TensorParallelGroup, work: Path, model: Path) -> None:
    folder = work if group.rank == 0 else work.parent / "other"
    folder.mkdir(exist_ok=True)
    (folder / "data").is_dir() or shutil.copytree(work / "data", folder / "data")
    run(folder, model, attention="flash", batch=3)


@pytest.fixture(scope="module")
def teams() -> Iterator[ranks.Teams]:
    with ranks.open_teams() as opened:
        yield opened


def test_cut_model_gives_the_same_answers(
    work: Path, model: Path, tmp_path: Path, teams: ranks.Teams
) -> None:
    cut_checkpoint(model, tmp_path / "cut" / "part_model", 2)
    teams(2).run(run_on_rank, work, tmp_path / "cut")
    assert not (tmp_path / "other" / "test_result").exists(), "only rank 0 writes"
    whole = run(
        Path(shutil.copytree(work / "data", tmp_path / "w" / "data")).parent, model, batch=3
    )
    assert rows(work / "test_result") == rows(whole)


@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_first_letter_scoring(work: Path, model: Path, tmp_path: Path, attention: str) -> None:
    for favoured, value in ((" B", "B"), ("<|endoftext|>", "-1")):
        name = "b" if favoured == " B" else "end"
        path = questions.edit_weights(model, tmp_path / name, questions.always(favoured))
        shutil.rmtree(work / "test_result", ignore_errors=True)
        folder = run(work, path, attention=attention, scoring="first_letter", seq_len_out=3, shot=0)
        assert {row[3] for row in rows(folder)} == {value}
        protocol = result(folder)["protocol"]
        assert (protocol["scoring"], protocol["seq_len_out"], protocol["shot"]) == (
            "first_letter", 3, 0,
        )  # fmt: skip


@pytest.mark.parametrize("attention", ["paged", "flash"])
@pytest.mark.parametrize(
    ("favoured", "answer"), [(" yes", "True"), (" no", "False"), (None, "False")]
)
def test_boolq_favourite(
    work: Path, model: Path, tmp_path: Path, attention: str, favoured: str | None, answer: str
) -> None:
    """A tie is False."""
    path = questions.edit_weights(model, tmp_path / "toy", questions.always(favoured))
    folder = run(work, path, attention=attention, mode="boolq", batch=5)
    assert {row[3] for row in rows(folder)} == {answer}
    share = sum(row[2] == answer for row in rows(folder)) / NUM_BOOLQ
    assert result(folder)["Avg"] == result(folder, "subject")["dev"] == share


def test_tie_takes_the_first_letter(work: Path, model: Path, tmp_path: Path) -> None:
    path = questions.edit_weights(model, tmp_path / "toy", questions.always(None))
    assert {row[3] for row in rows(run(work, path))} == {"A"}


def test_labels_need_distinct_tokens() -> None:
    tokenizer = AutoTokenizerStub()
    with pytest.raises(ConfigError, match="not distinct"):
        NextTokenScorer({"A": "Answer: A", "B": "Answer: B"}).check(tokenizer)


class AutoTokenizerStub:
    """Every text is one unknown token."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [3]


# -- what is kept --------------------------------------------------------------------------------


def test_files(work: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(work, model)
    assert sorted(p.name for p in folder.iterdir()) == sorted([*RESULTS, "device0.log"])
    text = (folder / "device0.log").read_text(encoding="utf-8")
    assert text.startswith('[+] protocol: {"mode": "mmlu", "shot": 2, "scoring": "logits"')
    for line in (
        "[+] set mode to mmlu",
        "[~] Skip Task: abstract_algebra",
        "========== prompt start ==========",
        "==========  prompt end  ==========",
        "========== answer start ==========",
        "[+] prompt length: ",
        "[Correct] predict: ",
        "[Wrong] predict: ",
    ):
        assert f"\n{line}" in text, line
    assert text.splitlines()[-1] == f"[+] Avg acc: {result(folder)['Avg']}"
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["subject", "class", "correct", "total", "accuracy"]
    assert f"results: {folder}" in out
    assert "scoring=logits" in out


def in_a_process(work: Path, model: Path, batch: int) -> None:
    torch.set_num_threads(1)
    run(work, model, batch=batch)


@pytest.mark.parametrize("batch", [1, 3])
def test_killed_and_resumed(
    work: Path, data: Path, model: Path, tmp_path: Path, batch: int
) -> None:
    whole = run(Path(shutil.copytree(data, tmp_path / "whole")), model, batch=batch)
    cache = work / "test_result" / "cache0.csv"
    num_rows = random.SystemRandom().randrange(1, 2 * NUM_VAL)
    process = ranks.start_process(in_a_process, work, model, batch)
    end = time.monotonic() + 60
    while not cache.is_file() or cache.read_bytes().count(b"\n") < num_rows:
        assert process.is_alive(), "it was over before it could be killed"
        assert time.monotonic() < end, "no answers came"
    process.kill()
    process.join()
    done = cache.read_bytes().count(b"\n")
    assert not (work / "test_result" / "result_0_classes_acc.json").exists()
    with cache.open("a", encoding="utf-8") as file:
        file.write(f"{done},anat")  # as if it had been killed while it wrote
    folder = run(work, model, batch=batch)
    log = (folder / "device0.log").read_text(encoding="utf-8")
    assert "answers are taken over" in log or done < batch
    assert log.count("[+] Avg acc: ") == 1
    for name in RESULTS:
        ours, theirs = ((f / name).read_text(encoding="utf-8") for f in (folder, whole))
        assert ours.replace(str(work), "") == theirs.replace(str(tmp_path / "whole"), ""), name


def test_complete_cache_is_only_counted(work: Path, model: Path) -> None:
    folder = run(work, model)
    before = {name: (folder / name).read_bytes() for name in RESULTS}
    (folder / "result_0_classes_acc.json").unlink()
    (folder / "device0.log").unlink()
    run(work, model)
    assert {name: (folder / name).read_bytes() for name in RESULTS} == before
    assert "prompt start" not in (folder / "device0.log").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("mode", {"mode": "boolq"}),
        ("shot", {"shot": 1}),
        ("scoring", {"scoring": "first_letter"}),
        ("seq_len_out", {"scoring": "first_letter", "seq_len_out": 4}),
        ("dtype", {"dtype": "bfloat16"}),
        ("attention", {"attention": "flash"}),
        ("model", {}),
        ("data", {}),
    ],
)
def test_stale_cache_is_refused(
    work: Path, model: Path, tmp_path: Path, field: str, change: dict[str, Any]
) -> None:
    first = {"scoring": "first_letter", "seq_len_out": 2} if field == "seq_len_out" else {}
    folder = run(work, model, **first)
    before = {name: (folder / name).read_bytes() for name in RESULTS}
    other = model
    if field == "model":
        other = questions.write_model(tmp_path / "other", seed=1)
    if field == "data":
        path = work / "data" / "dev" / "anatomy_dev.csv"
        path.write_text(path.read_text().replace("what", "which", 1))
    with pytest.raises(ConfigError, match="answers of another run") as caught:
        run(work, other, **change)
    reason = str(caught.value).split("different are: ")[1]
    assert field in reason.replace("data,", "data ,").replace(";", " ").split()
    assert reason.endswith("test_result away, or set another work_dir")
    assert "work_dir" in reason
    assert {name: (folder / name).read_bytes() for name in RESULTS} == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "cache0.json").unlink(), "missing or damaged"),
        (lambda f: (f / "cache0.json").write_text("{"), "missing or damaged"),
        (lambda f: (f / "cache0.csv").write_text("0,anatomy,Z,A\n" * 2), "line 1 is damaged"),
        (lambda f: (f / "cache0.csv").write_bytes((f / "cache0.csv").read_bytes() * 2), "too many"),
    ],
)
def test_damaged_cache(work: Path, model: Path, damage: Any, message: str) -> None:
    folder = run(work, model)
    damage(folder)
    with pytest.raises(FileError, match=message):
        run(work, model)


def test_one_run_at_a_time(work: Path, model: Path) -> None:
    dataset = datasets.read_mmlu(work / "data", shots=2)
    results = precision_results.ResultFolder(work / "test_result", dataset, {}, {})
    with pytest.raises(RuntimeError, match="another run writes"):
        run(work, model)
    results.close()
    run(work, model)


@pytest.mark.parametrize("name", ["cache0.csv", "cache0.json", "result_0_subject_acc.json"])
def test_results_that_cannot_be_written_are_found_first(
    name: str, work: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (work / "test_result" / name).mkdir(parents=True)
    with caplog.at_level("INFO"), pytest.raises(OSError, match=rf"{name} cannot be written: .*"):
        run(work, model)
    assert "loaded" not in caplog.text


def test_the_accuracy_is_shown_when_the_writing_fails(
    work: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a disk that has become full meanwhile; the answers are kept for another try."""
    write = precision_results.write_file

    def full(path: Path, content: str) -> None:
        if path.name.startswith("result_"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(precision_results, "write_file", full)
    with pytest.raises(OSError, match="No space left"):
        run(work, model)
    assert re.search(r"^total +2 +12 +0\.1667$", capsys.readouterr().out, re.MULTILINE)
    monkeypatch.undo()
    assert result(run(work, model))["Avg"] == pytest.approx(2 / 12)


@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_failure_keeps_what_is_done(
    work: Path, model: Path, tmp_path: Path, attention: str
) -> None:
    """A NaN in the embedding of a token that only question 5 contains."""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["gpt_neox.embed_in.weight"][questions.token_id("~")] = torch.nan

    path = work / "data" / "val" / "college_physics_val.csv"
    content = list(csv.reader(path.read_text().splitlines()))
    content[1][0] += "~"
    questions.write_rows(path, content)
    broken = questions.edit_weights(model, tmp_path / "broken", spoil)
    with pytest.raises(RuntimeError, match=r"question 4 to 5: .*4 answers are kept .*again"):
        run(work, broken, attention=attention)
    assert len(rows(work / "test_result")) == 4


@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_failure_is_over_with_its_batch(model: Path, tmp_path: Path, attention: str) -> None:
    """Where the caller goes on, the batches after a failed one are as if it had never been."""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["gpt_neox.embed_in.weight"][questions.token_id("~")] = torch.nan

    broken = questions.edit_weights(model, tmp_path / "broken", spoil)
    bodies = ["river", "stone", "lamp ~", "bridge", "river stone lamp bridge"]
    asked = [Question(i, "s", f"{body} Answer:", "A") for i, body in enumerate(bodies)]
    scorer = datasets.choice_scorer("logits", 1)
    both: list[list[Result]] = []
    for path in (model, broken):
        results: list[Result] = []
        evaluate(asked, scorer, make_engine(path, attention), 1, results.extend, go_on=True)
        both.append(results)
    whole, damaged = both
    assert [bool(r.error) for r in damaged] == [False, False, True, False, False]
    assert "question 2 (s): " in damaged[2].error
    for i in (0, 1, 3, 4):
        assert damaged[i].prediction == whole[i].prediction


def test_wrong_flags(work: Path) -> None:
    settings = read_settings(["--task", "precision", "--temperature", "0.7"], work / "none.ini")
    with pytest.raises(ConfigError, match="--temperature does not go with"):
        precision.run(settings)


def test_nothing_configured_for_ceval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no C-Eval questions are shipped"):
        run("", tmp_path, mode="ceval")


# -- the loop that tests/modeltest shares --------------------------------------------------------


def make_engine(model: Path, attention: str) -> Engine:
    argv = ["--model_path", str(model), "--attention", attention, "--device", "cpu"]
    settings = read_settings([*argv, "--num_blocks", "16"], Path("none.ini"))
    device, group = start(settings)
    section = replace(settings.engine, max_batch_size=2)
    return load_engine(settings, device, group, section)


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return make_engine(model, "paged")


def test_evaluate_goes_on(engine: Engine) -> None:
    """A failing batch is wrong where the caller wants to go on, and named otherwise."""

    def extract(text: str) -> str:
        if next(calls) == 2:
            raise ValueError("no such luck")
        return "A"

    asked = [Question(i, "s", f"question {i}", "A") for i in range(5)]
    scorer = GenerationScorer("test", 2, extract)
    results: list[Result] = []
    calls = iter(range(10))
    evaluate(asked, scorer, engine, 2, results.extend, go_on=True)
    assert [r.correct for r in results] == [True, True, False, False, True]
    assert "question 2 to 3: no such luck" in results[2].error
    assert [r.question.index for r in results] == list(range(5))
    calls = iter(range(10))
    with pytest.raises(RuntimeError, match="question 2 to 3: no such luck"):
        evaluate(asked, scorer, engine, 2, lambda batch: None)


def test_generated_forms(data: Path, engine: Engine, tmp_path: Path) -> None:
    """modeltest's MMLU over real generation: every question gets a result."""
    folder = Path(shutil.copytree(data / "data", tmp_path / "mmlu"))
    (folder / "val").rename(folder / "test")
    for file in (folder / "test").iterdir():
        file.rename(file.with_name(file.name.replace("_val", "_test")))
    for shots in (0, 1):
        dataset = datasets.read_mmlu_generated(folder, shots=shots)
        results: list[Result] = []
        evaluate(dataset.questions[:2], dataset.scorer, engine, 2, results.extend)
        assert [r.question.index for r in results] == [0, 1]
        assert all(r.prompt for r in results)


# -- the checkpoint that is shipped --------------------------------------------------------------


@pytest.mark.parametrize("mode", ["boolq", "mmlu"])
def test_shipped_model_equals_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """A sample of the shipped questions, in fp32."""
    shipped = EMBEDDED_CHECKPOINT / "eval"
    if not (shipped / mode).is_dir():
        pytest.skip(f"{EMBEDDED_CHECKPOINT} is not there yet")
    monkeypatch.chdir(tmp_path)
    if mode == "boolq":
        lines = (shipped / mode / "dev.jsonl").read_text(encoding="utf-8").splitlines()[:24]
        (tmp_path / "data" / mode).mkdir(parents=True)
        (tmp_path / "data" / mode / "dev.jsonl").write_text("\n".join(lines), encoding="utf-8")
        asked = datasets.read_boolq(tmp_path / "data" / mode).questions
        lead = "How can we learning machine learning:"
        labels = {"False": f"{lead} no", "True": f"{lead} yes"}
    else:
        for name in ("dev", "val"):
            shutil.copytree(shipped / mode / name, tmp_path / "data" / name)
            for file in (tmp_path / "data" / "val").glob("*.csv"):
                file.write_text("".join(file.read_text().splitlines(keepends=True)[:4]))
        asked = datasets.read_mmlu(tmp_path / "data", shots=2).questions
        labels = {letter: f"Answer: {letter}" for letter in "ABCD"}
    choices, values = hf_answers(EMBEDDED_CHECKPOINT, asked, labels)
    folder = run(tmp_path, EMBEDDED_CHECKPOINT, mode=mode, batch=4)
    assert [row[3] for row in rows(folder)] == choices
    torch.testing.assert_close(
        torch.tensor(logged(folder)), torch.tensor(values), rtol=0, atol=1e-4
    )
