"""The way to an engine and back: one request, at most two tries, every byte of a stream passed on as it comes.

A try may be repeated only while the client has received nothing. So the client's headers are sent together with the
first whole event, not before. After that a lost replica ends the stream with an error event and without `[DONE]`:
a stream never just stops. The client's going away cancels the handler, and that closes the engine's connection, which
aborts the generation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import aiohttp
from aiohttp import web

from fastserve.gateway import answers
from fastserve.gateway.answers import Refusal
from fastserve.gateway.exchange import Exchange
from fastserve.gateway.requests import Inward
from fastserve.gateway.routes import Choice, Router
from fastserve.gateway.sse import EventCutter, usage_tokens

TRIES = 2
PAUSE_SECONDS = 0.6
"""Before the same target is tried again: a replica whose engine died is gone after about 0.4 s, and then Serve holds
the request until the next one is up."""

CONNECT_SECONDS = 5.0
KEEP_ALIVE_SECONDS = 4.0
"""Shorter than any server's own (uvicorn: 5 s), so that no request is sent into a connection just being closed."""

RETRIED = frozenset((500, 502, 503))
LONGEST_ERROR_BYTES = 16 * 2**20
"""FastAPI repeats the whole input in its error."""

LONGEST_ANSWER_BYTES = 256 * 2**20
_STREAM_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Lost(Exception):
    """A try failed before the client had received anything; never leaves this module.

    refusal: what the client is told when there is no further try.
    """

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads from an engine; its failures become Lost, so that they are never mixed up with the client's."""

    answer: aiohttp.ClientResponse

    async def some(self) -> bytes:
        """Bytes as they come; b'' at the end."""
        return await _or_lost(self.answer.content.readany)

    async def all(self, most: int) -> bytes:
        """The whole body, if it has at most `most` bytes."""
        parts: list[bytes] = []
        left = most
        while piece := await self.some():
            parts.append(piece)
            left -= len(piece)
            if left < 0:
                raise Lost(answers.unreachable())
        return b"".join(parts)


async def _or_lost(read: Callable[[], Awaitable[bytes]]) -> bytes:
    try:
        return await read()
    except (aiohttp.ClientError, OSError) as error:
        raise Lost(answers.unreachable()) from error


class Proxy:
    """Sends requests to the targets that the router chooses."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept-Encoding"),
        )

    async def close(self) -> None:
        """Close idle connections."""
        await self._session.close()

    async def answer(self, exchange: Exchange, inward: Inward) -> web.StreamResponse:
        """Ask an engine and pass its answer on.

        Raises Refusal when there is no engine, when both tries were lost, or with the engine's own refusal.
        """
        tried: list[str] = []
        lost = Lost(answers.model_not_ready(inward.model))
        for _ in range(TRIES):
            choice = self._router.choose(inward.model, tried)
            if choice is None:
                break
            if choice.target in tried:
                await asyncio.sleep(PAUSE_SECONDS)
            tried.append(choice.target)
            exchange.revision = choice.revision
            exchange.tries = len(tried)
            try:
                with self._router.lease(choice.target):
                    return await self._try(exchange, inward, choice)
            except Lost as error:
                lost = error
        raise lost.refusal

    async def _try(self, exchange: Exchange, inward: Inward, choice: Choice) -> web.StreamResponse:
        headers = {"Content-Type": "application/json", "X-Request-Id": exchange.id}
        url = choice.target + inward.path
        request = self._session.post(url, data=inward.body, headers=headers, allow_redirects=False)
        try:
            answer = await request
        except (aiohttp.ClientError, OSError) as error:
            raise Lost(answers.unreachable()) from error
        async with answer:
            kind = answer.headers.get("Content-Type", "").lower()
            if answer.status != 200:
                body = await _Reader(answer).all(LONGEST_ERROR_BYTES)
                refusal = answers.translate(answer.status, kind, body, inward.model)
                if answer.status in RETRIED or refusal.code == "model_not_ready":
                    raise Lost(refusal)
                raise refusal
            if kind.startswith("text/event-stream"):
                return await self._stream(exchange, _Reader(answer))
            if not kind.startswith("application/json"):
                raise answers.translate(502, kind, b"", inward.model)
            return await self._whole(exchange, _Reader(answer))

    async def _whole(self, exchange: Exchange, reader: _Reader) -> web.StreamResponse:
        body = await reader.all(LONGEST_ANSWER_BYTES)
        exchange.tokens = usage_tokens(body)
        response = web.Response(body=body, content_type="application/json", headers=exchange.headers())
        exchange.begin(response)
        return response

    async def _stream(self, exchange: Exchange, reader: _Reader) -> web.StreamResponse:
        cutter = EventCutter()
        events = b""
        while not events:
            chunk = await reader.some()
            events = cutter.feed(chunk) if chunk else cutter.finish()
            if not chunk and not events:
                raise Lost(answers.unreachable())
        response = web.StreamResponse(headers={**_STREAM_HEADERS, **exchange.headers()})
        exchange.begin(response)
        try:
            await response.prepare(exchange.request)
            await response.write(events)
            await self._pass_on(cutter, reader, response)
        finally:
            exchange.tokens = cutter.tokens
        return response

    async def _pass_on(self, cutter: EventCutter, reader: _Reader, response: web.StreamResponse) -> None:
        """The hot loop: everything that costs here is paid once a token."""
        some, feed, write = reader.answer.content.readany, cutter.feed, response.write
        while True:
            try:
                chunk = await some()
            except (aiohttp.ClientError, OSError):
                break
            if not chunk:
                events = cutter.finish()
                if events:
                    await write(events)
                break
            events = feed(chunk)
            if events:
                await write(events)
            elif cutter.overfull:
                break
        if not cutter.done:
            raise answers.upstream_lost()
