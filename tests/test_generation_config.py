# SPDX-License-Identifier: Apache-2.0
"""generation_config.json on both paths against transformers' `generate` over the same directory."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import checkpoints
from support.checkpoints import write_chain_checkpoint
from support.tokenizers import byte_level_tokenizer
from transformers import GPTNeoXForCausalLM

from gptneox.adapter import GPTNeoXForCausalLM as Adapter
from gptneox.config.errors import FileError
from gptneox.config.settings import EngineSection
from gptneox.devices import select
from gptneox.engine.generate import GenerateEngine
from gptneox.engine.generation_config import NO_RULES, GenerationRules, read_generation_config
from gptneox.engine.paged import PagedEngine
from gptneox.engine.sequence import SamplingParams
from gptneox.parallel import TensorParallelGroup
from gptneox.weights.cut import cut_checkpoint

CONFIG = checkpoints.FAMILY["pythia-14m"] | {"torch_dtype": "float32"}
IS_4 = transformers.__version__.startswith("4.")
VOCAB = CONFIG["vocab_size"]
PROMPTS = [[5, 17, 200, 42, 9], [7], [9, 42, 5, 17, 200, 42, 9, 42]]
NUM_NEW = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not write into it."""
    path = tmp_path_factory.mktemp("twin") / "checkpoint"
    checkpoints.write_checkpoint(path, CONFIG, seed=3, sharpness=3.0)
    return path


@pytest.fixture(scope="module")
def greedy(checkpoint: Path) -> list[list[int]]:
    return stock(checkpoint)


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """One whose JSON files a test may write."""
    shutil.copytree(checkpoint, tmp_path / "copy")
    return tmp_path / "copy"


def write(path: Path, **files: Any) -> None:
    """generation={...} and config={...}: what the two files hold, beside what they held."""
    for name, more in files.items():
        file = path / {"generation": "generation_config.json", "config": "config.json"}[name]
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(before | more))


def stock(path: Path, **options: Any) -> list[list[int]]:
    """What transformers makes of the directory, one prompt at a time, by its own class."""
    model = checkpoints.read_with_transformers(path)
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_NEW,
            pad_token_id=0,
            **({"do_sample": False, "repetition_penalty": 1.0} | options),
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def paged(path: Path, **params: Any) -> list[list[int]]:
    section = EngineSection(max_batch_size=2, num_blocks=12, block_size=16)
    engine = PagedEngine.from_pretrained(
        path, section, select("cpu"), dtype="float32", with_tokenizer=False
    )
    asked = SamplingParams(max_new_tokens=NUM_NEW, **params)
    return [output.token_ids for output in engine.generate(PROMPTS, asked)]


def flash(path: Path, **options: Any) -> list[list[int]]:
    """All prompts in one padded batch."""
    engine = GenerateEngine.from_pretrained(
        path,
        EngineSection(max_batch_size=64),
        select("cpu"),
        group=TensorParallelGroup(),
        dtype="float32",
        with_tokenizer=False,
    )
    outputs = engine.generate(PROMPTS, SamplingParams(max_new_tokens=NUM_NEW, **options))
    return [output.token_ids for output in outputs]


# -- what is obeyed --------------------------------------------------------------------------------

# g: the greedy answers. Every entry changes at least one of them.
OBEYED: dict[str, Any] = {
    "eos": lambda g: {"eos_token_id": [VOCAB - 1, g[0][3]]},
    "eos beyond the rows": lambda g: {"eos_token_id": [g[0][2], VOCAB + 1000, -1]},
    "suppressed": lambda g: {"suppress_tokens": [g[0][0], g[1][2], VOCAB + 5]},
    "suppressed at the beginning": lambda g: {"begin_suppress_tokens": [g[0][0], g[0][1]]},
    "bad word": lambda g: {"bad_words_ids": [[g[0][1]], [g[2][0]]]},
    "bad words": lambda g: {"bad_words_ids": [g[0][1:4], [PROMPTS[1][0], g[1][0]]]},
    "eos is no bad word": lambda g: {"eos_token_id": g[0][2], "bad_words_ids": [[g[0][2]], [3]]},
    "no pair twice": lambda g: {"no_repeat_ngram_size": 2},
    "no token twice": lambda g: {"no_repeat_ngram_size": 1},
    "no three twice": lambda g: {"no_repeat_ngram_size": 3, "suppress_tokens": [g[0][4]]},
    "min_new_tokens": lambda g: {"eos_token_id": [g[0][0], g[2][1]], "min_new_tokens": 5},
    "min_length": lambda g: {"eos_token_id": [g[0][0], g[2][1]], "min_length": 9},
    "forced end": lambda g: {"eos_token_id": VOCAB - 1, "forced_eos_token_id": VOCAB - 1},
    "forced ends": lambda g: {"eos_token_id": VOCAB - 1, "forced_eos_token_id": [40, 30]},
    "forced begin": lambda g: {"forced_bos_token_id": 33, "begin_suppress_tokens": [g[0][0]]},
    "all": lambda g: {
        "eos_token_id": g[0][2],
        "min_new_tokens": 4,
        "suppress_tokens": [g[1][0]],
        "bad_words_ids": [[g[2][0], g[2][1]]],
        "no_repeat_ngram_size": 2,
        "forced_eos_token_id": 8,
    },
}


