# SPDX-License-Identifier: Apache-2.0
"""The flash path of main.py: three demonstrations, or the user's own prompts in padded batches.

The chain checkpoint's next token depends on the last one only, so that every text is known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import checkpoints
from support.checkpoints import EOS_ID, write_chain_checkpoint
from support.processes import clean_this_process, run_here
from support.tokenizers import byte_level_tokenizer

from gptneox.config.settings import EngineSection
from gptneox.devices import select
from gptneox.engine.generate import GenerateEngine
from gptneox.engine.sequence import InvalidParameter, SamplingParams
from gptneox.parallel import TensorParallelGroup
from gptneox.prompts import DEMO_PROMPTS, WARM_UP_PROMPT

FLASH = ("--task", "inference", "--auto_attention", "flash", "--device", "cpu")
# "?" and "s" and ">" end the prompts of the demonstrations: a loop of three, and an end.
CHAINS = ("123456789", "abca", "x12", "?!+?", ">;")


class Result(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not write into it."""
    return write_chain_checkpoint(tmp_path_factory.mktemp("chain") / "checkpoint", *CHAINS)


@pytest.fixture(scope="module")
def engine(chain: Path) -> GenerateEngine:
    return GenerateEngine.from_pretrained(
        chain, EngineSection(max_batch_size=64), select("cpu"), group=TensorParallelGroup()
    )


@pytest.fixture
def cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """main.py on the flash path, in an empty directory and a clean environment."""
    clean_this_process(monkeypatch, tmp_path)
    monkeypatch.setenv("BIND_CPU", "0")

    def run(path: Path, *argv: str) -> Result:
        capsys.readouterr()
        status = run_here(*FLASH, "--model_path", path, *argv)
        return Result(status, *capsys.readouterr())

    return run


def continued(prompt: str, num_new: int) -> str:
    """What follows a prompt by CHAINS."""
    text = prompt
    while len(text) < len(prompt) + num_new:
        chains = [c for c in CHAINS if text[-1] in c[:-1]]
        if not chains:
            break
        text += chains[0][chains[0].index(text[-1]) + 1]
    return text


# -- the demonstrations ----------------------------------------------------------------------------

# Contract 4.1, and one line per row of the batch.
DEMONSTRATION = re.compile(
    r"-{15}warm-up-{15}\n(?P<warm>.*?)\ncost [\d.]+ s\n"
    r"generate (?P<warm_n>\d+) new tokens，\([\d.]+ tokens/s\)\n"
    r"-{15}inference-{15}\n(?P<single>.*?)\ncost [\d.]+ s\n"
    r"generate (?P<single_n>\d+) new tokens，\([\d.]+ tokens/s\)\n"
    r"-{15}batch-{15}\n"
    r"###### batch 0\n(?P<row0>.*?)\n###### batch 1\n(?P<row1>.*?)\ncost [\d.]+ s\n"
    r"batch 0: generate (?P<row0_n>\d+) new tokens，\([\d.]+ tokens/s\)\n"
    r"batch 1: generate (?P<row1_n>\d+) new tokens，\([\d.]+ tokens/s\)\n"
    r"all: generate (?P<all_n>\d+) new tokens，\([\d.]+ tokens/s\)\n",
    re.DOTALL,
)


def test_the_three_demonstrations(cli: Callable[..., Result], chain: Path) -> None:
    """64 tokens each, prompt and answer together, every row with its own count."""
    result = cli(chain, "--repetition_penalty", "1.0")
    assert result.status == 0, result.err
    found = DEMONSTRATION.fullmatch(result.out)
    assert found, result.out
    assert found["warm"] == WARM_UP_PROMPT + ";"
    assert int(found["warm_n"]) == 2  # with end-of-text
    how, ceo = DEMO_PROMPTS
    assert found["single"] == found["row0"] == continued(how, 64)
    assert int(found["single_n"]) == int(found["row0_n"]) == 64
    assert found["row1"] == ceo  # "s" is followed by end-of-text, which is not shown
    assert int(found["row1_n"]) == 1
    assert int(found["all_n"]) == 65


