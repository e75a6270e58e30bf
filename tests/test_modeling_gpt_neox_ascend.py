# SPDX-License-Identifier: Apache-2.0
"""modeling_gpt_neox_ascend.py behind AutoModelForCausalLM, against transformers' own class.

fp32, so scores agree within 2e-5 of the largest one, and what is chosen by them is equal.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import checkpoints, ranks
from support.checkpoints import write_chain_checkpoint
from support.processes import REPO
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import candidate_generator
from transformers.generation.streamers import BaseStreamer

from gptneox.config.settings import EngineSection
from gptneox.devices import select
from gptneox.engine.generate import GenerateEngine
from gptneox.engine.sequence import SamplingParams
from gptneox.parallel import TensorParallelGroup
from gptneox.weights.cut import AUTO_MAP, cut_checkpoint

LIMIT = 2e-5  # of the largest value
CONFIG = checkpoints.FAMILY["pythia-14m"] | {"eos_token_id": 303}
VOCAB = CONFIG["vocab_size"]
LENGTHS = (9, 1, 40, 17, 3, 33, 26, 12)
MODELING = "modeling_gpt_neox_ascend.py"
IS_4 = transformers.__version__.startswith("4.")
REMEMBERED = pytest.mark.skipif(
    IS_4,
    reason="transformers 4 goes on using a checkpoint's code in a process that once trusted it",
)


@pytest.fixture(scope="module", autouse=True)
def _own_module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies remote code into a folder that all its users share; not ours."""
    folder = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.setattr(sys, "path", list(sys.path))
        yield
        for name in [n for n in sys.modules if n.startswith("transformers_modules")]:
            del sys.modules[name]


def add_remote_code(path: Path) -> Path:
    """As the README says it for a whole checkpoint: one file, one key."""
    shutil.copy(REPO / MODELING, path / MODELING)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
    return path


def load(path: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        path, trust_remote_code=True, dtype=torch.float32, **options
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint with remote code; do not write into it."""
    path = tmp_path_factory.mktemp("remote") / "model"
    checkpoints.write_checkpoint(path, CONFIG, sharpness=1.4)
    return add_remote_code(path)


@pytest.fixture(scope="module")
def ours(checkpoint: Path) -> PreTrainedModel:
    return load(checkpoint)


@pytest.fixture(scope="module")
def stock(checkpoint: Path) -> GPTNeoXForCausalLM:
    return checkpoints.read_with_transformers(checkpoint)


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
    return checkpoints.prompts(LENGTHS, VOCAB - 1, seed=4)


def padded(rows: list[list[int]], side: str = "left") -> dict[str, Tensor]:
    longest = max(map(len, rows))
    inputs: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": []}
    for row in rows:
        pad = [0] * (longest - len(row))
        left = side == "left"
        inputs["input_ids"].append([*pad, *row] if left else [*row, *pad])
        ones = [1] * len(row)
        inputs["attention_mask"].append([*pad, *ones] if left else [*ones, *pad])
    return {name: torch.tensor(value) for name, value in inputs.items()}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(actual), finite)
    limit = LIMIT * expected[finite].abs().max().item()
    torch.testing.assert_close(actual[finite], expected[finite], rtol=0, atol=limit)


# -- which class ---------------------------------------------------------------------------------


def test_the_flag_loads_our_class(ours: PreTrainedModel, checkpoint: Path) -> None:
    assert type(ours).__module__.startswith("transformers_modules.")
    assert type(ours).__module__.endswith(".modeling_gpt_neox_ascend")
    assert type(ours).__name__ == "GPTNeoXForCausalLM"
    assert not ours.training
    config = AutoConfig.from_pretrained(checkpoint)
    again = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, config=config)
    assert type(again).__module__ == type(ours).__module__


@REMEMBERED
def test_without_the_flag_it_is_the_stock_class(checkpoint: Path) -> None:
    """The documented trap: it works, and none of our code runs."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert type(model) is GPTNeoXForCausalLM


@REMEMBERED
def test_auto_map_outside_its_place_is_ignored(checkpoint: Path, tmp_path: Path) -> None:
    """Why the key must be inside "auto_map": elsewhere transformers does not look."""
    path = tmp_path / "model"
    shutil.copytree(checkpoint, path)
    config = json.loads((path / "config.json").read_text())
    del config["auto_map"]
    (path / "config.json").write_text(json.dumps(config | AUTO_MAP))
    assert type(load(path)) is GPTNeoXForCausalLM


@pytest.mark.parametrize("dtype", ["float32", "float16", torch.bfloat16])
def test_dtype(dtype: Any, checkpoint: Path) -> None:
    for keyword in ("dtype", "torch_dtype"):
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, trust_remote_code=True, **{keyword: dtype}
        )
        expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        assert model(torch.tensor([[1, 2]])).logits.dtype == expected


