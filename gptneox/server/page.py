# SPDX-License-Identifier: Apache-2.0
"""The page at /: a playground for a browser, in the one file page.html."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from starlette.responses import HTMLResponse, Response

PATH = "/"
_FILE = Path(__file__).with_name("page.html")
_INLINE = re.compile("<(style|script)>(.*?)</\\1>", re.DOTALL)


class Page:
    """The page, and the headers that keep everything but its own code out of it."""

    def __init__(self, *, has_chat: bool) -> None:
        """Read the page.

        Args:
            has_chat: whether it offers conversations.
        """
        html = _FILE.read_text(encoding="utf-8")
        self._html = html.replace('data-chat="no"', 'data-chat="yes"') if has_chat else html
        self._headers = {
            "content-security-policy": content_security_policy(html),
            "cache-control": "no-cache",
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
        }

    async def show(self) -> Response:
        """The playground, for a browser. Needs no key; what it asks the service for does."""
        return HTMLResponse(self._html, headers=self._headers)


def content_security_policy(html: str) -> str:
    """The policy for a page that has its own style and script in it.

    It allows those, by their hashes, and requests to where the page came from. Text cannot become
    HTML, because Trusted Types refuse all of it. Source: W3C, Content Security Policy Level 3.
    """
    hashes: dict[str, list[str]] = {"style": [], "script": []}
    for kind, text in _INLINE.findall(html):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {' '.join(hashes['script'])}",
            f"style-src {' '.join(hashes['style'])}",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )
