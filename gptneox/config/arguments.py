# SPDX-License-Identifier: Apache-2.0
"""Settings that are flags alone: config.ini has no key for them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from gptneox.config.schema import setting

DEFAULT_PROMPT = "What's deep learning?"

COMPARISON = "comparison of two performance results (--task compare)"

# The groups of flags, in the order of --help.
GROUPS = ("options", "model", "input and output", COMPARISON, "generation", "engine", "server")

TASKS = ("inference", "serve", "precision", "performance", "compare", "modeltest", "doctor")


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
        "Number of ranks; an error unless as many processes were started.",
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
    server_socket: str = setting("", "", group="server", placeholder="PATH", is_hidden=True)
    modeltest_arguments: Seq[str] = setting((), "", nargs="...", group=COMPARISON, is_hidden=True)


@dataclass(frozen=True)
class Generation:
    """How tokens are chosen and where an answer ends; `SamplingParams` checks the values."""

    group: ClassVar[str] = "generation"

    ignore_eos: bool = setting(False, "Go on after the end-of-text token.")
    temperature: float = setting(0.0, "0: always the likeliest token.")
    top_k: int = setting(0, "Keep the k likeliest tokens; 0: all.")
    top_p: float = setting(1.0, "Keep the likeliest tokens up to this probability.")
    repetition_penalty: float = setting(1.0, "Above 1: avoid repeating.")
    seed: int | None = setting(None, "Same seed, same text.", parse=int, placeholder="N")
    stop: Seq[str] = setting((), "End before any of these strings, 16 at most.", placeholder="TEXT")
    stop_token_ids: Seq[list[int]] = setting(
        (),
        "End with any of these ids, as with end-of-text: 187 0, or 187,0.",
        parse=id_list,
        placeholder="IDS",
    )


FlagsOnly = TypeVar("FlagsOnly", Arguments, Generation)


def from_flags(cls: type[FlagsOnly], flags: Mapping[str, Any]) -> FlagsOnly:
    """The flags of this class among those given; the others keep their defaults."""
    return cls(**{f.name: flags[f.name] for f in fields(cls) if f.name in flags})