def test_hub_options_are_accepted_and_others_refused(checkpoint: Path) -> None:
    load(checkpoint, low_cpu_mem_usage=True, revision="main", use_safetensors=True)
    load(checkpoint, device_map="auto", attn_implementation="sdpa", local_files_only=True)
    with pytest.raises(ValueError, match="does not take load_in_8bit, quantisation"):
        load(checkpoint, quantisation="int3", load_in_8bit=True)
    with pytest.raises(RuntimeError, match="'abacus'"):
        load(checkpoint, device_map="abacus")


def test_without_the_package_the_message_says_what_to_do(checkpoint: Path, tmp_path: Path) -> None:
    """In a process of its own in which `gptneox` cannot be imported."""
    code = (
        "import sys; sys.modules['gptneox'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code, checkpoint],
        cwd=tmp_path,
        env=environment | {"HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: this checkpoint runs through the GPT-NeoX toolkit")
    assert "`pip install .`" in last
    assert "PYTHONPATH" in last
    assert "pip install gptneox" not in done.stderr, "nobody is sent to a stranger's package"


def auto_load(group: TensorParallelGroup, path: Path, prompt: list[int]) -> tuple[str, Tensor, Any]:
    """What AutoModelForCausalLM makes of this rank's folder."""
    model = AutoModelForCausalLM.from_pretrained(
        path / str(group.rank), trust_remote_code=True, dtype=torch.float32
    )
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    new = model.generate(ids, attention_mask=mask, max_new_tokens=8, num_beams=2, pad_token_id=0)
    return type(model).__module__, model(ids).logits, new.tolist()


def test_every_rank_loads_its_own_folder(
    checkpoint: Path, stock: GPTNeoXForCausalLM, rows: list[list[int]], tmp_path: Path
) -> None:
    """As users of the original do under torchrun: `from_pretrained(part_model/RANK)`."""
    cut_checkpoint(checkpoint, tmp_path / "part_model", 2)
    ids = torch.tensor([rows[2]])
    expected = stock.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, num_beams=2, pad_token_id=0
    )
    with ranks.open_teams() as teams:
        results = teams(2).run(auto_load, tmp_path / "part_model", rows[2])
    for module, logits, new_ids in results:
        assert module.startswith("transformers_modules.")
        assert_close(logits, stock(ids).logits.detach())
        assert new_ids == expected.tolist()


# -- generate ------------------------------------------------------------------------------------


