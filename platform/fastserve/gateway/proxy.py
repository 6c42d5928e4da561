"""The way to an engine and back: one request, a few tries, every byte of a stream passed on as it comes.

A try may be repeated only while the client has received nothing but comments. After the first event a lost replica ends
the stream with an error event and without `[DONE]`: a stream never just stops. The client's going away cancels the
handler, and that closes the engine's connection, which aborts the generation.

How often a request is tried depends on what became of it. A target that took nothing (it refused the connection, or
Serve has no replica) costs nothing: others are tried, or the same again, for as long as a request may be held. A
replica that may have worked on it is another matter, for the request itself may be what ends replicas.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import aiohttp
from aiohttp import web

from fastserve.gateway import answers
from fastserve.gateway.answers import Refusal
from fastserve.gateway.exchange import Exchange
from fastserve.gateway.hold import Hold
from fastserve.gateway.patience import EVERY_SECONDS, FIRST_SECONDS, STREAM_HEADERS, Patience
from fastserve.gateway.requests import Inward
from fastserve.gateway.routes import Choice, Router
from fastserve.gateway.sse import EventCutter, usage_tokens
from fastserve.gateway.statistics import Run, Statistics

NOT_TAKEN, SERVES_WORD, ENGINES_WORD = 0, 2, 3
"""What a try costs that nobody took; that Ray Serve gave up, which happens several times in the moment after a replica
died, or whose model the engine does not know yet; that an engine failed or dropped."""

ENOUGH = 6
"""No further try when so much is spent: two tries that engines failed, or three that Serve gave up."""

PAUSE_SECONDS = 0.6
"""Before the same target is tried again: a replica whose engine died is gone after about 0.4 s, and then Serve holds
the request until the next one is up. Each further pause is half as long again, up to LONGEST_PAUSE_SECONDS."""

LONGEST_PAUSE_SECONDS = 2.0
CONNECT_SECONDS = 5.0
KEEP_ALIVE_SECONDS = 4.0
"""Shorter than any server's own (uvicorn: 5 s), so that no request is sent into a connection just being closed."""

RETRIED = frozenset((500, 502, 503))
SHORTEST_WAIT_SECONDS = 0.001
"""Getting a free slot takes no time; what is longer was spent in the hold."""

LONGEST_ERROR_BYTES = 16 * 2**20
"""FastAPI repeats the whole input in its error."""

LONGEST_ANSWER_BYTES = 256 * 2**20


class Lost(Exception):
    """A try failed before the client had received an event; never leaves this module.

    refusal: what the client is told when there is no further try.
    cost: how much of ENOUGH it takes.
    """

    def __init__(self, refusal: Refusal, cost: int) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal
        self.cost = cost


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
                raise Lost(answers.unreachable(), ENGINES_WORD)
        return b"".join(parts)


async def _or_lost(read: Callable[[], Awaitable[bytes]]) -> bytes:
    try:
        return await read()
    except (aiohttp.ClientError, OSError) as error:
        raise Lost(answers.unreachable(), ENGINES_WORD) from error


@dataclass(frozen=True, slots=True)
class _Way:
    """What goes along with a try."""

    run: Run
    patience: Patience | None


