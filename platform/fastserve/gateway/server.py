"""The HTTP server under the gateway: aiohttp's low-level one, with our answers to what is not HTTP.

aiohttp answers a torn request line or an inner error in plain text; clients read JSON. Its limits are set here in one
place: header lines 8 KiB, 64 headers, 75 s for a connection to send its request.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from fastserve.gateway.answers import Refusal

IDLE_SECONDS = 75.0
LINGER_SECONDS = 2.0
LONGEST_LINE_BYTES = 8190
MOST_HEADERS = 64

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


def json_answer(refusal: Refusal, headers: Mapping[str, str]) -> web.Response:
    """A refusal as an answer."""
    return web.Response(
        status=refusal.status,
        body=refusal.body,
        content_type="application/json",
        headers={**headers, **refusal.headers},
    )


class _Connection(RequestHandler):
    """One client's connection."""

    __slots__ = ()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """What to answer when there is no handler to ask: the request is not HTTP, or the handler broke."""
        if status < 500:
            refusal = Refusal(status, "The request is not well-formed HTTP.", code="invalid_http")
        else:
            self.log_exception("a request broke the gateway", exc_info=exc)
            refusal = Refusal(status, "The gateway failed; its log says why.", code="internal_error")
        response = json_answer(refusal, {"X-Request-Id": f"req-{secrets.token_hex(12)}"})
        response.force_close()
        return response


class HttpServer(web.Server):
    """Makes a connection object for each client."""

    def __init__(self, handler: Handler, idle_seconds: float = IDLE_SECONDS) -> None:
        super().__init__(handler, handler_cancellation=True)
        self._idle_seconds = idle_seconds
        self._loop_in_use = asyncio.get_running_loop()

    def __call__(self) -> RequestHandler:
        """A fresh connection."""
        limits: dict[str, Any] = {
            "keepalive_timeout": self._idle_seconds,
            "lingering_time": LINGER_SECONDS,
            "max_line_size": LONGEST_LINE_BYTES,
            "max_field_size": LONGEST_LINE_BYTES,
            "max_headers": MOST_HEADERS,
            "auto_decompress": False,
            "access_log": None,
        }
        return _Connection(self, loop=self._loop_in_use, **limits)

    async def go_on(self, request: web.BaseRequest) -> None:
        """Tell a client that waits for `100 Continue` to send its body."""
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0