def test_the_demonstrations_avoid_repetition(cli: Callable[..., Result], tmp_path: Path) -> None:
    """A penalty of 1.1 unless another is asked for; the length can be chosen too."""
    config = checkpoints.FAMILY["pythia-14m"] | {"vocab_size": 336, "max_position_embeddings": 256}
    path = tmp_path / "model"
    write_chain_checkpoint(path)  # for its tokenizer
    model = checkpoints.write_checkpoint(path, config, seed=5)
    ids = torch.tensor([byte_level_tokenizer().encode(DEMO_PROMPTS[0]).ids])
    texts = {}
    for penalty in (1.1, 1.0):
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=30,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=EOS_ID,
            pad_token_id=0,
        )
        texts[penalty] = byte_level_tokenizer().decode(output[0].tolist())
    assert texts[1.1] != texts[1.0]
    for options, penalty in ((), 1.1), (("--repetition_penalty", "1.0"), 1.0):
        result = cli(path, "--dtype", "float32", "--max_output_length", "30", *options)
        assert result.status == 0, result.err
        found = DEMONSTRATION.fullmatch(result.out)
        assert found, result.out
        assert found["single"] == texts[penalty]


# -- prompts of one's own --------------------------------------------------------------------------


def answers(out: str) -> list[tuple[str, str, int]]:
    """(question, answer, number of tokens) of each prompt, in order."""
    found = re.findall(
        r"Question\[(\d+)\]: (.*?)\nAnswer\[(\d+)\]: (.*?)\nGenerate\[(\d+)\] token num: "
        r"\((\d+), (\d+)\)\n",
        out,
        re.DOTALL,
    )
    for i, row in enumerate(found):
        assert {row[0], row[2], row[4], row[5]} == {str(i)}
    return [(row[1], row[3], int(row[6])) for row in found]


@pytest.mark.parametrize("batch_size", ["1", "2", "8"])
def test_prompts_in_batches(
    batch_size: str, cli: Callable[..., Result], chain: Path, tmp_path: Path
) -> None:
    (tmp_path / "question.txt").write_text("count: 1", encoding="utf-8")
    result = cli(
        chain,
        *("--input_texts", "1", "question.txt", "a", "a longer prompt, and then x"),
        *("--max_batch_size", batch_size, "--max_output_length", "11"),
        *("--output_file", "deep/er/answers.jsonl"),
    )
    assert result.status == 0, result.err
    assert answers(result.out) == [
        ("1", "23456789", 9),
        ("count: 1", "23456789", 9),
        ("a", "bcabcabcabc", 11),
        ("a longer prompt, and then x", "123456789", 10),
    ]
    lines = (tmp_path / "deep" / "er" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["text"] for record in records] == [row[1] for row in answers(result.out)]
    assert [record["finish_reason"] for record in records] == ["stop", "stop", "length", "stop"]
    assert records[0]["token_ids"][-1] == EOS_ID


def test_same_answers_as_the_paged_path(cli: Callable[..., Result], chain: Path) -> None:
    options = ["--input_texts", "1", "x", "no chain at all", "--max_output_length", "7"]
    flash = cli(chain, *options)
    paged = cli(chain, *options, "--attention", "paged")
    assert flash.status == paged.status == 0
    assert answers(flash.out) == answers(paged.out)
    assert "decode: " in paged.out
    assert "decode: " not in flash.out


def test_ignore_eos_and_stop(cli: Callable[..., Result], chain: Path) -> None:
    prompts = ("--input_texts", "5", "a", "--max_output_length", "9")
    result = cli(chain, *prompts, "--ignore_eos", "--max_batch_size", "2")
    assert [row[2] for row in answers(result.out)] == [9, 9]
    assert answers(result.out)[0][1].startswith("6789")
    result = cli(chain, *prompts, "--stop", "78", "bca", "--max_batch_size", "2")
    assert result.status == 0, result.err
    assert [row[1] for row in answers(result.out)] == ["6", ""]