@pytest.mark.parametrize("case", OBEYED)
def test_both_paths_obey_what_transformers_obeys(
    case: str, copy: Path, greedy: list[list[int]]
) -> None:
    if IS_4 and case == "bad words":
        pytest.skip("transformers 4 overlooks a sequence that begins with the whole prompt")
    write(copy, generation={"eos_token_id": 0} | OBEYED[case](greedy))
    expected = stock(copy)
    assert expected != greedy, "the case shows nothing"
    assert paged(copy) == expected
    assert flash(copy) == expected


def test_old_keys_of_config_json_count_without_the_other_file(
    copy: Path, greedy: list[list[int]]
) -> None:
    write(copy, config={"suppress_tokens": [greedy[0][0]], "no_repeat_ngram_size": 1})
    expected = stock(copy)
    assert expected != greedy
    assert paged(copy) == flash(copy) == expected
    write(copy, generation={"eos_token_id": 0})
    assert paged(copy) == flash(copy) == stock(copy) == greedy


def test_without_end_of_text_no_word_is_spared(copy: Path, greedy: list[list[int]]) -> None:
    """`--ignore_eos`: as transformers without an end-of-text id."""
    end = greedy[0][2]
    write(
        copy, generation={"eos_token_id": end, "bad_words_ids": [[end]], "min_new_tokens": NUM_NEW}
    )
    expected = stock(copy, eos_token_id=-1)
    assert expected[0] != greedy[0]
    assert paged(copy, ignore_eos=True) == flash(copy, ignore_eos=True) == expected


def test_the_penalty_comes_before_the_rules(copy: Path, greedy: list[list[int]]) -> None:
    write(copy, generation={"eos_token_id": 0, "suppress_tokens": [greedy[0][0], greedy[1][0]]})
    expected = stock(copy, repetition_penalty=1.8)
    assert paged(copy, repetition_penalty=1.8) == expected
    assert flash(copy, repetition_penalty=1.8) == expected


def test_sampling_keeps_to_the_rules(copy: Path) -> None:
    allowed = set(range(10, 30))
    suppressed = sorted(set(range(VOCAB)) - allowed)
    write(copy, generation={"eos_token_id": 0, "suppress_tokens": suppressed})
    for row in paged(copy, temperature=50.0, top_k=100, seed=1):
        assert set(row) <= allowed
        assert len(set(row)) > 3


# -- where a text ends -----------------------------------------------------------------------------

ENDS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "config.json, a list": ({"eos_token_id": [300, "third"]}, None),
    "config.json, one": ({"eos_token_id": "third"}, None),
    "config.json, null": ({"eos_token_id": None}, None),
    "both, the other one counts": ({"eos_token_id": "third"}, {"eos_token_id": 0}),
    "generation_config.json, a list": ({"eos_token_id": 0}, {"eos_token_id": [0, "third"]}),
    "generation_config.json, silent": ({"eos_token_id": "third"}, {"bos_token_id": 0}),
    "generation_config.json, null": ({"eos_token_id": "third"}, {"eos_token_id": None}),
    "generation_config.json, -1": ({"eos_token_id": "third"}, {"eos_token_id": -1}),
}


def named(value: Any, third: int) -> Any:
    return json.loads(json.dumps(value).replace('"third"', str(third)))


@pytest.mark.parametrize("case", ENDS)
def test_end_of_text_is_that_of_transformers(
    case: str, copy: Path, greedy: list[list[int]]
) -> None:
    config, generation = named(ENDS[case], greedy[0][2])
    write(copy, config=config)
    if generation:
        write(copy, generation=generation)
    assert paged(copy) == flash(copy) == stock(copy)