class Stop(StoppingCriteria):
    """Ends a row at its seventh new token, or where it takes an even one after the fourth."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        num_new = input_ids.shape[1] - max(LENGTHS)
        even = input_ids[:, -1] % 2 == 0
        return even & (num_new > 4) | torch.full_like(even, num_new >= 7)


SAMPLING = {"do_sample": True, "temperature": 0.9, "top_k": 50, "top_p": 0.95}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": SAMPLING,
    "sampling, several rows each": SAMPLING | {"num_return_sequences": 3},
    "beam search": {"num_beams": 4},
    "beam search, several rows each": {"num_beams": 4, "num_return_sequences": 3},
    "beam search, early stopping": {"num_beams": 3, "early_stopping": True, "length_penalty": 0.5},
    "beam sampling": SAMPLING | {"num_beams": 3},
    "repetition penalty": {"repetition_penalty": 1.5},
    "no repeated pairs": {"no_repeat_ngram_size": 2, "num_beams": 2},
    "at least twelve": {"min_new_tokens": 12, "eos_token_id": list(range(100))},
    "end of text": {"eos_token_id": list(range(150))},
    "banned": {"bad_words_ids": [[i] for i in range(1, VOCAB, 3)]},
    "stopping criteria": {"stopping_criteria": StoppingCriteriaList([Stop()])},
    "guidance": {"guidance_scale": 1.5},
    "no cache": {"use_cache": False},
    "no cache, beam search": {"use_cache": False, "num_beams": 3},
}


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Any:
    torch.manual_seed(11)
    defaults = {"max_new_tokens": 20, "pad_token_id": 0, "do_sample": False}
    return model.generate(
        **inputs, **(defaults | options), output_scores=True, return_dict_in_generate=True
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_generate_equals_the_stock_class(
    name: str, ours: PreTrainedModel, stock: GPTNeoXForCausalLM, rows: list[list[int]]
) -> None:
    """A left-padded batch; tokens, and the scores they were chosen by."""
    inputs = padded(rows[:3])
    expected = generate(stock, inputs, **OPTIONS[name])
    actual = generate(ours, inputs, **OPTIONS[name])
    assert actual.sequences.tolist() == expected.sequences.tolist()
    assert len(actual.scores) == len(expected.scores) > 1
    for ours_now, stock_now in zip(actual.scores, expected.scores, strict=True):
        assert_close(ours_now, stock_now)
    if "num_beams" in OPTIONS[name]:
        assert_close(actual.sequences_scores, expected.sequences_scores)


@pytest.fixture
def _kept_settings(ours: PreTrainedModel, stock: GPTNeoXForCausalLM) -> Iterator[None]:
    """transformers 4.57 leaves the eos_token_id of a call in the model that assisted."""
    kept = [copy.deepcopy(model.generation_config) for model in (ours, stock)]
    yield
    ours.generation_config, stock.generation_config = kept


@pytest.mark.parametrize(
    "options",
    [{}, {"repetition_penalty": 1.3}, SAMPLING, {"eos_token_id": list(range(0, VOCAB, 5))}],
    ids=["greedy", "repetition penalty", "sampling", "end of text"],
)
@pytest.mark.parametrize("helper", ["prompt", "assistant", "ours as assistant"])
@pytest.mark.usefixtures("_kept_settings")
def test_assisted_generation(
    helper: str,
    options: dict[str, Any],
    ours: PreTrainedModel,
    stock: GPTNeoXForCausalLM,
    rows: list[list[int]],
) -> None:
    """Drafts are checked several at a time, and the cache forgets the wrong ones."""
    inputs = padded([rows[5] + rows[5][:20]])
    if hasattr(candidate_generator, "_crop_past_key_values"):  # transformers before 4.57
        if helper != "ours as assistant":
            with pytest.raises(ValueError, match=r"transformers>=4\.57"):
                generate(ours, inputs, prompt_lookup_num_tokens=4)
        return
    if helper == "prompt":
        options = options | {"prompt_lookup_num_tokens": 4}
    expected = generate(stock, inputs, **options, **assistant(helper, stock, stock))
    actual = generate(ours, inputs, **options, **assistant(helper, ours, stock))
    assert actual.sequences.tolist() == expected.sequences.tolist()
    assert actual.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
    for ours_now, stock_now in zip(actual.scores, expected.scores, strict=True):
        assert_close(ours_now, stock_now)


def assistant(helper: str, ours: PreTrainedModel, stock: PreTrainedModel) -> dict[str, Any]:
    if helper == "prompt":
        return {}
    return {"assistant_model": stock if helper == "assistant" else ours}


@pytest.mark.skipif(IS_4, reason="transformers 4 fails itself on ids that its tokenizer lacks")
def test_stop_strings(tmp_path: Path) -> None:
    """`generate` hands the tokenizer on to the model's forward, which has no use for it."""
    path = add_remote_code(write_chain_checkpoint(tmp_path / "chain", "123456789"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    inputs = tokenizer("1", return_tensors="pt", return_token_type_ids=False)
    for beams in (1, 2):
        stops = {"stop_strings": ["34", "56"], "tokenizer": tokenizer, "num_beams": beams}
        texts = [
            tokenizer.decode(model.generate(**inputs, **stops, max_new_tokens=8)[0])
            for model in (load(path), GPTNeoXForCausalLM.from_pretrained(path))
        ]
        assert texts[0] == texts[1]
        assert texts[0].startswith("1234")
    assert not texts[0].endswith("9")


class Collector(BaseStreamer):
    """What a streamer is given."""

    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_streamer(ours: PreTrainedModel, rows: list[list[int]]) -> None:
    streamer = Collector()
    output = generate(ours, padded(rows[:1]), streamer=streamer)
    assert streamer.ended
    prompt, *pieces = streamer.pieces
    assert [len(piece) for piece in pieces] == [1] * len(pieces)
    assert [prompt + [piece[0] for piece in pieces]] == output.sequences.tolist()


def test_padded_batch_equals_each_row_alone(
    ours: PreTrainedModel, stock: GPTNeoXForCausalLM, rows: list[list[int]]
) -> None:
    together = generate(ours, padded(rows)).sequences[:, max(LENGTHS) :]
    for row, answer in zip(rows, together.tolist(), strict=True):
        for model in (ours, stock):
            alone = generate(model, padded([row])).sequences[0, len(row) :].tolist()
            assert answer[: len(alone)] == alone
            assert set(answer[len(alone) :]) <= {0}


def test_a_conversation_goes_on_with_its_cache(
    ours: PreTrainedModel, stock: GPTNeoXForCausalLM, rows: list[list[int]]
) -> None:
    first = generate(ours, padded(rows[:3]))
    more = torch.tensor([[5, 6], [7, 8], [9, 10]])
    mask = torch.cat([padded(rows[:3])["attention_mask"], torch.ones(3, 22, dtype=torch.int64)], 1)
    inputs = {"input_ids": torch.cat([first.sequences, more], 1), "attention_mask": mask}
    assert first.sequences.shape[1] == max(LENGTHS[:3]) + 20
    expected = generate(stock, inputs)
    actual = generate(ours, inputs, past_key_values=first.past_key_values)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    assert_close(actual.scores[0], expected.scores[0])


# -- forward -------------------------------------------------------------------------------------


@torch.inference_mode()
def test_forward_with_padding_on_either_side(
    ours: PreTrainedModel, stock: GPTNeoXForCausalLM, rows: list[list[int]]
) -> None:
    """Logits of real tokens are those of the row alone; padding is only finite."""
    for side in ("left", "right"):
        inputs = padded(rows, side)
        logits = ours(**inputs).logits
        assert torch.isfinite(logits).all()
        for row, mask, actual in zip(rows, inputs["attention_mask"].bool(), logits, strict=True):
            assert_close(actual[mask], stock(torch.tensor([row])).logits[0])


@torch.inference_mode()
def test_forward_step_by_step(
    ours: PreTrainedModel, stock: GPTNeoXForCausalLM, rows: list[list[int]]
) -> None:
    """Prefill, several tokens, one token: the cache is asked to hold 16, 20, then 40 positions."""
    ids = torch.tensor([rows[2], rows[2][::-1]])
    cache, logits = None, []
    for part in ids.split([16, 4, 1, 1, 18], dim=1):
        output = ours(part, past_key_values=cache)
        cache = output.past_key_values
        logits.append(output.logits)
    assert cache.get_seq_length() == 40
    assert_close(torch.cat(logits, 1), stock(ids).logits)


@torch.inference_mode()
def test_cache_operations(ours: PreTrainedModel, rows: list[list[int]]) -> None:
    ids = torch.tensor([rows[2], rows[2][::-1]])
    expected = ours(ids).logits
    cache = ours(ids[:, :30]).past_key_values
    cache.crop(-10)
    assert_close(ours(ids[:, 20:30], past_key_values=cache).logits, expected[:, 20:30])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert_close(ours(ids[[1, 0], 30:], past_key_values=cache).logits, expected[[1, 0], 30:])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_close(ours(ids[:1], past_key_values=cache).logits, expected[:1])
    for kept in (20, 35):  # the form of transformers 4: how many stay
        cache.crop(kept)
        assert cache.get_seq_length() == 20
    assert_close(ours(ids[:1, 20:], past_key_values=cache).logits, expected[:1, 20:])


@torch.inference_mode()
def test_logits_to_keep(ours: PreTrainedModel, rows: list[list[int]]) -> None:
    ids = torch.tensor([rows[2]])
    expected = ours(ids).logits
    chosen = torch.tensor([0, 5, 39])
    for keep, part in ((3, expected[:, -3:]), (chosen, expected[:, chosen])):
        kept = ours(ids, logits_to_keep=keep).logits
        # Fewer rows may be summed in another order.
        torch.testing.assert_close(kept, part, rtol=0, atol=2e-6 * expected.abs().max().item())


@torch.inference_mode()
def test_positions_that_the_caller_chose(
    ours: PreTrainedModel, stock: GPTNeoXForCausalLM, rows: list[list[int]]
) -> None:
    ids = torch.tensor([rows[2]])
    positions = torch.arange(40)[None] * 3
    expected = stock(ids, position_ids=positions).logits
    assert_close(ours(ids, position_ids=positions).logits, expected)
    assert (expected - stock(ids).logits).abs().max() > 1e-2


@torch.inference_mode()
def test_loss(ours: PreTrainedModel, stock: GPTNeoXForCausalLM, rows: list[list[int]]) -> None:
    inputs = padded(rows[:4], "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    expected = stock(**inputs, labels=labels).loss
    torch.testing.assert_close(ours(**inputs, labels=labels).loss, expected, rtol=LIMIT, atol=0)
    assert ours(**inputs).loss is None


def test_results_are_ordinary_tensors(ours: PreTrainedModel) -> None:
    """Not inference tensors: a caller may change them in place, as logits processors do."""
    logits = ours(torch.tensor([[1, 2, 3]])).logits
    logits[:, -1] += 1
    assert not logits.requires_grad


# -- what is refused -----------------------------------------------------------------------------


def test_unknown_arguments_are_refused(ours: PreTrainedModel) -> None:
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="does not take output_attentions, output_hidden_states"):
        ours(ids, output_hidden_states=True, output_attentions=True)
    with pytest.raises(ValueError, match="does not take inputs_embeds"):
        ours(inputs_embeds=torch.ones(1, 3, 128))
    ours(ids, output_hidden_states=False, output_attentions=None)
    with pytest.raises(ValueError, match="return_dict not False"):
        ours(ids, return_dict=False)
    with pytest.raises(ValueError, match=r"input_ids \[B, S\]"):
        ours(ids[0])
    with pytest.raises(ValueError, match=r"attention_mask has shape \[1, 2\]; \[1, 3\]"):
        ours(ids, attention_mask=torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="nonsense"):
        generate(ours, padded([[1, 2]]), nonsense=1)


def test_another_cache_is_refused(ours: PreTrainedModel, stock: GPTNeoXForCausalLM) -> None:
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache"):
        generate(ours, padded([[1, 2]]), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache"):
        ours(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="cache_implementation 'static' is not served"):
        generate(ours, padded([[1, 2]]), cache_implementation="static")
    cache = ours(ids).past_key_values
    with pytest.raises(ValueError, match="the cache holds 1 rows, the input has 2"):
        ours(torch.tensor([[1], [2]]), past_key_values=cache)


def test_more_positions_than_the_model_has(ours: PreTrainedModel) -> None:
    limit = CONFIG["max_position_embeddings"]
    full = torch.ones(1, limit, dtype=torch.int64)
    cache = ours(full).past_key_values
    with pytest.raises(ValueError, match=f"{limit + 1} positions are needed, .* has {limit}"):
        ours(full[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match=f"{limit + 5} positions are needed"):
        ours(torch.ones(1, limit + 5, dtype=torch.int64))


def test_saving_is_refused(ours: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="copy the checkpoint"):
        ours.save_pretrained(tmp_path / "saved")


# -- paged = flash = Hugging Face ----------------------------------------------------------------

FAMILY = {
    "parallel residual": "gpt-neox-20b",
    "serial residual": "redpajama-incite-3b",
    "tied, odd vocabulary": "japanese-large-lm-3.6b",
    "22 heads": "japanese-gpt-neox-3.6b",
    "no attention bias": "no-attention-bias",
    "polyglot": "polyglot-ko-5.8b",
}


@pytest.mark.parametrize("name", FAMILY)
def test_paged_equals_flash_equals_hf(name: str, tmp_path: Path) -> None:
    """Greedy, one batch of mixed lengths on both of our paths, one at a time on the other side."""
    config = checkpoints.FAMILY[FAMILY[name]]
    model = checkpoints.write_checkpoint(tmp_path, config, seed=1)
    rows = checkpoints.prompts((5, 1, 60, 30), config["vocab_size"], seed=2)
    expected = []
    for row in rows:
        ids = torch.tensor([row])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
        )
        expected.append(output[0, len(row) :].tolist())
    engine = checkpoints.load_engine(tmp_path, select("cpu"), max_batch_size=4)
    paged = engine.generate(rows, SamplingParams(max_new_tokens=24, ignore_eos=True))
    assert [output.token_ids for output in paged] == expected
    flash = GenerateEngine.from_pretrained(
        tmp_path,
        EngineSection(max_batch_size=64),
        select("cpu"),
        group=TensorParallelGroup(),
        dtype="float32",
        with_tokenizer=False,
    )
    outputs = flash.generate(rows, SamplingParams(max_new_tokens=24, ignore_eos=True))
    assert [output.token_ids for output in outputs] == expected
    assert type(flash.adapter).__module__ == "gptneox.adapter", "nothing copied is executed"


def test_config_keys_of_other_eras(tmp_path: Path) -> None:
    """transformers 5 hands its own view of an old config.json over; the file is what counts."""
    config = checkpoints.FAMILY["polyglot-ko-12.8b"] | {"rotary_emb_base": 500}
    model = checkpoints.write_checkpoint(tmp_path, config)
    ids = torch.tensor(checkpoints.prompts([50], config["vocab_size"]))
    ours = load(add_remote_code(tmp_path))
    assert isinstance(ours.config, GPTNeoXConfig)
    assert_close(ours(ids).logits, model(ids).logits)