@pytest.mark.parametrize("attention", ["paged", "flash"])
@pytest.mark.parametrize(
    ("options", "text", "num_tokens"),
    [
        (("--stop", "<|x|>"), "23", 3),
        (("--stop", "3<|x|>4"), "2", 4),
        (("--stop", "x|"), "23", 3),
        (("--stop_token_ids", "313"), "23", 3),
        (("--stop-token-ids", "9,313", "8", "--ignore_eos"), "23", 3),
        (("--stop", "nothing"), "23456789", 10),
    ],
)
def test_stops_at_special_tokens_and_ids(
    attention: str,
    options: tuple[str, ...],
    text: str,
    num_tokens: int,
    cli: Callable[..., Result],
    tmp_path: Path,
) -> None:
    """The chain goes through a special token, as the answers of tuned models do."""
    path = special_chain(tmp_path / "special")
    argv = ("--input_texts", "1", "--output_file", "out.jsonl", "--max_output_length", "30")
    result = cli(path, *argv, *options, "--attention", attention)
    assert result.status == 0, result.err
    assert answers(result.out) == [("1", text, num_tokens)]
    [record] = map(json.loads, (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines())
    assert (record["text"], record["finish_reason"]) == (text, "stop")
    assert len(record["token_ids"]) == num_tokens


def special_chain(path: Path) -> Path:
    """1 2 3 <|x|> 4 … 9 and the end: the last padding row but one is a special token."""
    write_chain_checkpoint(path, "123456789")
    tokenizer = byte_level_tokenizer()
    special = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<|x|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    assert tokenizer.token_to_id("<|x|>") == special == 313
    tensors = load_file(path / "model.safetensors")
    embedding, head = tensors["gpt_neox.embed_in.weight"], tensors["embed_out.weight"]
    three, four = (tokenizer.encode(c).ids[0] for c in "34")
    embedding[three], embedding[special] = head[special], head[four]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_a_stop_id_is_of_the_vocabulary(
    attention: str, cli: Callable[..., Result], chain: Path
) -> None:
    result = cli(chain, "--input_ids", "5", "--stop_token_ids", "336", "--attention", attention)
    assert result.status == 2
    assert "stop_token_ids is 336; an id of the vocabulary (0 to 335)" in result.err


@pytest.mark.parametrize("attention", ["paged", "flash"])
@pytest.mark.parametrize(
    ("rope", "named"),
    [
        (None, ""),
        ({"type": "linear", "factor": 2.0}, ""),
        ({"type": "dynamic", "factor": 2.0}, "40 positions are wanted"),
    ],
)
def test_raised_positions(
    attention: str,
    rope: dict[str, Any] | None,
    named: str,
    cli: Callable[..., Result],
    tmp_path: Path,
) -> None:
    """transformers' tokens beyond config.json's positions, or a refusal."""
    config = checkpoints.FAMILY["pythia-14m"] | {
        "max_position_embeddings": 16,
        "rope_scaling": rope,
    }
    path = tmp_path / "raised"
    model = checkpoints.write_checkpoint(path, config, seed=2, sharpness=3.0)
    prompt = checkpoints.prompts((8,), 304, seed=1)
    ids = torch.tensor(prompt)
    argv = ("--load_tokenizer", "False", "--input_ids", ",".join(map(str, prompt[0])))
    argv += ("--dtype", "float32", "--ignore_eos", "--attention", attention)
    result = cli(path, *argv, "--max_output_length", "32")
    assert result.status == 2
    assert "16 positions" in result.err
    argv += ("--max_position_embeddings", "40")
    result = cli(path, *argv, "--max_output_length", "32")
    if named:
        assert result.status == 2
        assert named in result.err
        assert "rope type 'dynamic'" in result.err
        return
    assert result.status == 0, result.err
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=32,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )
    assert answers(result.out)[0][1] == ",".join(map(str, output[0, 8:].tolist()))


def test_ids_without_a_tokenizer(cli: Callable[..., Result], chain: Path, tmp_path: Path) -> None:
    ids = [byte_level_tokenizer().encode(c).ids[0] for c in "123"]
    path = tmp_path / "bare"
    path.mkdir()
    for name in ("config.json", "model.safetensors"):
        (path / name).symlink_to(chain / name)
    only_ids = ("--input_ids", f"7,{ids[0]}", "--max_output_length", "2")
    assert cli(path, *only_ids).status == 1  # no tokenizer there
    result = cli(path, *only_ids, "--load_tokenizer", "False")
    assert answers(result.out) == [(f"7,{ids[0]}", f"{ids[1]},{ids[2]}", 2)]


