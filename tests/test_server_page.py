# SPDX-License-Identifier: Apache-2.0
"""server/page.py: what the page at / is sent with; and, in a headless browser, what it does."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import Awaitable, Callable
from html.parser import HTMLParser
from math import exp
from pathlib import Path
from typing import Any

import pytest
from support.browser import Page, browser_path, open_browser
from support.service import LIMITS, Stub, ask, eventually, run_with

from gptneox.engine.sequence import TokenLogprobs
from gptneox.server.service import OnOutput
from gptneox.server.wire import Output

ANGRY = '<img src=x onerror="document.title=1"><script>document.title=2</script>'


class Contents(HTMLParser):
    """Inline styles and scripts, and the values of all attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.inline: dict[str, list[str]] = {"style": [], "script": []}
        self.attributes: list[tuple[str, str]] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag if tag in self.inline else ""
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.inline[self._inside].append(data)


def test_the_page_is_allowed_its_own_code_and_nothing_else() -> None:
    async def go(served: Stub) -> None:
        answer = await ask(served, "/")
        assert answer.status == 200
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        pairs = (
            part.partition(" ") for part in answer.headers["content-security-policy"].split("; ")
        )
        policy = {name: value.split() for name, _, value in pairs}
        assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == ["'none'"]
        assert policy["frame-ancestors"] == policy["trusted-types"] == ["'none'"]
        assert policy["connect-src"] == ["'self'"]
        page = Contents(answer.body.decode())
        for kind, texts in page.inline.items():
            assert len(texts) == 1
            digest = base64.b64encode(hashlib.sha256(texts[0].encode()).digest()).decode()
            assert policy[f"{kind}-src"] == [f"'sha256-{digest}'"]
        names = {name for name, _ in page.attributes}
        assert not names & {"src", "style"}
        assert not [name for name in names if name.startswith("on")]
        links = [value for name, value in page.attributes if name == "href"]
        assert all(link.startswith("data:") for link in links)

    run_with(go)


def test_the_page_alone_needs_no_key() -> None:
    async def go(served: Stub) -> None:
        assert (await ask(served, "/")).status == 200
        assert (await ask(served, "/llm/")).status == 200
        for method in ("POST", "PUT", "OPTIONS", "HEAD"):
            assert (await ask(served, "/", method=method)).status == 401
        for path in ("//", "/?", "/page.html", "/v1/models", "/llm", "/llm/v1/models"):
            expected = 200 if path == "/?" else 401
            assert (await ask(served, path)).status == expected, path

    run_with(go, keys=["secret"], root_path="/llm")


@pytest.mark.parametrize("template", ["", "dolly-v2"])
def test_conversations_are_offered_where_there_is_a_template(template: str) -> None:
    async def go(served: Stub) -> None:
        html = (await ask(served, "/")).body.decode()
        assert re.findall('<html.* data-chat="(.*)">', html) == ["yes" if template else "no"]

    run_with(go, template=template)


# -- in a browser --------------------------------------------------------------------------------

Visit = Callable[[Stub, Page], Awaitable[None]]


def in_browser(function: Callable[..., None]) -> Callable[..., None]:
    """A slow test that needs a browser."""
    reason = "no Chromium; on Debian: apt install chromium-headless-shell"
    return pytest.mark.slow(pytest.mark.skipif(not browser_path(), reason=reason)(function))


@pytest.fixture
def visit(tmp_path: Path) -> Callable[..., None]:
    """Runs a visit to a stub in a browser, which must not complain about anything else."""

    def run(
        function: Visit, *, complaints: str = "^$", is_loading: bool = False, **settings: Any
    ) -> None:
        async def go(served: Stub) -> None:
            if is_loading:
                served.engine.limits = None
            async with open_browser(tmp_path / "profile") as page:
                await page.goto(f"http://127.0.0.1:{served.port}/")
                await function(served, page)
                assert [c for c in page.complaints if not re.search(complaints, c)] == []
                assert await page.get("document.title") == "GPT-NeoX"

        run_with(go, **settings)

    return run


async def send(page: Page, prompt: str) -> None:
    """Type a prompt, press Ctrl+Enter, and wait for the end."""
    await page.until("document.querySelector('#model').options.length")
    await page.write("#prompt", prompt)
    await page.press("Enter", modifiers=2)
    ended = "document.querySelector('#progress').textContent"
    await page.until(f"/^(done|failed|stopped)$/.test({ended})")


