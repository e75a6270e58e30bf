# SPDX-License-Identifier: Apache-2.0
"""The model class `gptneox` of lm-evaluation-harness against its own Hugging Face device.

lm_eval is not among the packages of the tests: `pip install .[eval]` (and accelerate, which the
Hugging Face backend wants), then `pytest -m slow tests/test_lm_eval_model.py`.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import questions

pytestmark = pytest.mark.slow
lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed; pip install .[eval]")
pytest.importorskip("accelerate", reason="lm_eval's Hugging Face backend needs accelerate")

TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager

TOLERANCE = 1e-4  # of a log-probability in fp32
POSITIONS = 192  # some prompts and texts below are longer

MODELS = ("pythia-14m", "redpajama-incite-3b")  # parallel, partly rotary; serial, fully rotary


def json_task(name: str, data: Path, **config: Any) -> dict[str, Any]:
    files = {"validation": str(data)}
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "validation_split": "validation",
        **config,
    }


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tasks over local JSON lines, in the forms of BoolQ, MMLU, WikiText and a generation task."""
    folder = tmp_path_factory.mktemp("tasks")
    questions.write_boolq(folder, 24, longest=90)
    rng = random.Random(3)
    rows = [
        {"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5])}
        for row in questions.choice_rows(rng, 30)
    ]
    texts = [{"page": questions.sentence(rng, 300)} for _ in range(6)]
    for name, content in (("choice", rows), ("text", texts)):
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    options = "\n".join(f"{letter}. {{{{choices[{i}]}}}}" for i, letter in enumerate("ABCD"))
    accuracy = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    made = [
        json_task(
            "boolq_form",
            folder / "dev.jsonl",
            output_type="multiple_choice",
            doc_to_text="{{title}} -- {{passage}}\nQuestion: {{question}}?\nAnswer:",
            doc_to_target="{{answer|int}}",
            doc_to_choice=["no", "yes"],
            metric_list=accuracy,
        ),
        json_task(
            "mmlu_form",
            folder / "choice.jsonl",
            output_type="multiple_choice",
            description="The following are multiple choice questions (with answers).\n\n",
            fewshot_split="validation",
            fewshot_config={"sampler": "first_n"},
            num_fewshot=2,
            doc_to_text="{{question.strip()}}\n" + options + "\nAnswer:",
            doc_to_target="answer",
            doc_to_choice=["A", "B", "C", "D"],
            metric_list=accuracy,
        ),
        json_task(  # several tokens per choice, of different lengths
            "ending_form",
            folder / "choice.jsonl",
            output_type="multiple_choice",
            doc_to_text="{{question}} ",
            doc_to_target="answer",
            doc_to_choice="choices",
            metric_list=accuracy,
        ),
        json_task(
            "rolling_form",
            folder / "text.jsonl",
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="{{page}}",
            metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        ),
        json_task(
            "generate_form",
            folder / "choice.jsonl",
            output_type="generate_until",
            doc_to_text="{{question}}",
            doc_to_target="answer",
            generation_kwargs={"until": ["e", "\n\n"], "max_gen_toks": 12},
            metric_list=[{"metric": "exact_match"}],
        ),
        json_task(
            "neutral_form",
            folder / "choice.jsonl",
            output_type="generate_until",
            doc_to_text="{{question}}",
            doc_to_target="answer",
            generation_kwargs={
                "until": [],
                "max_new_tokens": 9,
                "num_beams": 1,
                "do_sample": False,
                "temperature": 1.0,
                "top_p": 0.5,
                "no_repeat_ngram_size": 0,
            },
            metric_list=[{"metric": "exact_match"}],
        ),
    ]
    for task in made:  # JSON is YAML
        (folder / f"{task['task']}.yaml").write_text(json.dumps(task), encoding="utf-8")
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module", params=MODELS)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tasks: Any
) -> list[dict[str, Any]]:
    """Samples and results of stock lm_eval with `hf`, and with `gptneox`."""
    import gptneox.evaluation.lm_eval_model  # noqa: F401  # registers the class

    path = questions.write_model(
        tmp_path_factory.mktemp(request.param) / "model", request.param, positions=POSITIONS
    )
    common = {"pretrained": str(path), "dtype": "float32"}
    found = []
    for model, more in (("hf", {"softmax_dtype": "float32"}), ("gptneox", {"block_size": 16})):
        found.append(
            lm_eval.simple_evaluate(
                model=model,
                model_args=common | more,
                tasks=[
                    "boolq_form",
                    "mmlu_form",
                    "ending_form",
                    "rolling_form",
                    "generate_form",
                    "neutral_form",
                ],
                task_manager=tasks,
                batch_size=4,
                device="cpu",
                log_samples=True,
                bootstrap_iters=0,
            )
        )
    return found


