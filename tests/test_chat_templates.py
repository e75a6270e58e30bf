# SPDX-License-Identifier: Apache-2.0
"""Chat templates: the documented prompts, transformers' rendering, and templates that mean harm."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from support.tokenizers import byte_level_tokenizer
from transformers import PreTrainedTokenizerFast

from gptneox import chat_templates
from gptneox.chat_templates import (
    NAMED,
    ChatTemplate,
    ChatTemplateError,
    find_template,
    render_chat,
)

Message = dict[str, Any]
HELLO = [{"role": "user", "content": "Hello!"}]
TALK = [
    *({"role": "user", "content": "Who is Alan Turing?"},),
    *({"role": "assistant", "content": "A mathematician."},),
    *({"role": "user", "content": "  Tell\nme {{ more }} 👍"},),
]
SYSTEM = {"role": "system", "content": "Be brief."}

# As the sources in chat_templates.py document them.
DOLLY = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nHello!\n\n### Response:\n"
)
STABLELM = """<|SYSTEM|># StableLM Tuned (Alpha version)
- StableLM is a helpful and harmless open-source AI language model developed by StabilityAI.
- StableLM is excited to be able to help the user, but will refuse to do anything that could be considered harmful to the user.
- StableLM is more than just an information source, StableLM is also able to write poetry, short stories, and make jokes.
- StableLM will refuse to participate in anything that could harm a human.
<|USER|>Hello!<|ASSISTANT|>"""  # noqa: E501
DOCUMENTED = {
    "dolly-v2": DOLLY,
    "oasst": "<|prompter|>Hello!<|endoftext|><|assistant|>",
    "redpajama-incite-chat": "<human>: Hello!\n<bot>:",
    "gpt-neoxt-chat": "<human>: Hello!\n<bot>:",
    "stablelm-tuned-alpha": STABLELM,
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(), eos_token="<|endoftext|>"
    )


def own(source: str, messages: list[Message] = HELLO) -> str:
    return render_chat(messages, ChatTemplate("own", source))


def test_the_documented_prompts() -> None:
    assert set(DOCUMENTED) == set(NAMED)
    for name, text in DOCUMENTED.items():
        assert render_chat(HELLO, find_template(name, None)) == text


def test_several_turns() -> None:
    more = "  Tell\nme {{ more }} 👍"
    texts = {name: render_chat(TALK, find_template(name, None)) for name in NAMED}
    assert texts["oasst"] == (
        "<|prompter|>Who is Alan Turing?<|endoftext|><|assistant|>A mathematician.<|endoftext|>"
        f"<|prompter|>{more}<|endoftext|><|assistant|>"
    )
    assert texts["gpt-neoxt-chat"] == texts["redpajama-incite-chat"]
    assert texts["gpt-neoxt-chat"] == (
        f"<human>: Who is Alan Turing?\n<bot>: A mathematician.\n<human>: {more}\n<bot>:"
    )
    assert texts["dolly-v2"].endswith(
        "\n\n### Instruction:\nWho is Alan Turing?\n\n### Response:\nA mathematician.\n\n"
        f"### End\n\n### Instruction:\n{more}\n\n### Response:\n"
    )
    assert texts["stablelm-tuned-alpha"].endswith(
        f"<|USER|>Who is Alan Turing?<|ASSISTANT|>A mathematician.<|USER|>{more}<|ASSISTANT|>"
    )


def test_system_messages() -> None:
    texts = {
        n: render_chat([SYSTEM, *HELLO], find_template(n, None)) for n in set(NAMED) - {"oasst"}
    }
    assert texts["dolly-v2"] == "Be brief.\n\n### Instruction:\nHello!\n\n### Response:\n"
    assert texts["gpt-neoxt-chat"] == "<human>: Be brief.\n<human>: Hello!\n<bot>:"
    assert texts["stablelm-tuned-alpha"] == "<|SYSTEM|>Be brief.\n<|USER|>Hello!<|ASSISTANT|>"
    developer = [SYSTEM | {"role": "developer"}, *HELLO]
    assert render_chat(developer, find_template("dolly-v2", None)) == texts["dolly-v2"]
    with pytest.raises(ChatTemplateError, match=r"oasst.*without system"):
        render_chat([SYSTEM, *HELLO], find_template("oasst", None))


@pytest.mark.parametrize("messages", [HELLO, TALK, [SYSTEM, *TALK]], ids=["one", "talk", "system"])
@pytest.mark.parametrize("name", NAMED)
def test_transformers_renders_the_same(
    name: str, messages: list[Message], tokenizer: PreTrainedTokenizerFast
) -> None:
    if name == "oasst" and messages[0] is SYSTEM:
        return
    expected = tokenizer.apply_chat_template(
        messages, chat_template=NAMED[name].source, tokenize=False, add_generation_prompt=True
    )
    # transformers does not keep a line feed at the very end of a template.
    expected += "\n" if NAMED[name].source.endswith(":\n") else ""
    assert render_chat(messages, find_template(name, tokenizer)) == expected


def test_where_a_template_comes_from(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = "{% for m in messages %}{{ m['role'] }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    names = r"dolly-v2, oasst, .*stablelm-tuned-alpha, or a file"
    for without in (tokenizer, None):
        with pytest.raises(
            ChatTemplateError, match=f"no chat template.*--chat_template: .*{names}"
        ):
            find_template("", without)
    with pytest.raises(ChatTemplateError, match=f"--chat_template doly is neither.*{names}"):
        find_template("doly", tokenizer)
    file = tmp_path / "a template.jinja"
    file.write_text(source, encoding="utf-8")
    from_file = find_template(str(file), tokenizer)
    assert render_chat(HELLO, from_file) == "user: Hello!<|endoftext|>"
    assert from_file.stop == ()
    own_tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer())
    for own_template in (source, {"tool_use": "x", "default": source}):
        own_tokenizer.chat_template = own_template
        assert render_chat(HELLO, find_template("", own_tokenizer)) == "user: Hello!"
    own_tokenizer.save_pretrained(tmp_path / "saved")
    named = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    is_apart = (tmp_path / "saved" / "chat_template.jinja").exists()  # not in transformers 4.48
    assert is_apart == ("chat_template" not in named)
    saved = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert render_chat(HELLO, find_template("", saved)) == "user: Hello!"


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "messages is empty"),
        (["Hello!"], r"messages\[0\] is 'Hello!'; an object"),
        ([{"role": "user"}], r"messages\[0\].content is None"),
        ([*HELLO, {"role": 1, "content": "x"}], r"messages\[1\].role is 1"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\].content is \["),
        ([{"role": "tool", "content": "x"}], "dolly-v2: dolly-v2 takes user and assistant"),
    ],
)
def test_messages_that_are_refused(messages: list[Message], named: str) -> None:
    with pytest.raises(ChatTemplateError, match=named):
        render_chat(messages, find_template("dolly-v2", None))


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("{% for %}", "line 1"),
        ("\n{{ x.", "line 2"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{{ messages[7].content }}", "undefined|no element"),
        ("{{ raise_exception('only users') }}", "only users"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|__class__"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe|__init__"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", "unsafe|__class__"),
        ("{{ 'x' * 10 }}", "numbers"),
        ("{{ 9 ** 9 }}", "numbers"),
        ("{{ range(10 * 100000) | list }}", "Range too big"),
        ("{% include 'x' %}", "no loader"),
        ("{{ 1 + 'x' }}", "unsupported operand"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_templates_that_are_wrong_or_mean_harm(source: str, named: str) -> None:
    with pytest.raises(ChatTemplateError, match=f"chat template own[:,] .*({named})") as error:
        own(source)
    assert "\n" not in str(error.value)


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_time_and_length_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In any thread; and what watches the thread besides is left as it was."""
    monkeypatch.setattr(chat_templates, "MAX_RENDER_S", 0.1)
    errors: list[str] = []

    def render() -> None:
        watch = lambda *_: None  # noqa: E731
        sys.settrace(watch)
        for source in (ENDLESS, "{% for i in range(9999) %}" + "x" * 9999 + "{% endfor %}"):
            try:
                own(source)
            except ChatTemplateError as error:
                errors.append(str(error))
        assert sys.gettrace() is watch
        sys.settrace(None)
        errors.append("ended")

    thread = threading.Thread(target=render)
    thread.start()
    thread.join()
    assert "more than 0.1 s" in errors[0]
    assert "characters" in errors[1]
    assert errors[2] == "ended"


def test_messages_are_data() -> None:
    """Braces in a message are not looked at, and a template cannot change the caller's messages."""
    messages = [{"role": "user", "content": "{{ 7 * 7 }}{% raw %}"}]
    assert own("{{ messages[0].content }}", messages) == "{{ 7 * 7 }}{% raw %}"
    assert own("{% set messages = [] %}{{ messages | length }}", messages) == "0"
    assert messages == [{"role": "user", "content": "{{ 7 * 7 }}{% raw %}"}]
