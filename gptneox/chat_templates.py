# SPDX-License-Identifier: Apache-2.0
"""Chat templates: from messages to the text that a tuned model continues.

A template is Jinja, as in transformers. It comes from the model's tokenizer, from a file, or from
`NAMED`, because the tuned GPT-NeoX models were published without one. It never comes from a client:
clients send messages alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import jinja2  # torch requires it
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gptneox.config.errors import ConfigError
from gptneox.config.files import read_text

MAX_RENDER_S = 2.0  # a template takes milliseconds
MAX_LENGTH = 4 << 20  # characters of a rendered chat, far beyond the positions of any model
# What a template can raise beside Jinja's own errors.
_FAULTS = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError)


class ChatTemplateError(ConfigError):
    """There is no template, it is wrong, or it refuses the messages."""


@dataclass(frozen=True)
class _Named:
    """A template of `NAMED`."""

    source: str
    stop: tuple[str, ...] = ()  # with what the next turn begins


# Source: databricks/dolly, training/consts.py; "### End" is a special token of the dolly-v2 models.
# They were tuned on single turns; further ones repeat the form of the training records.
_DOLLY = """\
{% if messages[0].role == 'system' %}
{{ messages[0].content }}
{% set messages = messages[1:] %}
{% else %}
Below is an instruction that describes a task. Write a response that appropriately completes \
the request.
{% endif %}

{% for message in messages %}
{% if message.role == 'user' %}
### Instruction:
{{ message.content }}

{% elif message.role == 'assistant' %}
### Response:
{{ message.content }}

### End

{% else %}
{{ raise_exception('dolly-v2 takes user and assistant messages, and a system message first') }}
{% endif %}
{% endfor %}
### Response:
"""

# Source: model cards of OpenAssistant/oasst-sft-1-pythia-12b and oasst-sft-4-pythia-12b-epoch-3.5.
_OASST = """\
{% for message in messages %}
{% if message.role == 'user' %}
{{- '<|prompter|>' + message.content + '<|endoftext|>' -}}
{% elif message.role == 'assistant' %}
{{- '<|assistant|>' + message.content + '<|endoftext|>' -}}
{% else %}
{{ raise_exception('oasst takes user and assistant messages; it was tuned without system ones') }}
{% endif %}
{% endfor %}
{{- '<|assistant|>' -}}
"""

# Source: model cards of togethercomputer/GPT-NeoXT-Chat-Base-20B and RedPajama-INCITE-Chat-3B-v1;
# OpenChatKit, inference/conversation.py, for several turns and for context, a turn of the human.
_TOGETHER = """\
{% for message in messages %}
{% if message.role in ('user', 'system') %}
<human>: {{ message.content }}
{% elif message.role == 'assistant' %}
<bot>: {{ message.content | trim }}
{% else %}
{{ raise_exception('this template takes system, user and assistant messages') }}
{% endif %}
{% endfor %}
{{- '<bot>:' -}}
"""
_TOGETHER_STOP = ("\n<human>:", "<human>:")

# Source: model card of stabilityai/stablelm-tuned-alpha-7b, with its stop ids 50277 to 50279 and 1.
_STABLELM = """\
{% if messages[0].role == 'system' %}
<|SYSTEM|>{{ messages[0].content }}
{% set messages = messages[1:] %}
{% else %}
<|SYSTEM|># StableLM Tuned (Alpha version)
- StableLM is a helpful and harmless open-source AI language model developed by StabilityAI.
- StableLM is excited to be able to help the user, but will refuse to do anything that could be \
considered harmful to the user.
- StableLM is more than just an information source, StableLM is also able to write poetry, short \
stories, and make jokes.
- StableLM will refuse to participate in anything that could harm a human.
{% endif %}
{% for message in messages %}
{% if message.role == 'user' %}
{{- '<|USER|>' + message.content -}}
{% elif message.role == 'assistant' %}
{{- '<|ASSISTANT|>' + message.content -}}
{% else %}
{{ raise_exception('stablelm takes user and assistant messages, and a system message first') }}
{% endif %}
{% endfor %}
{{- '<|ASSISTANT|>' -}}
"""

NAMED: Mapping[str, _Named] = {
    "dolly-v2": _Named(_DOLLY, ("### End",)),
    "oasst": _Named(_OASST, ("<|prompter|>",)),
    "redpajama-incite-chat": _Named(_TOGETHER, _TOGETHER_STOP),
    "gpt-neoxt-chat": _Named(_TOGETHER, _TOGETHER_STOP),
    "stablelm-tuned-alpha": _Named(
        _STABLELM, ("<|USER|>", "<|ASSISTANT|>", "<|SYSTEM|>", "<|padding|>")
    ),
}


class ChatTemplate:
    """A compiled template, and the stop strings that belong to it."""

    def __init__(
        self, name: str, source: str, tokenizer: Any = None, stop: tuple[str, ...] = ()
    ) -> None:
        """Compile a template.

        Args:
            name: for messages to the user.
            source: Jinja.
            tokenizer: gives the variables bos_token and eos_token.
            stop: strings that end an answer, besides end-of-text.

        Raises:
            ChatTemplateError: it is no valid Jinja.
        """
        self.name, self.stop = name, stop
        self._tokens = {
            key: getattr(tokenizer, key, None) or "" for key in ("bos_token", "eos_token")
        }
        with self._explained():
            self._template = _Sandbox().from_string(source)

    def render(self, messages: Seq[Mapping[str, str]]) -> str:
        """See `render_chat`."""
        variables = {"messages": list(messages), "add_generation_prompt": True, **self._tokens}
        pieces, length = [], 0
        with self._explained(), _deadline():
            for piece in self._template.generate(variables):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_LENGTH:
                    raise SecurityError(f"it makes more than {MAX_LENGTH} characters")
        return "".join(pieces)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Name the template in its errors."""
        try:
            yield
        except (jinja2.TemplateError, _TooSlow, *_FAULTS) as error:
            line = getattr(error, "lineno", None)
            place = f", line {line}" if line else ""
            text = str(error) or type(error).__name__
            raise ChatTemplateError(f"chat template {self.name}{place}: {text}") from error