@pytest.mark.parametrize("stated", [True, False])
def test_the_tokenizer_is_asked_last(stated: bool, tmp_path: Path) -> None:
    """Only where generation_config.json is absent and config.json has no such key."""
    path = write_chain_checkpoint(tmp_path / "chain", "123456")
    end = byte_level_tokenizer().encode("4").ids[0]
    (path / "tokenizer_config.json").write_text('{"eos_token": "4"}')
    config = json.loads((path / "config.json").read_text())
    config.pop("eos_token_id")
    (path / "config.json").write_text(json.dumps(config))
    if stated:
        write(path, generation={"bos_token_id": 0})
    section, backend = EngineSection(num_blocks=4), select("cpu")
    engines = (
        PagedEngine.from_pretrained(path, section, backend),
        GenerateEngine.from_pretrained(
            path, EngineSection(max_batch_size=64), backend, group=TensorParallelGroup()
        ),
    )
    for engine in engines:
        assert engine.eos_token_ids == (() if stated else (end,))


def test_end_of_text_of_a_cut_part(copy: Path, tmp_path: Path) -> None:
    write(copy, config={"eos_token_id": [7, 9]})
    cut_checkpoint(copy, tmp_path / "out", 2)
    for part in sorted((tmp_path / "out").rglob("config.json")):
        assert read_generation_config(part.parent, VOCAB).eos_token_ids == (7, 9)
    write(copy, generation={"eos_token_id": [8], "suppress_tokens": [3]})
    cut_checkpoint(copy, tmp_path / "other", 2)
    parts = sorted((tmp_path / "other").rglob("config.json"))
    assert len(parts) == 2
    for part in parts:
        rules = read_generation_config(part.parent, VOCAB)
        assert rules == GenerationRules(eos_token_ids=(8,), suppress_tokens=(3,))


def test_stop_strings_of_the_file_and_of_the_flags(tmp_path: Path) -> None:
    path = write_chain_checkpoint(tmp_path / "chain", "123456789")
    write(path, generation={"eos_token_id": 0, "stop_strings": ["78"]})
    first = byte_level_tokenizer().encode("1").ids
    section, backend = EngineSection(num_blocks=4), select("cpu")
    engine = PagedEngine.from_pretrained(path, section, backend)
    flash_engine = GenerateEngine.from_pretrained(
        path, EngineSection(max_batch_size=64), backend, group=TensorParallelGroup()
    )
    for stop, text in ((), "23456"), (("45",), "23"):
        [one] = engine.generate([first], SamplingParams(max_new_tokens=9, stop=stop))
        [other] = flash_engine.generate([first], SamplingParams(max_new_tokens=9, stop=stop))
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason) == (text, "stop")
        assert one.token_ids == other.token_ids


def test_max_time_ends_a_text(copy: Path, greedy: list[list[int]]) -> None:
    write(copy, generation={"eos_token_id": 0, "max_time": 1e-9})
    assert paged(copy) == flash(copy) == [row[:1] for row in greedy] == stock(copy)
    write(copy, generation={"max_time": 1e6})
    assert paged(copy) == flash(copy) == greedy


