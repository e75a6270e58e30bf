# SPDX-License-Identifier: Apache-2.0
"""Train the small GPT-NeoX model of ``weights/neox-mini`` from a generated corpus.

The corpus (see ``mini_corpus``) is made on the fly, the tokenizer is trained on a sample of it,
and the model is trained on the CPU in bfloat16 autocast. Everything is seeded::

    python tools/train_mini.py --output weights/neox-mini
    python tools/train_mini.py --evaluate weights/neox-mini
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from mini_corpus import (
    ANSWER_WEIGHT,
    END,
    FIND_WEIGHT,
    LATER_WEIGHT,
    LETTER_WEIGHT,
    NEXT_WEIGHT,
    TEXT_WEIGHT,
    VALUE_WEIGHT,
    Document,
    Pieces,
    document,
    evaluation,
)
from mini_corpus.choice import LETTERS, Choice, header
from mini_corpus.knowledge import SUBJECTS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
)

sys.path.append(str(Path(__file__).resolve().parents[1]))  # this toolkit itself

from gptneox.files import check_writable

VOCABULARY = 1024
POSITIONS = 2048
END_ID = 0
END_WEIGHT = 0.5
YES_NO_QUESTIONS = 2000
SHORT_ROW, LONG_ROW, LAST_ROW = 256, 512, 1024
LAST_PHASE = 0.6
WARM_UP = 50
# What a checkpoint of this tool consists of
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
DECAY = 0.4  # share of the training, at its end, over which the rate falls

DEMO_PROMPTS = (
    "How to learn a new language?",
    "The CEO of Google is",
    "Hamlet->Shakespeare\nOne Hundred Years of Solitude->",
    "What's deep learning?",
    "What is deep learning?",
    "Hello",
    "Once upon a time",
    "The capital of France is",
    "Write a short story about a dog.",
)


def build_tokenizer(seed: int, documents: int = 12_000) -> Tokenizer:
    """Train the byte-level BPE tokenizer on a sample of the corpus.

    Args:
        seed: Seed of the sample.
        documents: Size of the sample.

    Returns:
        The tokenizer, with the end mark as token 0.

    Raises:
        ValueError: If an answer word is not a single token.
    """
    rng = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (text for _ in range(documents) for text in document(rng, 1.0).texts()[:3])
    tokenizer.train_from_iterator(texts, trainer)
    for word in (" yes", " no", *(f" {letter}" for letter in LETTERS)):
        if len(tokenizer.encode(f"Answer:{word}").ids) != len(tokenizer.encode("Answer:").ids) + 1:
            raise ValueError(f"{word!r} is not a single token")
    return tokenizer


def build_model(seed: int) -> GPTNeoXForCausalLM:
    """Return the untrained model."""
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=768,
        hidden_act="gelu_fast",
        rotary_pct=0.25,
        rotary_emb_base=10_000,
        max_position_embeddings=POSITIONS,
        use_parallel_residual=True,
        tie_word_embeddings=False,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
    )
    return GPTNeoXForCausalLM(config)


@dataclass(frozen=True)
class Encoded:
    """A document as token ids.

    Attributes:
        ids: Token ids: the stem, then each branch with an end mark.
        weights: Weight in the loss of each token, as something to predict.
        positions: Position of each token; every branch goes on where the stem ends.
        branches: Number of the branch of each token, 0 for the stem.
    """

    ids: list[int]
    weights: list[float]
    positions: list[int]
    branches: list[int]


def _tokens(tokenizer: Tokenizer, pieces: Pieces) -> tuple[list[int], list[float]]:
    """Tokenize pieces as one text; a token takes the weight of its last character."""
    text = "".join(part for part, _ in pieces)
    by_character = [weight for part, weight in pieces for _ in part]
    coded = tokenizer.encode(text)
    return coded.ids, [by_character[end - 1] for _, end in coded.offsets]


def encode(tokenizer: Tokenizer, source: Document, leading_end: bool) -> Encoded:
    """Tokenize a document.

    Args:
        tokenizer: Tokenizer of the corpus.
        source: The document.
        leading_end: Whether to put an end mark in front.

    Returns:
        The tokens of the document.
    """
    ids, weights = _tokens(tokenizer, source.stem)
    if leading_end:
        ids, weights = [END_ID, *ids], [0.0, *weights]
    weights[0] = 0.0  # nothing stands in front of it
    stem = len(ids)
    positions, branches = list(range(stem)), [0] * stem
    for number, pieces in enumerate(source.branches or [[]], start=1):
        more, more_weights = _tokens(tokenizer, pieces)
        more, more_weights = [*more, END_ID], [*more_weights, END_WEIGHT]
        if number > 1:
            more_weights[0] = 0.0  # the token in front belongs to another branch
        ids, weights = ids + more, weights + more_weights
        positions += range(stem, stem + len(more))
        branches += [number] * len(more)
    return Encoded(ids, weights, positions, branches)


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents.

    Attributes:
        ids: Token ids, ``[rows, length]``.
        positions: Positions of the tokens, of the same shape.
        weights: Loss weights of the same shape; 0 for padding and for first tokens.
        mask: Additive attention mask, ``[rows, 1, length, length]``, which keeps each document
            to itself and each branch to its stem and itself.
    """

    ids: Tensor
    positions: Tensor
    weights: Tensor
    mask: Tensor


