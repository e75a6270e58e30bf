# SPDX-License-Identifier: Apache-2.0
"""generation_kwargs of lm-evaluation-harness tasks: what is served, neutral or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints
from transformers import GPTNeoXForCausalLM

from gptneox.config.errors import ConfigError
from gptneox.engine.sequence import MAX_STOP_STRINGS, SamplingParams
from gptneox.evaluation.lm_eval_options import _NEUTRAL, read_options

GREEDY = SamplingParams(max_new_tokens=256)

# Every form that the task files of lm_eval 0.4.13 have, but for their stop strings and lengths.
PUBLISHED: list[tuple[dict[str, Any], SamplingParams | None]] = [
    ({}, GREEDY),
    ({"until": []}, GREEDY),
    ({"do_sample": False}, GREEDY),
    ({"do_sample": False, "temperature": 0.0}, GREEDY),
    ({"temperature": 0}, GREEDY),
    ({"do_sample": False, "temperature": 1}, GREEDY),
    ({"num_beams": 1}, GREEDY),
    ({"num_beams": 1, "do_sample": False, "max_new_tokens": 256, "until": ["\n"]},
     SamplingParams(max_new_tokens=256, stop=("\n",))),
    ({"do_sample": True, "temperature": 0.2, "top_p": 0.95, "max_gen_toks": 1024},
     SamplingParams(max_new_tokens=1024, temperature=0.2, top_p=0.95)),
    ({"do_sample": True, "temperature": 0.8, "max_gen_toks": 32},
     SamplingParams(max_new_tokens=32, temperature=0.8)),
    ({"until": ["Question:", "</s>", "<|im_end|>"], "do_sample": False, "temperature": 0.0},
     SamplingParams(max_new_tokens=256, stop=("Question:", "</s>", "<|im_end|>"))),
    ({"num_beams": 10, "max_gen_toks": 128}, None),
]  # fmt: skip


@pytest.mark.parametrize(("options", "expected"), PUBLISHED)
def test_published_tasks(options: dict[str, Any], expected: SamplingParams | None) -> None:
    if expected is None:
        with pytest.raises(ConfigError, match=r"num_beams: 10 is not served.*--gen_kwargs"):
            read_options(options, 5)
    else:
        assert read_options(options, 5)[0] == expected


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> GPTNeoXForCausalLM:
    return checkpoints.write_checkpoint(
        tmp_path_factory.mktemp("m"), checkpoints.FAMILY["pythia-70m"]
    )


OTHERS = ("n", "best_of", "min_tokens", "presence_penalty", "frequency_penalty", "ignore_eos",
    "skip_special_tokens", "spaces_between_special_tokens", "diversity_penalty",
    "num_beam_groups", "penalty_alpha")  # fmt: skip
NEUTRAL = {name: value for name, value in _NEUTRAL.items() if name not in OTHERS} | {
    "typical_p": 1.0, "min_p": 0.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_p": 0.5,
    "top_k": 3, "length_penalty": 2.0, "early_stopping": True, "use_cache": False,
    "bad_words_ids": None, "pad_token_id": 7,
}  # fmt: skip


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_neutral_value_is_one_to_transformers(name: str, model: GPTNeoXForCausalLM) -> None:
    option = {name: NEUTRAL[name]}
    assert read_options(option, 5)[0] == GREEDY
    ids = torch.tensor([[5, 6, 7]])
    common = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, pad_token_id=0, **common)
    actual = model.generate(ids, **({"pad_token_id": 0} | common | option))
    assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "option",
    [{"num_beams": 2}, {"no_repeat_ngram_size": 3}, {"bad_words_ids": [[5]]}, {"min_length": 9},
     {"ignore_eos": True}, {"eos_token_id": 3}, {"unheard_of": 0}, {"penalty_alpha": 0.6},
     {"do_sample": True, "min_p": 0.1}, {"temperature": 1.0, "typical_p": 0.5}],
)  # fmt: skip
def test_what_would_change_the_text_is_refused(option: dict[str, Any]) -> None:
    *_, name = option
    with pytest.raises(ConfigError, match=f"{name}: .* is not served"):
        read_options(option, 5)


def test_lengths() -> None:
    def length(**options: Any) -> int:
        return read_options(options, 5)[0].max_new_tokens

    assert length(max_gen_toks=7, max_new_tokens=8) == 7
    assert length(max_new_tokens="8", max_tokens=9) == 8
    assert length(max_completion_tokens=3, max_gen_toks=None) == 3
    assert length(max_length=12) == 7  # as `generate` counts
    with pytest.raises(ConfigError, match=r"max_length 5 .* context of 5 tokens; give max_gen"):
        length(max_length=5)


def test_stop_strings() -> None:
    assert read_options({"until": "\n\n"}, 5)[1] == ["\n\n"]
    assert read_options({"until": ["", "a"]}, 5)[1] == ["a"]
    many = [str(i) for i in range(MAX_STOP_STRINGS + 4)]
    params, stop = read_options({"until": many}, 5)
    assert stop == many
    assert params.stop == tuple(many[:MAX_STOP_STRINGS])


def test_sampling() -> None:
    given = {"do_sample": True, "top_k": -1, "top_p": 0.9, "seed": 3, "min_p": 0, "n": 1}
    assert read_options(given, 5)[0] == SamplingParams(
        max_new_tokens=256, temperature=1.0, top_k=-1, top_p=0.9, seed=3
    )


def test_the_module_needs_no_harness() -> None:
    source = Path(read_options.__code__.co_filename).read_text(encoding="utf-8")
    assert "import lm_eval" not in source