class Proxy:
    """Sends requests to the targets that have a free slot."""

    def __init__(
        self,
        router: Router,
        hold: Hold,
        statistics: Statistics,
        first_comment_seconds: float = FIRST_SECONDS,
        comment_seconds: float = EVERY_SECONDS,
    ) -> None:
        self._router = router
        self._hold = hold
        self._statistics = statistics
        self._comments = (first_comment_seconds, comment_seconds)
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

        Raises Refusal when no engine could take it in time, when it was lost too often, or with the engine's own.
        """
        patience = Patience(exchange, *self._comments) if inward.stream else None
        try:
            return await self._ask(exchange, inward, patience)
        finally:
            if patience is not None:
                await patience.end()

    async def _ask(self, exchange: Exchange, inward: Inward, patience: Patience | None) -> web.StreamResponse:
        until = time.perf_counter() + self._router.models[inward.model].hold.seconds
        tried: list[str] = []
        losses: list[Lost] = []
        pause_seconds = PAUSE_SECONDS
        while True:
            choice = await self._slot(exchange, inward, until, tried, losses)
            try:
                # Behind a last target stands the very replica that just failed, until it is gone.
                if choice.target in tried or (choice.last and any(loss.cost > NOT_TAKEN for loss in losses)):
                    if time.perf_counter() + pause_seconds >= until:
                        raise self._given_up(inward.model, losses)
                    await asyncio.sleep(pause_seconds)
                    pause_seconds = min(LONGEST_PAUSE_SECONDS, pause_seconds * 1.5)
                tried.append(choice.target)
                exchange.revision = choice.revision
                exchange.tries = len(tried)
                return await self._run(exchange, inward, choice, patience)
            except Lost as lost:
                losses.append(lost)
                if sum(loss.cost for loss in losses) >= ENOUGH:
                    raise self._given_up(inward.model, losses) from None
                if lost.cost == NOT_TAKEN:
                    self._hold.rest(choice)
            finally:
                self._hold.give_back(choice)

    def _given_up(self, model: str, losses: list[Lost]) -> Refusal:
        """What a client is told whose request is not tried any more: the last word of a replica that had it, or that
        nobody took it in time."""
        told = [loss.refusal for loss in losses if loss.cost > NOT_TAKEN]
        if told:
            if told[-1].status >= 500:
                self._statistics.lost(model)
            return told[-1]
        self._statistics.refused(model)
        return answers.model_loading(model)

    async def _slot(
        self, exchange: Exchange, inward: Inward, until: float, tried: list[str], losses: list[Lost]
    ) -> Choice:
        began = time.perf_counter()
        model = inward.model
        try:
            return await self._hold.take(model, until - began, tried, len(inward.body))
        except Refusal as refusal:
            if refusal.code == "overloaded":
                self._statistics.refused(model)
            if refusal.code == "model_loading":
                raise self._given_up(model, losses) from None
            raise
        finally:
            seconds = time.perf_counter() - began
            if seconds > SHORTEST_WAIT_SECONDS:
                exchange.held_seconds += seconds
                self._statistics.held(model, seconds)

    async def _run(
        self, exchange: Exchange, inward: Inward, choice: Choice, patience: Patience | None
    ) -> web.StreamResponse:
        """One try, counted."""
        run = self._statistics.run(inward.model, choice.revision)
        exchange.tokens = None
        counts, error, lost = True, False, False
        try:
            return await self._try(exchange, inward, choice, _Way(run, patience))
        except Lost as failed:
            counts = failed.cost > NOT_TAKEN
            error = counts and failed.refusal.status >= 500
            raise
        except Refusal as refusal:
            error = refusal.status >= 500
            lost = refusal.code == "upstream_lost"
            if lost:
                self._statistics.lost(inward.model)
            raise
        finally:
            run.end(tokens=exchange.tokens or 0, counts=counts, error=error, lost=lost)

    async def _try(self, exchange: Exchange, inward: Inward, choice: Choice, way: _Way) -> web.StreamResponse:
        headers = {"Content-Type": inward.content_type, "X-Request-Id": exchange.id}
        url = choice.target + inward.path
        request = self._session.post(url, data=inward.body, headers=headers, allow_redirects=False)
        try:
            answer = await request
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise Lost(answers.unreachable(), NOT_TAKEN) from error
        except (aiohttp.ClientError, OSError) as error:
            raise Lost(answers.unreachable(), ENGINES_WORD) from error
        async with answer:
            kind = answer.headers.get("Content-Type", "").lower()
            if answer.status != 200:
                raise _failure(answer.status, kind, await _Reader(answer).all(LONGEST_ERROR_BYTES), inward.model)
            if kind.startswith("text/event-stream"):
                return await self._stream(exchange, _Reader(answer), way)
            if not kind.startswith("application/json") or exchange.response is not None:
                raise answers.translate(502, kind, b"", inward.model)
            return await self._whole(exchange, inward, _Reader(answer))

    async def _whole(self, exchange: Exchange, inward: Inward, reader: _Reader) -> web.StreamResponse:
        body = await reader.all(LONGEST_ANSWER_BYTES)
        exchange.tokens = usage_tokens(body)
        kind = "application/json"
        if inward.reshape is not None:
            body, kind = inward.reshape(body)
        response = web.Response(body=body, content_type=kind, headers=exchange.headers())
        exchange.begin(response)
        return response

    async def _stream(self, exchange: Exchange, reader: _Reader, way: _Way) -> web.StreamResponse:
        cutter = EventCutter()
        events = b""
        while not events:
            chunk = await reader.some()
            events = cutter.feed(chunk) if chunk else cutter.finish()
            if not chunk and not events:
                raise Lost(answers.unreachable(), ENGINES_WORD)
        way.run.first()
        if way.patience is not None:
            await way.patience.end()
        response = exchange.response
        if response is None:
            response = web.StreamResponse(headers={**STREAM_HEADERS, **exchange.headers()})
            exchange.begin(response)
            await response.prepare(exchange.request)
        try:
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


def _failure(status: int, kind: str, body: bytes, model: str) -> Exception:
    """What an answer other than 200 means: another try, or the engine's refusal."""
    refusal = answers.translate(status, kind, body, model)
    if refusal.code == "model_loading":
        return Lost(refusal, NOT_TAKEN)
    if status in RETRIED:
        return Lost(refusal, ENGINES_WORD if "json" in kind else SERVES_WORD)
    if refusal.code == "model_not_found":
        # The config says that it is there: an adapter that this replica is just loading.
        return Lost(refusal, SERVES_WORD)
    return refusal