class Packer:
    """Packs generated documents into rows.

    Documents wait in a pool until a row has room for them. Long documents collect until they fill
    a batch of long rows, so that most batches have short rows and cheap attention.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int, batch_tokens: int) -> None:
        """Create an empty pool.

        Args:
            tokenizer: Tokenizer of the documents.
            seed: Seed of the corpus.
            batch_tokens: Tokens in a batch.
        """
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)
        self._tokens = batch_tokens
        self._short: list[Encoded] = []
        self._long: list[Encoded] = []

    def _draw(self, progress: float, limit: int) -> None:
        source = document(self._rng, progress)
        coded = encode(self._tokenizer, source, leading_end=self._rng.random() < 0.15)
        if len(coded.ids) <= SHORT_ROW:
            self._short.append(coded)
        elif len(coded.ids) <= limit:
            self._long.append(coded)

    def batch(self, progress: float) -> Batch:
        """Return the next batch.

        Args:
            progress: Share of the training that is done.

        Returns:
            A batch of short rows, or of long rows once enough long documents wait.
        """
        long_row = LAST_ROW if progress > LAST_PHASE else LONG_ROW
        while len(self._short) < 400:
            self._draw(progress, long_row)
        waiting = sum(len(item.ids) for item in self._long)
        length = long_row if waiting > 0.8 * self._tokens else SHORT_ROW
        rows = [self._row(length) for _ in range(self._tokens // length)]
        return _collate(rows, length)

    def _row(self, length: int) -> list[Encoded]:
        row: list[Encoded] = []
        room = length
        while length > SHORT_ROW and self._long and len(self._long[0].ids) <= room:
            row.append(self._long.pop(0))
            room -= len(row[-1].ids)
        index = 0
        while index < len(self._short) and room > 8:
            if len(self._short[index].ids) <= room:
                row.append(self._short.pop(index))
                room -= len(row[-1].ids)
            else:
                index += 1
        return row


def _collate(rows: list[list[Encoded]], length: int) -> Batch:
    ids, positions, part, branch = (
        torch.zeros(len(rows), length, dtype=torch.long) for _ in range(4)
    )
    weights = torch.zeros(len(rows), length)
    for number, row in enumerate(rows):
        start = 0
        for count, item in enumerate(row, start=1):
            here = (number, slice(start, start + len(item.ids)))
            ids[here] = torch.tensor(item.ids)
            positions[here] = torch.tensor(item.positions)
            weights[here] = torch.tensor(item.weights)
            branch[here] = torch.tensor(item.branches)
            part[here] = count
            start += len(item.ids)
    seen = branch[:, None, :]
    allowed = (part[:, :, None] == part[:, None, :]) & ((seen == 0) | (seen == branch[:, :, None]))
    allowed &= torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(allowed.shape, dtype=torch.bfloat16).masked_fill(~allowed, -1e9)
    return Batch(ids, positions, weights, mask[:, None])


def learning_rate(step: int, progress: float, peak: float) -> float:
    """Return the rate of a step: short warm-up, constant, linear decay to zero."""
    return peak * min(1.0, (step + 1) / WARM_UP, (1.0 - progress) / DECAY)


SORTS = {
    "text": TEXT_WEIGHT,
    "value": VALUE_WEIGHT,
    "yes/no": ANSWER_WEIGHT,
    "letter": LETTER_WEIGHT,
    "next": NEXT_WEIGHT,
    "later": LATER_WEIGHT,
    "find": FIND_WEIGHT,
}
"""Sorts of tokens, told apart by their weight, for the report of the training."""


def batch_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the model on a batch; return the weighted loss, and the losses of the tokens by sort."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(
            batch.ids,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            use_cache=False,
        ).logits
    target = batch.ids[:, 1:].reshape(-1)
    weight = batch.weights[:, 1:].reshape(-1)
    each = nn.functional.cross_entropy(
        logits[:, :-1].float().reshape(-1, VOCABULARY), target, reduction="none"
    )

    total = (each * weight).sum() / weight.sum()
    return total, {name: each.detach()[weight == of] for name, of in SORTS.items()}


@dataclass(frozen=True)
class Plan:
    """Length and size of a training run.

    Attributes:
        steps: Number of steps.
        minutes: Time limit; where the steps would take longer, the schedule follows the clock.
        batch_tokens: Tokens in a step.
        rate: Peak learning rate.
        seed: Seed of weights and corpus.
        save_every: Steps between two checkpoints.
        begin: Share of the schedule to skip, for a model that was trained before.
        end: Share of the schedule at which to stop.
    """

    steps: int
    minutes: float
    batch_tokens: int
    rate: float
    seed: int
    save_every: int
    begin: float
    end: float


def train(model: GPTNeoXForCausalLM, tokenizer: Tokenizer, plan: Plan, output: Path) -> None:
    """Train a model, writing it to ``output`` now and then and at the end.

    Args:
        model: Model to train in place.
        tokenizer: Tokenizer of the corpus.
        plan: What to do.
        output: Directory of the checkpoint.
    """
    exact = [layer.mlp.act for layer in model.gpt_neox.layers]
    for layer in model.gpt_neox.layers:
        layer.mlp.act = nn.GELU(approximate="tanh")  # the same function, in one kernel
    packer = Packer(tokenizer, plan.seed + 1, plan.batch_tokens)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    started, tokens = time.monotonic(), 0
    recent: dict[str, list[Tensor]] = {name: [] for name in SORTS}
    model.train()
    for step in range(plan.steps):
        done = max(step / plan.steps, (time.monotonic() - started) / 60 / plan.minutes)
        progress = plan.begin + (plan.end - plan.begin) * done
        if done >= 1:
            break
        batch = packer.batch(progress)
        loss, by_sort = batch_losses(model, batch)
        loss.backward()
        for name, each in by_sort.items():
            recent[name].append(each)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress, plan.rate)
        optimizer.step()
        optimizer.zero_grad()
        tokens += batch.ids.numel()
        if (step + 1) % 50 == 0:
            means = " ".join(f"{k} {torch.cat(each).mean():.3f}" for k, each in recent.items())
            seconds = time.monotonic() - started
            print(f"step {step + 1} {means} tokens {tokens} seconds {seconds:.0f}", flush=True)
            recent = {name: [] for name in SORTS}
        if (step + 1) % plan.save_every == 0 and step + 1 < plan.steps:
            save(model, tokenizer, output)
            probe(model, tokenizer)
            model.train()
    for layer, act in zip(model.gpt_neox.layers, exact, strict=True):
        layer.mlp.act = act
    save(model, tokenizer, output)


def save(model: GPTNeoXForCausalLM, tokenizer: Tokenizer, output: Path) -> None:
    """Write weights (float16), configuration and tokenizer to ``output``.

    The configuration also carries the older names of some settings, so that older readers of
    GPT-NeoX checkpoints find them.
    """
    output.mkdir(parents=True, exist_ok=True)
    copy = GPTNeoXForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.half().save_pretrained(output)
    GenerationConfig(bos_token_id=END_ID, eos_token_id=END_ID).save_pretrained(output)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(output)
    _merge(
        output / "config.json",
        rotary_pct=0.25,
        rotary_emb_base=10_000,
        torch_dtype="float16",
    )
    _merge(
        output / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        model_input_names=["input_ids", "attention_mask"],
    )
    _merge(output / "special_tokens_map.json", bos_token=END, eos_token=END, unk_token=END)

    for name in FILES:
        if (output / name).exists():
            (output / name).chmod(0o644)


def check_output(output: Path, model: GPTNeoXForCausalLM) -> None:
    """Refuse, before the training, a directory that cannot be written or holds another model.

    Raises:
        OSError: it cannot be written.
        ValueError: its config.json is of another model.
    """
    for name in FILES:
        check_writable(output / name)
    path = output / "config.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    expected = model.config.to_dict()
    same = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    if found and any(found.get(key) != expected[key] for key in same):
        raise ValueError(f"{output} holds another model, which would be overwritten; name another")


def _merge(path: Path, **values: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content.update(values)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _by_length(prompts: list[list[int]], size: int) -> Iterator[list[int]]:
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


@torch.inference_mode()
def choose(model: nn.Module, prompts: list[list[int]], words: list[int]) -> list[int]:
    """Return for each prompt the most likely of some next tokens.

    Args:
        model: Model to ask.
        prompts: Token ids of the prompts.
        words: Candidate tokens.

    Returns:
        The index of the likeliest candidate, one per prompt.
    """
    model.eval()
    best = [0] * len(prompts)
    for group in _by_length(prompts, 16):
        longest = max(len(prompts[index]) for index in group)
        ids = torch.zeros(len(group), longest, dtype=torch.long)
        for row, index in enumerate(group):
            ids[row, : len(prompts[index])] = torch.tensor(prompts[index])
        logits = model(ids, use_cache=False).logits  # padding is on the right, past the prompt
        for row, index in enumerate(group):
            best[index] = int(logits[row, len(prompts[index]) - 1, words].argmax())
    return best


def _share(found: Iterable[int], wanted: Iterable[int]) -> float:
    pairs = list(zip(found, wanted, strict=True))
    return sum(a == b for a, b in pairs) / len(pairs)


def yes_no_hits(model: nn.Module, tokenizer: Tokenizer, number: int) -> list[bool]:
    """Return for each of some held-out yes/no questions whether it is answered right."""
    rows = evaluation.yes_no_rows(number)
    prompts = [tokenizer.encode(evaluation.yes_no_prompt(row)).ids for row in rows]
    words = [tokenizer.encode(word).ids[0] for word in (" no", " yes")]
    found = choose(model, prompts, words)
    return [answer == bool(row["answer"]) for answer, row in zip(found, rows, strict=True)]


def _with_shots(subject: str, shots: list[Choice], item: Choice) -> str:
    solved = [f"{shot.prompt()} {shot.letter()}\n\n" for shot in shots]
    return header(subject) + "".join(solved) + item.prompt()


def choice_accuracy(
    model: nn.Module, tokenizer: Tokenizer, shots: int, limit: int | None = None
) -> dict[str, float]:
    """Return the accuracy on held-out four-choice questions per subject.

    Args:
        model: Model to measure.
        tokenizer: Its tokenizer.
        shots: Number of worked examples in front of each question.
        limit: Questions per subject, all if omitted.

    Returns:
        Accuracy per subject.
    """
    words = [tokenizer.encode(f" {letter}").ids[0] for letter in LETTERS]
    result = {}
    for subject in SUBJECTS:
        sets = evaluation.choice_sets(subject)
        items = sets["test"][:limit]
        texts = [_with_shots(subject, sets["dev"][:shots], item) for item in items]
        prompts = [tokenizer.encode(text).ids for text in texts]
        result[subject] = _share(choose(model, prompts, words), (i.answer for i in items))
    return result


def probe(model: nn.Module, tokenizer: Tokenizer) -> None:
    """Print a quick measurement on a part of the held-out questions."""
    yes_no = statistics.mean(yes_no_hits(model, tokenizer, 200))
    choice = {n: choice_accuracy(model, tokenizer, n, 20).values() for n in (0, 5)}
    means = {n: round(sum(values) / len(values), 3) for n, values in choice.items()}
    print(f"held out: yes/no {yes_no:.3f} four-choice by shots {means}", flush=True)


def evaluate(folder: Path) -> dict[str, object]:
    """Measure a saved model in float32.

    Args:
        folder: Directory of the model.

    Returns:
        Accuracies and sample counts, and greedy continuations of the demo prompts.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wrapped = AutoTokenizer.from_pretrained(folder)
    tokenizer = wrapped.backend_tokenizer
    hits = yes_no_hits(model, tokenizer, YES_NO_QUESTIONS)
    result: dict[str, object] = {
        f"yes_no_{number}": statistics.mean(hits[:number])
        for number in (evaluation.YES_NO_FILE_ROWS, YES_NO_QUESTIONS)
    }
    for shots in (0, 5):
        each = choice_accuracy(model, tokenizer, shots)
        result[f"choice_{shots}_shot"] = each
        result[f"choice_{shots}_shot_mean_of_{evaluation.TEST_ROWS * len(each)}"] = sum(
            each.values()
        ) / len(each)
    continuations = {}
    for prompt in DEMO_PROMPTS:
        ids = wrapped(prompt, return_tensors="pt").input_ids
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=160,
            do_sample=False,
            pad_token_id=END_ID,
        )
        continuations[prompt] = wrapped.decode(output[0, ids.shape[1] :])
    result["greedy"] = continuations
    return result