def find_template(name: str, tokenizer: Any) -> ChatTemplate:
    """The template that --chat_template names; without a name, the model's own.

    Args:
        name: of `NAMED`, or a file with a template in Jinja; "" for that of the tokenizer.
        tokenizer: of the model; None if it has none.

    Raises:
        ChatTemplateError: there is none, or it is no valid Jinja.
        ConfigError, OSError: the file cannot be read.
    """
    if named := NAMED.get(name):
        return ChatTemplate(name, named.source, tokenizer, named.stop)
    choice = f"one of {', '.join(NAMED)}, or a file with a template in Jinja"
    if name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise ChatTemplateError(
                f"--chat_template {name} is neither a name nor a file: {choice}"
            )
        return ChatTemplate(str(path), read_text(path), tokenizer)
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):  # several of them by name
        own = own.get("default")
    if not own:
        raise ChatTemplateError(
            f"the model's tokenizer has no chat template; name one with --chat_template: {choice}"
        )
    return ChatTemplate("of the model's tokenizer", own, tokenizer)


def render_chat(messages: Seq[Mapping[str, Any]], template: ChatTemplate) -> str:
    """The text that ends where the assistant's next message begins.

    Args:
        messages: each with `role` and `content`, two strings; "developer" is a new name of
            "system". Other keys are ignored.
        template: see `find_template`. Its special tokens are part of the text, so it is encoded
            without adding any; see also its stop strings.

    Raises:
        ChatTemplateError: a message is no such mapping, the template refuses the messages, fails,
            or takes longer or makes more text than any that is meant well.
    """
    if not messages:
        raise ChatTemplateError("messages is empty; at least one message is expected")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ChatTemplateError(f"messages[{i}] is {message!r}; an object is expected")
        parts: dict[str, Any] = {key: message.get(key) for key in ("role", "content")}
        for key, value in parts.items():
            if not isinstance(value, str):
                raise ChatTemplateError(f"messages[{i}].{key} is {value!r}; a string is expected")
        if parts["role"] == "developer":
            parts["role"] = "system"
        checked.append(parts)
    return template.render(checked)


class _Sandbox(ImmutableSandboxedEnvironment):
    """As transformers' environment for chat templates, with limits."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            extensions=["jinja2.ext.loopcontrols"],
        )
        self.globals["raise_exception"] = _raise

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        """Numbers alone may be multiplied: `"x" * 10**9` would fill the memory in one step."""
        if operator == "**" or not all(isinstance(x, (int, float)) for x in (left, right)):
            raise SecurityError(f"{operator} is allowed for numbers in products alone")
        return super().call_binop(context, operator, left, right)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


class _TooSlow(RuntimeError):
    """A template took too long."""


@contextmanager
def _deadline() -> Iterator[None]:
    """Raise _TooSlow in Python code of this thread that runs for more than MAX_RENDER_S.

    Jinja compiles templates to Python, so its loops meet the trace function at every line.
    """
    end = time.monotonic() + MAX_RENDER_S

    def check(frame: FrameType, event: str, arg: Any) -> Any:
        if time.monotonic() > end:
            raise _TooSlow(f"it takes more than {MAX_RENDER_S:g} s")
        return check

    before = sys.gettrace()
    sys.settrace(check)
    try:
        yield
    finally:
        sys.settrace(before)