def test_a_seed_is_a_text(cli: Callable[..., Result], chain: Path) -> None:
    options = ("--input_texts", "a", "--max_output_length", "12", "--ignore_eos")
    # the chain's logits are far apart: at this temperature they are not
    hot = (*options, "--temperature", "60", "--top_k", "300", "--top_p", "0.99")
    texts = [cli(chain, *hot, "--seed", seed).out for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]
    assert cli(chain, *hot).out == texts[0], "seed 1 where none is given"
    assert cli(chain, *options).out not in texts


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--interactive"], "--interactive is not served by the flash path"),
        (["--stream"], "--stream is not served by the flash path"),
        (["--input_texts", ""], "prompt 0 is empty"),
        (["--input_ids", "1,336"], "336"),
        (["--input_ids", "1", "--max_output_length", "2048"], "2048 positions"),
        (["--tp", "2"], "--tp is 2, but 1 process"),
        (["--device", "abacus"], "abacus"),
        (["--attention", "dense"], "dense"),
    ],
)
def test_what_is_refused(
    argv: list[str], named: str, cli: Callable[..., Result], chain: Path
) -> None:
    result = cli(chain, *argv)
    assert result.status == 2, result.err
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.err
    assert named in errors[0]
    assert "Traceback" not in result.err
    assert result.out == ""


@pytest.mark.parametrize(
    ("given", "missing"),
    [({"RANK": "1"}, "LOCAL_RANK, WORLD_SIZE"), ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK")],
)
def test_half_a_set_of_variables_of_torchrun(
    given: dict[str, str],
    missing: str,
    cli: Callable[..., Result],
    chain: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    result = cli(chain)
    assert result.status == 2
    assert f"without {missing}; start through run_pa.sh or torchrun" in result.err


# -- the engine ------------------------------------------------------------------------------------


def test_requests_are_checked_before_anything_runs(engine: GenerateEngine) -> None:
    for prompts, named in (
        ([[1], []], "at least one token"),
        ([[1], [-1]], r"-1.*0 to 335"),
        ([[336]], r"336.*0 to 335"),
        ([[1], [1] * 2045], r"2045 tokens.* 2048 positions"),
    ):
        with pytest.raises(InvalidParameter, match=named):
            engine.generate(prompts, SamplingParams(max_new_tokens=4))
    [last] = engine.generate([[1] * 2044], SamplingParams(max_new_tokens=4, ignore_eos=True))
    assert len(last.token_ids) == 4


def test_padding_ids_and_the_end_of_text_are_tokens_like_others(engine: GenerateEngine) -> None:
    """The batch is padded with id 0, which is also end-of-text here."""
    first = byte_level_tokenizer().encode("1").ids
    prompts = [[0, 0, *first], [335, *first], first, [0] * 30 + first]
    outputs = engine.generate(prompts, SamplingParams(max_new_tokens=20))
    assert [output.text for output in outputs] == ["23456789"] * 4
    assert [output.finish_reason for output in outputs] == ["stop"] * 4


def test_scored_tokens_are_checked(engine: GenerateEngine) -> None:
    for token_id in (-1, 336):
        with pytest.raises(InvalidParameter, match="token_ids"):
            engine.score_next([[1]], [token_id])


def test_a_tiny_temperature_is_greedy(engine: GenerateEngine) -> None:
    prompts = [byte_level_tokenizer().encode("1").ids]
    [greedy] = engine.generate(prompts, SamplingParams(max_new_tokens=5))
    [other] = engine.generate(prompts, SamplingParams(max_new_tokens=5, temperature=1e-38))
    assert other.token_ids == greedy.token_ids


def test_next_logits(engine: GenerateEngine) -> None:
    """One padded batch, each row as alone."""
    prompts = checkpoints.prompts((3, 1, 20), 336)
    logits = engine.next_logits(prompts)
    assert logits.shape == (3, 336)
    for row, prompt in zip(logits, prompts, strict=True):
        torch.testing.assert_close(row, engine.next_logits([prompt])[0], rtol=0, atol=1e-4)
