# SPDX-License-Identifier: Apache-2.0
"""`--interactive`: the prompt loop."""

from __future__ import annotations

from gptneox.cli import Settings
from gptneox.engine.loop import EngineLoop
from gptneox.engine.paged import PagedEngine
from gptneox.prompts import encode
from gptneox.terminal import Interrupts, LineEditor


def run(engine: PagedEngine, settings: Settings) -> None:
    """Read prompts and stream their continuations; prompts do not see earlier ones.

    Ctrl-C stops an answer; /exit or Ctrl-D ends the program. Only rank 0 reads.
    """
    loop = EngineLoop(engine)
    if engine.group.rank > 0:
        with Interrupts():
            loop.follow()
        return
    editor = LineEditor(settings.environment.state_home)
    print("Each line is continued by the model. Ctrl-C stops an answer, /exit ends.")
    with Interrupts() as interrupts:
        while True:
            with loop.idle():
                text = interrupts.read_line(editor)
            if text is None or text.strip() in ("/exit", "/quit"):
                loop.stop()
                return
            if not text:
                continue
            try:
                number = loop.add(encode(engine.tokenizer, text, "the prompt"), settings.sampling)
            except ValueError as error:
                print(f"error: {error}")
                continue
            _stream_answer(loop, number, interrupts)


def _stream_answer(loop: EngineLoop, number: int, interrupts: Interrupts) -> None:
    """Print an answer as it is generated, until it ends or Ctrl-C stops it."""
    end = ""
    while loop.has_work:
        if interrupts.pending and not end:
            loop.abort(number)
            end = " [stopped]"
        for _, completion in loop.round():
            print(completion.new_text, end="", flush=True)
            if completion.error:
                end = f"error: {completion.error}"
    interrupts.pending = False
    print(end)
