# SPDX-License-Identifier: Apache-2.0
"""Reads the prompts of a run from texts, files, pipes or standard input, and tokenizes them."""

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

from gptneox.chat_templates import ChatTemplate, find_template, render_chat
from gptneox.cli import Settings
from gptneox.config.arguments import DEFAULT_PROMPT
from gptneox.config.errors import ConfigError
from gptneox.config.files import decode_text
from gptneox.engine.sequence import SamplingParams
from gptneox.parallel import TensorParallelGroup

logger = logging.getLogger(__name__)

STDIN_NAMES = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
# A shell passes such a path for <(command), and a user for an open descriptor.
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d+)")
# A word with a path separator or one of these extensions was probably meant as a file.
_FILE_NAME = re.compile(
    r"\S*[/\\]\S*|\S+\.(?:csv|html?|in|jsonl?|log|md|prompt|rst|te?xt|tsv|ya?ml)", re.IGNORECASE
)
MAX_PROMPT_BYTES = 256 << 20  # far beyond the positions of any model

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
    """The prompts of --input_texts, on every rank; [] if the run has --input_ids.

    Only rank 0 reads: a pipe can be read once, and a file need not exist on every host.

    Args:
        settings: of the run.
        group: the ranks.
        leave_pipes: skip pipes and terminals.

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


def apply_chat(
    settings: Settings, texts: Seq[str], tokenizer: Any
) -> tuple[list[str], SamplingParams]:
    """The texts that the model continues, and their parameters.

    With --chat each text is a message of the user in the chat template, whose stop strings are
    added; else nothing changes.

    Raises:
        ChatTemplateError: there is no template, or it refuses a text.
    """
    if not settings.args.wants_chat:
        return list(texts), settings.sampling
    template = find_template(settings.args.chat_template, tokenizer)
    messages = [{"role": "user", "content": text} for text in texts]
    rendered = [render_chat([message], template) for message in messages]
    return rendered, stop_with(settings.sampling, template)


def stop_with(params: SamplingParams, template: ChatTemplate) -> SamplingParams:
    """The parameters with the template's stop strings besides their own."""
    return replace(params, stop=tuple(dict.fromkeys((*params.stop, *template.stop))))


def make_prompts(
    settings: Settings, texts: Seq[str], tokenizer: Any
) -> tuple[list[Prompt], SamplingParams]:
    """Prompts from --input_ids, or from the texts of `read_texts`; and their parameters."""
    if ids := settings.args.input_ids:
        return [Prompt(i, ",".join(map(str, i))) for i in ids], settings.sampling
    continued, params = apply_chat(settings, texts, tokenizer)
    prompts = [
        Prompt(encode(tokenizer, whole, f"prompt {i}"), text)
        for i, (whole, text) in enumerate(zip(continued, texts, strict=True))
    ]
    return prompts, params


def fit_output_length(
    settings: Settings, max_positions: int, prompt: Prompt, params: SamplingParams
) -> SamplingParams:
    """The request's parameters; the default output length is capped to the remaining positions."""
    room = max_positions - len(prompt.ids)
    is_default = settings.sources["engine"]["max_output_length"] == "default"
    if settings.attention == "paged" and is_default and room > 0:
        return replace(params, max_new_tokens=min(params.max_new_tokens, room))
    return params


def is_demonstration(settings: Settings) -> bool:
    """Whether to run the demonstration prompts: the flash path without prompts from the user."""
    args = settings.args
    asked = args.input_texts or args.input_ids or args.wants_chat
    return settings.attention == "flash" and not asked


def demo_params(settings: Settings) -> SamplingParams:
    """The parameters of the demonstration prompts, which have their own defaults."""
    params = settings.sampling
    if settings.sources["engine"]["max_output_length"] == "default":
        params = replace(params, max_new_tokens=DEMO_MAX_NEW_TOKENS)
    if "repetition_penalty" not in settings.given:
        params = replace(params, repetition_penalty=DEMO_REPETITION_PENALTY)
    return params


def encode(tokenizer: Any, text: str, what: str) -> list[int]:
    """Token ids of a prompt, without added special tokens.

    Raises:
        ConfigError: the text is empty or not valid Unicode.
    """
    return list(tokenizer.encode(check_text(text, what), add_special_tokens=False))


def check_text(text: str, what: str) -> str:
    """Return `text`; raise ConfigError if it is empty or not valid Unicode."""
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
    """The content of the file or pipe called `word`; else the word itself."""
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
    """Whether `word` names a pipe or a terminal."""
    if word in STDIN_NAMES:
        return True
    path = find_file(word, what)
    return path is not None and not path.is_file()


def _decode(data: bytes, origin: str) -> str:
    if len(data) > MAX_PROMPT_BYTES:
        raise ConfigError(f"{origin} is longer than {MAX_PROMPT_BYTES >> 20} MiB")
    return decode_text(data, origin)


def find_file(word: str, what: str, world_size: int = 1) -> Path | None:
    """The file, pipe or terminal called `word`; None if there is none.

    Raises:
        ConfigError: `word` names something else, such as a folder or a closed descriptor, or a
            file in a folder without permission.
    """
    if not word:
        return None  # Path("") would be the current folder
    path = Path(word)
    descriptor = _DESCRIPTOR.fullmatch(word)
    if descriptor and world_size > 1:
        # The ranks do not inherit the shell's descriptors; torchrun, their parent, has them.
        path = Path(f"/proc/{os.getppid()}/fd/{descriptor[1]}")
    try:
        mode = path.stat().st_mode
    except PermissionError as error:
        if not _FILE_NAME.fullmatch(word):
            return None
        raise ConfigError(f"{what}, {word}, cannot be looked at: {error.strerror}") from error
    except (OSError, ValueError) as error:  # also for a name that is too long or has a NUL byte
        if not descriptor:
            return None
        raise ConfigError(f"{what}, {word}, is not open; give a file, or - and a pipe") from error
    if stat.S_ISDIR(mode):
        raise ConfigError(
            f"{what}, {word!r}, is a folder; name a file in it (to ask for the word itself, pipe "
            "it in: --input_texts -)"
        )
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        raise ConfigError(f"{what}, {word}, is not a file, pipe or terminal")
    return path
