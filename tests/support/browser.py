# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium, driven over its DevTools protocol through two pipes.

Source: the Chrome DevTools Protocol; with --remote-debugging-pipe the browser reads messages from
descriptor 3 and writes to descriptor 4, each ended by a zero byte.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",  # root, as in a container, has none
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-proxy-server",
    "--remote-debugging-pipe",
)
_KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowRight": 39, "End": 35}


def browser_path() -> str:
    """The browser on this machine; empty if there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), "")


class Page:
    """One tab."""

    def __init__(self, reader: asyncio.StreamReader, output: int) -> None:
        self._reader, self._output = reader, output
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._session = ""
        self._loaded: dict[str, asyncio.Event] = {}  # by the identifier of a navigation
        self.complaints: list[str] = []  # of the console, blocked things and exceptions among them

    async def read(self) -> None:
        """Take what the browser says, until it ends."""
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                message = json.loads((await self._reader.readuntil(b"\0"))[:-1])
                if "id" in message:
                    self._waiting.pop(message["id"]).set_result(message)
                elif message["method"] == "Page.lifecycleEvent":
                    if message["params"]["name"] == "load":
                        self._load_of(message["params"]["loaderId"]).set()
                elif message["method"] == "Log.entryAdded":
                    entry = message["params"]["entry"]
                    self.complaints.append(f"{entry['level']}: {entry['text']}")
                elif message["method"] == "Runtime.exceptionThrown":
                    details = message["params"]["exceptionDetails"]
                    text = details.get("exception", {}).get("description", details["text"])
                    self.complaints.append(f"exception: {text}")

    async def call(self, method: str, **params: Any) -> Any:
        """The result of a command."""
        message: dict[str, Any] = {"id": next(self._numbers), "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        waiting = self._waiting[message["id"]] = asyncio.get_running_loop().create_future()
        os.write(self._output, json.dumps(message).encode() + b"\0")
        answer = await asyncio.wait_for(waiting, 60)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    async def attach(self) -> None:
        """Open the tab."""
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        await self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def _load_of(self, navigation: str) -> asyncio.Event:
        return self._loaded.setdefault(navigation, asyncio.Event())

    async def goto(self, url: str) -> None:
        """Load a page, anew if it is there already.

        The browser says when that is done. To ask the page would fail where it is being replaced.
        """
        navigation = await self.call("Page.navigate", url=url)
        assert "errorText" not in navigation, navigation["errorText"]
        await asyncio.wait_for(self._load_of(navigation["loaderId"]).wait(), 60)

    async def get(self, expression: str) -> Any:
        """The value of an expression in the page."""
        result = await self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    async def until(self, expression: str, timeout: float = 30) -> Any:
        """Wait until an expression is true; returns its value."""
        end = time.monotonic() + timeout
        while not (value := await self.get(expression)):
            text = await self.get("document.body.innerText")
            assert time.monotonic() < end, f"{expression} stays false on: {text}"
            await asyncio.sleep(0.02)
        return value

    async def text(self, selector: str) -> str:
        """The text of an element."""
        return await self.get(f"document.querySelector({json.dumps(selector)}).textContent")

    async def click(self, selector: str) -> None:
        """Click the middle of an element."""
        place = await self.get(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'center'}); const r = e.getClientRects()[0]; "
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            await self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=place[0],
                y=place[1],
                button="none" if kind == "mouseMoved" else "left",
                clickCount=1,
            )

    async def write(self, selector: str, text: str) -> None:
        """Put the cursor into a field, empty it, and type."""
        found = json.dumps(selector)
        await self.get(
            f"document.querySelector({found}).focus(), document.querySelector({found}).select()"
        )
        await self.call("Input.insertText", text=text)

    async def press(self, key: str, modifiers: int = 0) -> None:
        """Press a key; modifiers: 2 for Ctrl, 8 for Shift."""
        for kind in ("keyDown", "keyUp"):
            more = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            await self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=_KEYS[key],
                modifiers=modifiers,
                **more,
            )

    async def screenshot(self, path: Path, width: int, height: int, *, dark: bool = False) -> None:
        """Write a PNG of the page."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        picture = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(picture["data"]))


@contextlib.asynccontextmanager
async def open_browser(profile: Path) -> AsyncIterator[Page]:
    """A browser with one tab; it ends with the block.

    Args:
        profile: an empty folder for it.
    """
    ours_in, theirs_out = os.pipe()
    theirs_in, ours_out = os.pipe()
    inherited = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]
    for fd in (theirs_in, theirs_out):
        os.close(fd)
    moved = 'exec "$@" 3<&{} 4>&{}'.format(*inherited)
    command = [browser_path(), *FLAGS, f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        ["bash", "-c", moved, "bash", *command], pass_fds=inherited, stderr=subprocess.DEVNULL
    )
    for fd in inherited:
        os.close(fd)
    reader = asyncio.StreamReader(limit=1 << 26)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours_in, "rb")
    )
    page = Page(reader, ours_out)
    reading = asyncio.create_task(page.read())
    try:
        await page.attach()
        yield page
    finally:
        reading.cancel()
        transport.close()
        os.close(ours_out)  # the browser ends with its pipe
        try:
            await asyncio.to_thread(process.wait, 10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
