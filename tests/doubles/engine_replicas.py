"""Replicas that answer as slowly and as badly as they are told: `python engine_replicas.py PORT FILE`.

They stand behind one port as Serve's applications do behind its proxy, each below its own path. FILE is read again when
it changes: JSON, by path: {"ttft_ms", "fails_every" (0: never), "tokens", "gap_ms"}. A path that is not in it answers
503, as Serve does for an application that it has not. Every answer names the path that gave it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

ROUTE = "/v1/chat/completions"


class Replicas:
    """All of them, in one process."""

    def __init__(self, behaviours: Path) -> None:
        self._file = behaviours
        self._read_at = 0
        self._behaviours: dict[str, dict[str, float]] = {}
        self._asked: dict[str, int] = {}

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """One completion, as a stream of events."""
        path = request.path.removesuffix(ROUTE)
        told = self._now().get(path)
        await request.read()
        if told is None:
            return web.Response(status=503, text="not there")
        self._asked[path] = self._asked.get(path, 0) + 1
        if told["fails_every"] and self._asked[path] % told["fails_every"] == 0:
            return web.json_response({"error": {"message": "the engine broke", "type": "server_error"}}, status=500)
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await asyncio.sleep(told["ttft_ms"] / 1000)
        await stream.prepare(request)
        for number in range(int(told["tokens"])):
            if number:
                await asyncio.sleep(told["gap_ms"] / 1000)
            await stream.write(self._event(path, {"content": f" {number}"}, None))
        await stream.write(self._event(path, {}, "stop") + b"data: [DONE]\n\n")
        return stream

    def _now(self) -> dict[str, dict[str, float]]:
        at = self._file.stat().st_mtime_ns
        if at != self._read_at:
            self._read_at, self._behaviours = at, json.loads(self._file.read_text())
        return self._behaviours

    def _event(self, path: str, delta: dict[str, Any], finish: str | None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        event = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 0, "system_fingerprint": path}
        return f"data: {json.dumps({**event, 'model': 'bench', 'choices': [choice]})}\n\n".encode()


def main(port: int, behaviours: Path) -> None:
    app = web.Application()
    app.router.add_post("/{path:.*}", Replicas(behaviours).answer)
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