@pytest.mark.parametrize("form", ["boolq_form", "mmlu_form", "ending_form"])
def test_choices(both: list[dict[str, Any]], form: str, record_property: Any) -> None:
    expected, actual = (result["samples"][form] for result in both)
    assert len(expected) == len(actual) >= 24
    worst = 0.0
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours["doc_id"] == theirs["doc_id"]
        assert ours["acc"] == theirs["acc"]
        pairs = list(zip(ours["filtered_resps"], theirs["filtered_resps"], strict=True))
        worst = max(worst, *(abs(float(a[0]) - float(b[0])) for a, b in pairs))
        assert [str(a[1]) for a, _ in pairs] == [str(b[1]) for _, b in pairs], "greedy or not"
        ours_best, their_best = (
            max(range(len(r)), key=lambda i, r=r: float(r[i][0]))
            for r in (ours["filtered_resps"], theirs["filtered_resps"])
        )
        assert ours_best == their_best
    record_property("largest difference of log p", worst)
    assert worst <= TOLERANCE
    assert both[0]["results"][form]["acc,none"] == both[1]["results"][form]["acc,none"]


def test_rolling(both: list[dict[str, Any]], record_property: Any) -> None:
    expected, actual = (result["samples"]["rolling_form"] for result in both)
    worst = 0.0
    for ours, theirs in zip(actual, expected, strict=True):
        num_tokens = len(questions.make_tokenizer().encode(ours["doc"]["page"]).ids)
        difference = abs(float(ours["resps"][0][0]) - float(theirs["resps"][0][0]))
        worst = max(worst, difference / num_tokens)
    record_property("largest difference of log p per token", worst)
    assert worst <= TOLERANCE
    for metric in ("word_perplexity,none", "bits_per_byte,none"):
        values = [result["results"]["rolling_form"][metric] for result in both]
        assert values[1] == pytest.approx(values[0], rel=1e-5)


@pytest.mark.parametrize("form", ["generate_form", "neutral_form"])
def test_generation(both: list[dict[str, Any]], form: str) -> None:
    expected, actual = (result["samples"][form] for result in both)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours["resps"] == theirs["resps"]


def test_an_empty_context_is_one_answer_of_many(tmp_path: Path) -> None:
    """It is continued as a text that begins: after the token that stands before every text."""
    from lm_eval.api.instance import Instance

    from gptneox.evaluation.lm_eval_model import GPTNeoXLM

    path = questions.write_model(tmp_path / "model", positions=POSITIONS)
    model = GPTNeoXLM(str(path), device="cpu", block_size=16)
    begin = model.tokenizer.decode([model.prefix_token_id])
    texts = ("", begin, "one two")
    options = {"max_gen_toks": 6, "until": []}
    instances = [Instance("generate_until", {}, (text, dict(options)), 0) for text in texts]
    empty, begun, other = model.generate_until(instances, disable_tqdm=True)
    assert empty == begun
    assert other == model.generate_until(instances[2:], disable_tqdm=True)[0]


def test_command_line(tmp_path: Path, tasks: Any) -> None:
    path = questions.write_model(tmp_path / "model", positions=POSITIONS)
    folder = tasks.include_path
    done = subprocess.run(
        [
            *(sys.executable, "-m", "gptneox.evaluation.lm_eval_model"),
            *("--model_args", f"pretrained={path},dtype=float32", "--device", "cpu"),
            *("--tasks", "boolq_form", "--include_path", str(folder), "--limit", "3"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|boolq_form|" in done.stdout
    assert "gptneox" in done.stdout