@in_browser
def test_an_answer_is_shown_token_by_token_with_its_alternatives(visit: Any) -> None:
    async def look(served: Stub, page: Page) -> None:
        vocabulary = served.application.context.vocabulary

        def script(number: int, on_output: OnOutput) -> None:
            emoji = vocabulary.tokenizer.encode("\U0001f600", add_special_tokens=False)
            letters = [TokenLogprobs(i, p, {i: p, 70: -3.0}) for i, p in ((66, -0.1), (67, -2.5))]
            parts = [TokenLogprobs(i, -0.5, {i: -0.5}) for i in emoji]
            text = "".join(vocabulary.token_text(e.token_id) for e in letters)
            on_output(Output(number, text, 2, [66, 67], letters))
            on_output(Output(number, "\U0001f600", len(emoji), emoji, parts))
            on_output(
                Output(
                    number, num_tokens=1, finish_reason="stop", end_id=0,
                    end_logprob=TokenLogprobs(0, -0.2, {0: -0.2}),
                )
            )  # fmt: skip

        served.engine.script = script
        await page.write("#seed", "7")
        await page.write("#max_tokens", "9")
        await page.write("#top_k", "5")
        await page.write("#stop_strings", "\\n\\n\nEND\\\\n")
        await send(page, ANGRY)
        prompt, params = served.engine.added[0]
        assert vocabulary.decode(prompt) == ANGRY
        assert (params.seed, params.top_k, params.max_new_tokens) == (7, 5, 9)
        assert (params.stop, params.logprobs) == (("\n\n", "END\\n"), 5)
        assert await page.text("#answer .given") == ANGRY
        assert not await page.get("document.querySelector('#answer img')")
        shown = await page.get(
            "[...document.querySelectorAll('.token')].map(t => "
            "[t.textContent, +t.style.getPropertyValue('--p')])"
        )
        texts = [text for text, _ in shown]
        names = [vocabulary.token_text(i) for i in (66, 67)]
        assert texts == [*names, "\U0001f600", "<|endoftext|>"]
        num_parts = len(vocabulary.tokenizer.encode("\U0001f600"))
        likely = [exp(-0.1), exp(-2.5), exp(-0.5 * num_parts), exp(-0.2)]
        assert [p for _, p in shown] == pytest.approx(likely, abs=1e-3)
        assert "ended by itself" in await page.text("#numbers")
        # by the keyboard alone
        await page.get("document.querySelector('.token').focus()")
        assert await page.get("!document.querySelector('#popover').hidden")
        await page.press("ArrowRight")
        rows = await page.get(
            "[...document.querySelectorAll('#popover tr')]"
            ".map(r => r.innerText.trim() + r.className)"
        )
        other = vocabulary.token_text(70)
        assert rows == [f"{names[1]}\t8.2 %chosen", f"{other}\t5.0 %"]
        await page.press("End")
        assert "<|endoftext|>" in await page.text("#popover")
        assert await page.get("document.querySelectorAll('.token[tabindex=\"0\"]').length") == 1
        await page.press("Escape")
        assert await page.get("document.querySelector('#popover').hidden")
        await page.click("#more")
        prompt = await page.get("document.querySelector('#prompt').value")
        assert prompt == ANGRY + "".join(texts[:-1])

    visit(look)


@in_browser
def test_stop_ends_the_request_in_the_engine(visit: Any) -> None:
    async def look(served: Stub, page: Page) -> None:
        await page.until("document.querySelector('#model').options.length")
        await page.click("#colour")
        await page.write("#max_tokens", "100")
        await page.write("#prompt", "hi")
        await page.click("#run")
        await page.until("document.querySelector('#answer').textContent.startsWith('hiabc')")
        served.engine.is_held = True  # however slow the browser is, the answer has not ended yet
        assert served.service.num_open == 1
        assert await page.get("document.querySelector('#run').disabled")
        await page.press("Escape")
        await eventually(lambda: served.engine.aborted == [0])
        await page.until("document.querySelector('#progress').textContent === 'stopped'")
        assert served.service.num_open == 0
        text = await page.text("#answer")
        assert served.engine.added[0][1].logprobs is None
        assert await page.get("!document.querySelector('.token')")
        assert "new tokens" in await page.text("#numbers")
        served.engine.is_held = False
        await asyncio.sleep(0.3)
        assert await page.text("#answer") == text
        await page.click("#run")
        await page.until("document.querySelector('#answer').textContent.startsWith('hiab')")
        await page.click("#stop")
        await eventually(lambda: served.engine.aborted == [0, 1])

    visit(look, step_s=0.05)


