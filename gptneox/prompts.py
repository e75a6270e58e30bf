# SPDX-License-Identifier: Apache-2.0
"""The prompts of a run: texts, files, pipes and standard input in, token ids out."""

from __future__ import annotations

import logging
import os
import re
import stat
import sys
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptneox.cli import Settings
from gptneox.config.arguments import DEFAULT_PROMPT
from gptneox.config.errors import ConfigError
from gptneox.config.files import decode_text
from gptneox.engine.sequence import SamplingParams
from gptneox.parallel import TensorParallelGroup

logger = logging.getLogger(__name__)

STDIN_NAMES = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
# What a shell writes for <(command), and for descriptors that the user opened.
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d+)")
# One word with a separator or one of these endings was probably meant as a file.
_FILE_NAME = re.compile(
    r"\S*[/\\]\S*|\S+\.(?:csv|html?|in|jsonl?|log|md|prompt|rst|te?xt|tsv|ya?ml)", re.IGNORECASE
)
MAX_PROMPT_BYTES = 256 << 20  # more than any model has positions for


WARM_UP_PROMPT = "Hamlet->Shakespeare\nOne Hundred Years of Solitude->"
DEMO_PROMPTS = ("How to learn a new language?", "The CEO of Google is")
DEMO_MAX_NEW_TOKENS, DEMO_REPETITION_PENALTY = 64, 1.1


@dataclass(frozen=True)
class Prompt:
    """One input: its ids, and the text that stands for it in the output."""

    ids: list[int]
    display: str


def read_texts(
    settings: Settings, group: TensorParallelGroup, *, leave_pipes: bool = False
) -> list[str]:
    """What --input_texts stands for, on every rank; [] when --input_ids are the prompts.

    Rank 0 alone reads: a pipe gives its content once, and a file need not be on every host.

    Args:
        settings: of the run.
        group: the ranks.
        leave_pipes: leave out what can be read only once.

    Raises:
        ConfigError: a folder, a file that cannot be read or is not UTF-8, an empty text.
    """
    args = settings.args
    if args.input_ids:
        return []
    texts = None
    if group.rank == 0:
        words = args.input_texts or [DEFAULT_PROMPT]
        if sum(word in STDIN_NAMES for word in words) > 1:
            raise ConfigError("--input_texts names standard input twice; it can be read once")
        texts = [
            check_text(_read_word(word, f"prompt {i}", group.world_size), f"prompt {i}")
            for i, word in enumerate(words)
            if not (leave_pipes and _reads_only_once(word, f"prompt {i}"))
        ]
    received = group.broadcast_object(texts)
    assert isinstance(received, list)
    return received


def make_prompts(settings: Settings, texts: Seq[str], tokenizer: Any) -> list[Prompt]:
    """--input_ids if given, else the texts that `read_texts` found."""
    if ids := settings.args.input_ids:
        return [Prompt(i, ",".join(map(str, i))) for i in ids]
    return [Prompt(encode(tokenizer, text, f"prompt {i}"), text) for i, text in enumerate(texts)]


def fit_output_length(settings: Settings, max_positions: int, prompt: Prompt) -> SamplingParams:
    """The request's parameters; a length nobody asked for is capped to the positions left."""
    params = settings.sampling
    left = max_positions - len(prompt.ids)
    is_default = settings.sources["engine"]["max_output_length"] == "default"
    if settings.attention == "paged" and is_default and left > 0:
        return replace(params, max_new_tokens=min(params.max_new_tokens, left))
    return params


def is_demonstration(settings: Settings) -> bool:
    """Whether the run gives the demonstrations: the flash path without prompts of the user."""
    args = settings.args
    return settings.attention == "flash" and not (args.input_texts or args.input_ids)


def demo_params(settings: Settings) -> SamplingParams:
    """The parameters of the demonstrations, which have defaults of their own."""
    params = settings.sampling
    if settings.sources["engine"]["max_output_length"] == "default":
        params = replace(params, max_new_tokens=DEMO_MAX_NEW_TOKENS)
    if "repetition_penalty" not in settings.given:
        params = replace(params, repetition_penalty=DEMO_REPETITION_PENALTY)
    return params


def encode(tokenizer: Any, text: str, what: str) -> list[int]:
    """Token ids of a prompt, without added special tokens.

    Raises:
        ConfigError: empty, or not valid Unicode.
    """
    return list(tokenizer.encode(check_text(text, what), add_special_tokens=False))


def check_text(text: str, what: str) -> str:
    """Return `text`, unless it is empty or holds what is no character."""
    if not text:
        raise ConfigError(f"{what} is empty; give a text, or --input_ids 0 to start from nothing")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{what} is not valid Unicode: {error.reason} at {error.start}"
        ) from error
    return text


# -- one word of --input_texts -------------------------------------------------------------------


def _read_word(word: str, what: str, world_size: int) -> str:
    """What a word stands for: the content of a file or a pipe of this name, else itself."""
    if word in STDIN_NAMES:
        logger.info("%s is read from standard input (Ctrl-D on a terminal ends it)", what)
        return _decode(sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1), f"{what}, standard input,")
    path = find_file(word, what, world_size)
    if path is None:
        if _FILE_NAME.fullmatch(word):
            hint = " (the shell puts your home in place of ~ only without quotes)"
            logger.warning(
                "%s, %r, looks like a file, but there is none; the text itself is answered%s",
                what,
                word,
                hint if word.startswith("~") else "",
            )
        return word
    if not path.is_file():
        logger.info("%s is read from %s to its end", what, word)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PROMPT_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{what} cannot be read from {word}: {error.strerror}") from error
    return _decode(data, f"{what}, {word},")


def _reads_only_once(word: str, what: str) -> bool:
    """Whether a word stands for a pipe or a terminal."""
    if word in STDIN_NAMES:
        return True
    path = find_file(word, what)
    return path is not None and not path.is_file()


def _decode(data: bytes, origin: str) -> str:
    if len(data) > MAX_PROMPT_BYTES:
        raise ConfigError(f"{origin} is longer than {MAX_PROMPT_BYTES >> 20} MiB")
    return decode_text(data, origin)


def find_file(word: str, what: str, world_size: int = 1) -> Path | None:
    """The file, pipe or terminal called `word`; None when there is nothing of that name.

    Raises:
        ConfigError: there is something that is no text: a folder, a closed descriptor; or it
            may not be looked at.
    """
    if not word:
        return None  # Path("") would be the current folder
    path = Path(word)
    descriptor = _DESCRIPTOR.fullmatch(word)
    if descriptor and world_size > 1:
        # torchrun keeps the shell's descriptors to itself; in this process the number may be
        # something else's.
        path = Path(f"/proc/{os.getppid()}/fd/{descriptor[1]}")
    try:
        mode = path.stat().st_mode
    except PermissionError as error:
        if not _FILE_NAME.fullmatch(word):
            return None
        raise ConfigError(f"{what}, {word}, cannot be looked at: {error.strerror}") from error
    except (OSError, ValueError) as error:  # also: too long for a name, a NUL byte
        if not descriptor:
            return None
        raise ConfigError(f"{what}, {word}, is not open; give a file, or - and a pipe") from error
    if stat.S_ISDIR(mode):
        raise ConfigError(
            f"{what}, {word!r}, is a folder; name a file in it (to ask for the word itself, pipe "
            "it in: --input_texts -)"
        )
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        raise ConfigError(f"{what}, {word}, is no file, pipe or terminal")
    return path
