"""A Serve application that answers like an engine and costs nothing: it takes so many requests at a time, so long each.

`clerk.app` puts it in the place of vLLM.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import deque
from collections.abc import Mapping
from time import monotonic
from typing import Any

import ray
from ray import serve

WINDOW_SECONDS = 10.0


class _App:
    """An ASGI application that is an object: uvicorn takes a bound method for one of ASGI 2."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._answer(scope, receive, send)


@serve.ingress()
class Clerk:
    """A replica with `slots` hands."""

    def __init__(self, args: Mapping[str, Any]) -> None:
        self._seconds, self._slots = float(args["seconds"]), int(args["slots"])
        self._hands = asyncio.Semaphore(self._slots)
        self._here = self._running = 0
        self._ended: deque[tuple[float, float, int]] = deque()
        self._target_ms = 0.0
        self._profile = ray.get_runtime_context().get_node_labels().get("fastserve.dev/profile", "")

    def __serve_build_asgi_app__(self) -> Any:
        return _App(self._answer)

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        self._target_ms = float(user_config["target"]["ttft_ms"] or 0.0)

    def record_autoscaling_stats(self) -> dict[str, float]:
        while self._ended and self._ended[0][0] < monotonic() - WINDOW_SECONDS:
            self._ended.popleft()
        waits = sorted(wait for _, wait, _ in self._ended)
        return {
            "running": self._running,
            "waiting": self._here - self._running,
            "kv_use": self._running / self._slots / 2,
            "ttft_ms": waits[len(waits) // 2] * 1000 if waits else 0.0,
            "tokens_per_s": sum(tokens for _, _, tokens in self._ended) / WINDOW_SECONDS,
            "slots": self._slots,
            "target_ttft_ms": self._target_ms,
        }

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (await receive())["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        asked = json.loads(body) if body else {}
        tokens = int(asked.get("max_tokens", 4))
        began = monotonic()
        self._here += 1
        try:
            async with self._hands:
                self._running += 1
                try:
                    await self._speak(send, bool(asked.get("stream")), tokens, began)
                finally:
                    self._running -= 1
        finally:
            self._here -= 1

    async def _speak(self, send: Any, stream: bool, tokens: int, began: float) -> None:
        kind = b"text/event-stream" if stream else b"application/json"
        headers = [
            (b"content-type", kind),
            (b"x-profile", self._profile.encode()),
            (b"x-pid", str(os.getpid()).encode()),
        ]
        if not stream:
            await asyncio.sleep(self._seconds)
            self._ended.append((monotonic(), monotonic() - began, tokens))
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            choice = {"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}
            answer = {"id": "c", "object": "chat.completion", "created": 0, "model": "clerk", "choices": [choice]}
            await send({"type": "http.response.body", "body": json.dumps(answer).encode()})
            return
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number in range(tokens):
            await asyncio.sleep(self._seconds / tokens)
            if number == 0:
                self._ended.append((monotonic(), monotonic() - began, tokens))
            choice = {"index": 0, "delta": {"content": f" {number}"}, "finish_reason": None}
            event = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "clerk", "choices": [choice]}
            await send(
                {"type": "http.response.body", "body": f"data: {json.dumps(event)}\n\n".encode(), "more_body": True}
            )
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def build(args: Mapping[str, Any]) -> Any:
    """What Serve imports."""
    return serve.deployment(Clerk, name="engine", max_ongoing_requests=8).bind(dict(args))