def main() -> None:
    """Train a model, or measure one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--output", type=Path, help="train a model and write it to this directory")
    what.add_argument("--evaluate", type=Path, help="measure the model of this directory")
    what.add_argument("--files", type=Path, help="only write the evaluation files below this")
    parser.add_argument("--steps", type=int, default=15_000)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="time limit")
    parser.add_argument("--start", type=Path, help="go on from the model of this directory")
    parser.add_argument("--begin", type=float, default=0.0, help="share of the schedule to skip")
    parser.add_argument("--end", type=float, default=1.0, help="share at which to stop")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    if arguments.files:
        evaluation.write_files(arguments.files)
    elif arguments.evaluate:
        print(json.dumps(evaluate(arguments.evaluate), indent=2))
    else:
        if arguments.start:
            model = AutoModelForCausalLM.from_pretrained(arguments.start, dtype=torch.float32)
            tokenizer = Tokenizer.from_file(str(arguments.start / "tokenizer.json"))
        else:
            model = build_model(arguments.seed)
            tokenizer = build_tokenizer(arguments.seed)
        size = sum(parameter.numel() for parameter in model.parameters())
        print(f"parameters {size}", flush=True)
        plan = Plan(
            arguments.steps,
            arguments.minutes,
            arguments.batch_tokens,
            arguments.rate,
            arguments.seed,
            arguments.save_every,
            arguments.begin,
            arguments.end,
        )
        try:
            check_output(arguments.output, model)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        train(model, tokenizer, plan, arguments.output)
        evaluation.write_files(arguments.output / "eval")
        print(json.dumps(evaluate(arguments.output), indent=2))


if __name__ == "__main__":
    main()
