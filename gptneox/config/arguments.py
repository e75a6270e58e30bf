# SPDX-License-Identifier: Apache-2.0
"""Settings that are flags alone: config.ini has no key for them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from gptneox.config.schema import setting, settings_of

DEFAULT_PROMPT = "What's deep learning?"

COMPARISON = "comparison of two performance results (--task compare)"

QUANTIZATION = "quantization (--task quantize)"

CLUSTER = "a Ray cluster (--task precision and inference)"

# The groups of flags, in the order of --help.
GROUPS = (
    "options",
    "model",
    "input and output",
    COMPARISON,
    QUANTIZATION,
    CLUSTER,
    "generation",
    "engine",
    "server",
)

TASKS = (
    "inference",
    "serve",
    "precision",
    "performance",
    "compare",
    "modeltest",
    "doctor",
    "quantize",
)


def given(text: str) -> str:
    """A word that is not empty: an empty one comes from a shell variable that is not set."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; name one, or leave the flag out")
    return text


def given_path(text: str) -> Path:
    """A path that is not empty."""
    return Path(given(text))


def boolean(text: str) -> bool:
    """True or False, in any case, or 1 or 0."""
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in ("true", "1")


def id_list(text: str) -> list[int]:
    """Numbers joined by commas."""
    try:
        return [int(item) for item in text.split(",")] if text.strip() else []
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of token ids joined by commas"
        ) from error


def bias_list(text: str) -> list[tuple[int, float]]:
    """Pairs ID:VALUE joined by commas."""
    try:
        pairs = [item.split(":") for item in text.split(",")]
        return [(int(token_id), float(value)) for token_id, value in pairs]
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of ID:VALUE joined by commas"
        ) from error


@dataclass(frozen=True)
class Arguments:
    """What to do, with which input and output."""

    group: ClassVar[str] = "options"  # heading of --help

    task: str = setting(
        "inference",
        "What to do. modeltest is started by tests/modeltest/run.sh.",
        choices=TASKS,
    )
    config: Path | None = setting(
        None,
        "Settings file; default: config.ini beside main.py.",
        parse=given_path,
        placeholder="FILE",
    )
    debug: bool = setting(False, "Log more, and show tracebacks.")
    auto_attention: str = setting(
        "flash", "", choices=("paged", "flash"), group="model", is_hidden=True
    )
    tp: int | None = setting(
        None,
        "Number of ranks; an error unless as many processes were started. With --ray: those of a "
        "replica.",
        parse=int,
        placeholder="N",
        group="model",
    )
    trust_remote_code: bool = setting(
        False,
        "Run a tokenizer's own Python code; those of GPT-NeoX models have none.",
        group="model",
    )
    input_texts: Seq[str] = setting(
        (),
        "Prompts. The name of a file or pipe stands for its content, - for standard input. "
        f"Default: {DEFAULT_PROMPT}",
        placeholder="TEXT",
        group="input and output",
    )
    input_ids: Seq[list[int]] = setting(
        (),
        "Prompts as token ids: 12092,13 510 are two. They go before --input_texts.",
        parse=id_list,
        placeholder="IDS",
        group="input and output",
    )
    load_tokenizer: bool = setting(
        True, "False: --input_ids in, ids out.", parse=boolean, group="input and output"
    )
    interactive: bool = setting(False, "Read prompts from the terminal.", group="input and output")
    chat: bool = setting(
        False,
        "Prompts are messages to an assistant, in its chat template; with --interactive they are "
        "one conversation.",
        group="input and output",
    )
    chat_template: str = setting(
        "",
        "Chat template, a name or a Jinja file (a wrong one lists the names); default: the "
        "model's own. Implies --chat.",
        parse=given,
        placeholder="NAME",
        group="input and output",
    )
    stream: bool = setting(False, "Print each answer while it grows.", group="input and output")
    output_file: Path | None = setting(
        None,
        "Also write the answers as JSON lines.",
        parse=given_path,
        placeholder="FILE",
        group="input and output",
    )
    against: Path | None = setting(
        None,
        "The earlier result: CSV, JSON or a directory.",
        parse=given_path,
        placeholder="PATH",
        group=COMPARISON,
    )
    with_result: Path | None = setting(
        None,
        "The later result; default: the newest in the current directory.",
        flag_name="with",
        parse=given_path,
        placeholder="PATH",
        group=COMPARISON,
    )
    ray: int = setting(
        0,
        "Spread questions or prompts over so many replicas in a Ray cluster; --tp is then the "
        "number of ranks of each. 0: run here.",
        minimum=0,
        placeholder="REPLICAS",
        group=CLUSTER,
    )
    ray_hosts: int = setting(1, "Hosts of a replica.", group=CLUSTER)
    ray_cpus: int = setting(1, "Cores of a rank.", group=CLUSTER)
    ray_address: str = setting(
        "auto",
        "Address of the cluster; auto: RAY_ADDRESS, or the one that runs on this host.",
        parse=given,
        placeholder="ADDRESS",
        group=CLUSTER,
    )
    server_socket: str = setting("", "", group="server", placeholder="PATH", is_hidden=True)
    modeltest_arguments: Seq[str] = setting((), "", nargs="...", group=COMPARISON, is_hidden=True)

    @property
    def wants_chat(self) -> bool:
        """Whether prompts are messages to an assistant."""
        return self.chat or bool(self.chat_template)


@dataclass(frozen=True)
class Generation:
    """How tokens are chosen and where an answer ends; `SamplingParams` checks the values."""

    group: ClassVar[str] = "generation"

    ignore_eos: bool = setting(False, "Go on after the end-of-text token.")
    min_new_tokens: int = setting(
        0, "Earliest place of end-of-text and --stop_token_ids: after so many tokens."
    )
    temperature: float = setting(0.0, "0: always the likeliest token.")
    top_k: int = setting(0, "Keep the k likeliest tokens; 0: all.")
    top_p: float = setting(1.0, "Keep the likeliest tokens up to this probability.")
    min_p: float = setting(
        0.0, "Keep the tokens that reach this share of the likeliest one's probability."
    )
    repetition_penalty: float = setting(1.0, "Above 1: avoid repeating prompt and answer.")
    presence_penalty: float = setting(
        0.0, "-2 to 2: taken from the logits of tokens that the answer has."
    )
    frequency_penalty: float = setting(
        0.0, "-2 to 2: the same, times the number of their occurrences there."
    )
    logit_bias: Seq[list[tuple[int, float]]] = setting(
        (),
        "Added to the logits of these ids, -100 to 100: 187:-100 or 187:-100,0:5.",
        parse=bias_list,
        placeholder="ID:X",
    )
    allowed_token_ids: Seq[list[int]] = setting(
        (), "Choose among these ids alone.", parse=id_list, placeholder="IDS"
    )
    seed: int | None = setting(None, "Same seed, same text.", parse=int, placeholder="N")
    stop: Seq[str] = setting((), "End before any of these strings, 16 at most.", placeholder="TEXT")
    include_stop: bool = setting(False, "End after the stop string, not before it.")
    stop_token_ids: Seq[list[int]] = setting(
        (),
        "End with any of these ids, as with end-of-text: 187 0, or 187,0.",
        parse=id_list,
        placeholder="IDS",
    )


FlagsOnly = TypeVar("FlagsOnly")


def from_flags(cls: type[FlagsOnly], flags: Mapping[str, Any]) -> FlagsOnly:
    """The flags of this class among those given; the others keep their defaults."""
    names = [each.name for each in settings_of(cls)]
    return cls(**{name: flags[name] for name in names if name in flags})