@in_browser
def test_a_key_is_asked_for_and_errors_are_shown(visit: Any) -> None:
    async def look(served: Stub, page: Page) -> None:
        await page.until("!document.querySelector('#key-form').hidden")
        assert "401" in await page.text("#error")
        assert await page.get("document.activeElement.id") == "key"
        await page.write("#key", "wr\u00f6ng")
        await page.press("Enter")
        await page.write("#key", "\u30ad\u30fc")
        await page.press("Enter")
        await page.until("document.querySelector('#error').hidden")
        await page.write("#max_tokens", "4")
        await page.write("#stop_strings", "x" * 600)
        await send(page, "hi")
        assert "400: stop: at most 512 characters" in await page.text("#error")
        assert re.search(r"\(request [0-9a-f]{32}\)", await page.text("#error"))
        await page.write("#stop_strings", " ")

        def script(number: int, on_output: OnOutput) -> None:
            on_output(Output(number, "a", 1, [66], [TokenLogprobs(66, -0.1, {})]))
            on_output(Output(number, finish_reason="error", error="NaN"))

        served.engine.script = script
        await send(page, "hi")
        assert "not finite numbers" in await page.text("#error")
        assert await page.text("#progress") == "failed"
        kept = "document.cookie + JSON.stringify([localStorage, sessionStorage])"
        assert await page.get(kept) == "[{},{}]"
        await page.goto(f"http://127.0.0.1:{served.port}/")
        await page.until("!document.querySelector('#key-form').hidden")
        assert await page.get("document.querySelector('#key').value") == ""

    visit(look, keys=["\u30ad\u30fc"], complaints="status of 40[01]")


@in_browser
def test_typing_goes_on_where_it_began_when_the_models_arrive(visit: Any) -> None:
    async def look(served: Stub, page: Page) -> None:
        await page.write("#seed", "1")
        served.engine.limits = LIMITS  # only now is the service ready, which the page asks for
        await page.until("document.querySelector('#model').options.length")
        assert await page.get("document.activeElement.id") == "seed"
        await page.get("document.activeElement.blur()")
        await page.get("findModels()")
        assert await page.get("document.activeElement.id") == "prompt"

    visit(look, is_loading=True, complaints="status of 503")


@in_browser
def test_a_late_answer_about_an_older_key_changes_nothing(visit: Any) -> None:
    async def look(served: Stub, page: Page) -> None:
        await page.until("!document.querySelector('#key-form').hidden")
        await page.get(
            "window.answers = [], window.fetch = () => new Promise(r => answers.push(r)), 0"
        )
        await page.write("#key", "wrong")
        await page.press("Enter")
        await page.write("#key", "secret")
        await page.press("Enter")
        await page.until("answers.length === 2")
        models = "new Response(JSON.stringify({data: [{id: 'm', max_model_len: 9}]}))"
        await page.get(f"answers[1]({models}), 0")
        await page.until("document.querySelector('#model').options.length")
        await page.get("answers[0](new Response('{}', {status: 401})), 0")
        await asyncio.sleep(0.2)
        assert await page.get("document.querySelector('#error').hidden")
        assert await page.text("#state") == "m, context of 9 tokens"
        assert await page.get("document.activeElement.id") == "prompt"

    visit(look, keys=["secret"], complaints="status of 401")


@in_browser
def test_a_conversation_goes_on(visit: Any, tmp_path: Path) -> None:
    async def look(served: Stub, page: Page) -> None:
        await page.until("document.querySelector('#model').options.length")
        assert await page.get("!document.querySelector('#tabs').hidden")
        await page.get("document.querySelector('#tab-completion').focus()")
        await page.press("ArrowRight")
        assert await page.get("document.activeElement.id") == "tab-chat"
        await page.write("#max_tokens", "3")
        for count in (1, 2):
            await page.write("#prompt", ANGRY[:20])
            await page.press("Enter")
            await page.until(f"document.querySelectorAll('.message .token').length === {3 * count}")
            await page.until("document.querySelector('#progress').textContent === 'done'")
        shown = await page.get("[...document.querySelectorAll('.message')].map(m => m.textContent)")
        assert shown == [f"user{ANGRY[:20]}", "assistantabc"] * 2
        decode = served.application.context.vocabulary.decode
        first, second = (decode(prompt) for prompt, _ in served.engine.added)
        assert (first, second) == (f"u{ANGRY[:20]}", f"u{ANGRY[:20]}aabcu{ANGRY[:20]}")
        await page.click("#fresh")
        assert await page.text("#answer") == ""

    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.role[0] + m.content }}{% endfor %}")
    visit(look, template=str(template))