def test_max_time_starts_with_the_first_step_of_a_request(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that waits for others loses nothing of its time."""
    write(copy, generation={"eos_token_id": 0, "max_time": 15.5})
    now = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    lengths = [len(row) for row in paged(copy)]
    assert all(1 < length < NUM_NEW for length in lengths), lengths


# -- what is not ----------------------------------------------------------------------------------

UNSERVED: dict[str, tuple[dict[str, Any], str]] = {
    "sampling": (
        {"do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.9},
        "not used: do_sample True, temperature 0.7, top_k 50, top_p 0.9; the flags decide",
    ),
    "sampling is off": ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, ""),
    "penalty": ({"repetition_penalty": 1.8}, "not used: repetition_penalty 1.8"),
    "beams": ({"num_beams": 4, "length_penalty": 0.5}, "not served and left out: num_beams 4;"),
    "rows": ({"num_return_sequences": 2}, "left out: num_return_sequences 2;"),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, "left out: penalty_alpha 0.6;"),
    "bias": ({"sequence_bias": [[[5], 9.0]]}, "left out: sequence_bias [[[5], 9.0]];"),
    "neutral": ({"num_beams": 1, "num_return_sequences": 1, "guidance_scale": None}, ""),
    "how it is returned": ({"return_dict_in_generate": True, "output_scores": True}, ""),
    "how it is computed": ({"use_cache": False, "cache_implementation": "static"}, ""),
    "no such cache": ({"cache_implementation": "bogus"}, ""),
    "drafts": ({"prompt_lookup_num_tokens": 3}, ""),
    "lengths": ({"max_length": 7, "max_new_tokens": 3}, ""),
    "lengths of none": ({"max_new_tokens": 0}, ""),
    "unknown": ({"foo": 1}, ""),
    "padding": ({"pad_token_id": None, "bos_token_id": 10**6}, ""),
}


@pytest.mark.parametrize("case", UNSERVED)
def test_what_is_not_obeyed_is_said_once(
    case: str, copy: Path, greedy: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    content, notice = UNSERVED[case]
    write(copy, generation={"eos_token_id": 0} | content)
    for answer in (paged, flash):
        caplog.clear()
        assert answer(copy) == greedy
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == bool(notice)
        assert notice in "".join(said)


def test_a_file_without_end_of_text_is_pointed_out(copy: Path) -> None:
    write(copy, generation={"bos_token_id": 0}, config={"eos_token_id": 5})
    [notice] = read_generation_config(copy, VOCAB).notices
    assert "generation_config.json names no eos_token_id" in notice
    write(copy, generation={"eos_token_id": 5})
    assert read_generation_config(copy, VOCAB).notices == ()


BROKEN = [
    ("", "is empty"),
    ("[]", "a JSON object is expected"),
    ('{"eos_token_id": "0"}', "eos_token_id is '0'"),
    ('{"eos_token_id": 0.0}', "eos_token_id is 0.0"),
    ('{"eos_token_id": [[1, 2]]}', "eos_token_id"),
    ('{"suppress_tokens": 3}', "suppress_tokens is 3"),
    ('{"suppress_tokens": [true]}', "suppress_tokens"),
    ('{"begin_suppress_tokens": {"a": 1}}', "begin_suppress_tokens"),
    ('{"bad_words_ids": [3]}', "bad_words_ids"),
    ('{"bad_words_ids": [[]]}', "bad_words_ids"),
    ('{"bad_words_ids": [[3, 304]]}', "bad_words_ids.*from 0 to 303"),
    ('{"no_repeat_ngram_size": -1}', "no_repeat_ngram_size is -1"),
    ('{"min_length": 2.5}', "min_length is 2.5"),
    ('{"min_new_tokens": "4"}', "min_new_tokens is '4'"),
    ('{"forced_eos_token_id": 304}', "forced_eos_token_id is 304.*0 to 303"),
    ('{"forced_bos_token_id": "x"}', "forced_bos_token_id"),
    ('{"max_time": 0}', "max_time is 0"),
    ('{"max_time": NaN}', "max_time"),
    ('{"stop_strings": [""]}', "stop_strings"),
    ('{"stop_strings": 3}', "stop_strings"),
]


@pytest.mark.parametrize(("content", "named"), BROKEN, ids=lambda value: value[:30])
def test_broken_files_are_named(content: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(FileError, match=rf"generation_config\.json.*{named}"):
        read_generation_config(tmp_path, VOCAB)


def test_stop_strings_need_a_tokenizer(
    copy: Path, greedy: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    write(copy, generation={"eos_token_id": 0, "stop_strings": ["a"]})
    for answer in (paged, flash):
        caplog.clear()
        assert answer(copy) == greedy
        assert "stop_strings ['a'] of the checkpoint: not obeyed" in caplog.text


FOREIGN = [
    {"hidden_dropout": "x"},
    {"initializer_range": None},
    {"bos_token_id": "0"},
    {"id2label": 3},
    {"num_labels": "x"},
    {"is_decoder": 1},
    {"use_cache": "no"},
]


@pytest.mark.parametrize("keys", FOREIGN, ids=str)
def test_faults_of_keys_that_no_run_needs(
    keys: dict[str, Any], copy: Path, greedy: list[list[int]]
) -> None:
    """Neither path stumbles over them; transformers does, and the adapter says over what."""
    write(copy, config=keys)
    assert paged(copy) == flash(copy) == greedy
    if IS_4:  # it takes them as they are
        return
    with pytest.raises(FileError, match=r"config\.json: transformers refuses it"):
        Adapter.from_pretrained(str(copy), device_map="cpu")


@pytest.mark.parametrize("content", ["[]", "{", '{"num_return_sequences": 2}'])
def test_the_adapter_names_a_file_that_it_cannot_take(content: str, copy: Path) -> None:
    """Users of AutoModelForCausalLM get all of the file, so all of it has to be right."""
    (copy / "generation_config.json").write_text(content)
    with pytest.raises(FileError, match=r"generation_config\.json"):
        Adapter.from_pretrained(str(copy), device_map="cpu")


def test_the_adapter_reads_config_json_without_the_file(copy: Path) -> None:
    write(copy, config={"suppress_tokens": [3], "eos_token_id": [1, 2]})
    model = Adapter.from_pretrained(str(copy), device_map="cpu")
    theirs = GPTNeoXForCausalLM.from_pretrained(copy)
    assert model.generation_config.to_dict() == theirs.generation_config.to_dict()


def test_no_rules_ask_for_nothing() -> None:
    assert not NO_RULES.restricts
    assert NO_RULES.restrict([1, 2, 3], 2, 4, (3,)) == ((), set())
