# SPDX-License-Identifier: Apache-2.0
"""`--interactive`: the prompt loop, and with `--chat` a conversation."""

from __future__ import annotations

from gptneox.chat_templates import ChatTemplate, find_template, render_chat
from gptneox.cli import Settings
from gptneox.engine.api import Engine
from gptneox.engine.loop import EngineLoop
from gptneox.engine.paged import PagedEngine
from gptneox.prompts import check_text, encode, stop_with
from gptneox.terminal import Interrupts, LineEditor


class _Conversation:
    """What the model continues after each line of the user."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        """Find the chat template, if one is wanted.

        Raises:
            ChatTemplateError: there is none.
        """
        self.tokenizer, self.params = engine.tokenizer, settings.sampling
        self.template: ChatTemplate | None = None
        self.messages: list[dict[str, str]] = []
        self._asked: dict[str, str] = {}
        if settings.args.wants_chat:
            self.template = find_template(settings.args.chat_template, engine.tokenizer)
            self.params = stop_with(settings.sampling, self.template)

    def ask(self, text: str) -> list[int]:
        """Token ids of the next prompt.

        Raises:
            ValueError: the text is not valid Unicode, or the template refuses it.
        """
        if self.template:
            self._asked = {"role": "user", "content": check_text(text, "the prompt")}
            text = render_chat([*self.messages, self._asked], self.template)
        return encode(self.tokenizer, text, "the prompt")

    def answer(self, text: str) -> None:
        """Keep the last question with its answer."""
        if self.template:
            self.messages += [self._asked, {"role": "assistant", "content": text.strip()}]


def run(engine: PagedEngine, settings: Settings) -> None:
    """Read prompts and stream their continuations; prompts do not see earlier ones.

    With --chat the lines are one conversation, until /new begins another. Ctrl-C stops an answer;
    /exit or Ctrl-D ends the program. Only rank 0 reads.

    Raises:
        ChatTemplateError: --chat without a template.
    """
    conversation = _Conversation(engine, settings)
    loop = EngineLoop(engine)
    if engine.group.rank > 0:
        with Interrupts():
            loop.follow()
        return
    editor = LineEditor(settings.environment.state_home)
    if conversation.template:
        print("Each line is answered. Ctrl-C stops an answer, /new begins anew, /exit ends.")
    else:
        print("Each line is continued by the model. Ctrl-C stops an answer, /exit ends.")
    with Interrupts() as interrupts:
        while True:
            with loop.idle():
                text = interrupts.read_line(editor)
            if text is None or text.strip() in ("/exit", "/quit"):
                loop.stop()
                return
            if conversation.template and text.strip() == "/new":
                conversation.messages.clear()
                continue
            if not text:
                continue
            try:
                number = loop.add(conversation.ask(text), conversation.params)
            except ValueError as error:
                print(f"error: {error}")
                continue
            conversation.answer(_stream_answer(loop, number, interrupts))


def _stream_answer(loop: EngineLoop, number: int, interrupts: Interrupts) -> str:
    """Print an answer as it is generated, until it ends or Ctrl-C stops it; returns it."""
    end, pieces = "", []
    while loop.has_work:
        if interrupts.pending and not end:
            loop.abort(number)
            end = " [stopped]"
        for _, completion in loop.round():
            print(completion.new_text, end="", flush=True)
            pieces.append(completion.new_text)
            if completion.error:
                end = f"error: {completion.error}"
    interrupts.pending = False
    print(end)
    return "".join(pieces)
