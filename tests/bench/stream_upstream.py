"""A cheap streaming engine for benches: `python stream_upstream.py PORT`.

Speaks just enough HTTP to be fast: keep-alive, chunked, one event a token. The request says how many tokens
(`max_tokens`) and, in `seed`, how many microseconds lie between two of them; 0 is as fast as possible.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, cast

import uvloop

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _event(number: int) -> bytes:
    """As vLLM writes it: about 190 bytes a token."""
    return (
        b'data: {"id":"chatcmpl-9f86d081884c7d659a2feaa0c55ad015","object":"chat.completion.chunk",'
        b'"created":1764000000,"model":"bench","choices":[{"index":0,"delta":{"content":" token%d"},'
        b'"logprobs":null,"finish_reason":null}]}\n\n' % number
    )


class Engine(asyncio.Protocol):
    """One connection: one request after the other."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._seen = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._seen += data
        head, found, rest = self._seen.partition(b"\r\n\r\n")
        if not found:
            return
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        size = int(lengths[0].split(b":")[1]) if lengths else 0
        if len(rest) < size:
            return
        self._seen = b""
        asked: dict[str, Any] = json.loads(rest[:size])
        self._send(_HEAD)
        self._token(0, asked["max_tokens"], asked.get("seed", 0) / 1e6, self._loop.time())

    def _token(self, number: int, count: int, gap_seconds: float, due: float) -> None:
        if self._transport is None:
            return
        if number == count:
            self._send(_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
            return
        self._send(_chunk(_event(number)))
        following = due + gap_seconds
        if gap_seconds:
            self._loop.call_at(following, self._token, number + 1, count, gap_seconds, following)
        else:
            self._loop.call_soon(self._token, number + 1, count, gap_seconds, following)

    def _send(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", int(sys.argv[1]), backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
