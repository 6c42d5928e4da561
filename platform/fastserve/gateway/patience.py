"""What the client of a stream gets while it waits for the first event: a comment now and then.

Proxies and clients give up on connections that are silent. So after a second of waiting the answer's headers go out
with a comment, and then a comment every ten seconds. Comments are all that is sent: OpenAI clients break on other
lines than `data:` (a blank event after `id:`, `retry:` or `event:` is read as JSON), and while a client has only
comments another replica may still be asked.
"""

from __future__ import annotations

import asyncio
import contextlib

from aiohttp import web

from fastserve.gateway.exchange import Exchange

FIRST_SECONDS = 1.0
EVERY_SECONDS = 10.0
COMMENT = b": waiting\n\n"
STREAM_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Patience:
    """Comments on one stream, from its creation until `end`."""

    __slots__ = ("_every_seconds", "_exchange", "_task", "_timer", "_writing")

    def __init__(self, exchange: Exchange, first_seconds: float, every_seconds: float) -> None:
        self._exchange = exchange
        self._every_seconds = every_seconds
        self._task: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()
        self._timer = asyncio.get_running_loop().call_later(first_seconds, self._begin)

    async def end(self) -> None:
        """Send no further comment; one that is just being sent is sent whole."""
        self._timer.cancel()
        if self._task is None:
            return
        try:
            async with self._writing:
                pass
        finally:
            self._task.cancel()

    def _begin(self) -> None:
        self._task = asyncio.create_task(self._comment())

    async def _comment(self) -> None:
        # A client that is gone ends the request's own task; there is nothing to say here.
        with contextlib.suppress(ConnectionError):
            while True:
                async with self._writing:
                    response = self._exchange.response
                    if response is None:
                        headers = self._exchange.headers(answered=False)
                        response = web.StreamResponse(headers={**STREAM_HEADERS, **headers})
                        self._exchange.begin(response)
                        await response.prepare(self._exchange.request)
                    await response.write(COMMENT)
                await asyncio.sleep(self._every_seconds)
