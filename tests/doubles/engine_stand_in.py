"""An engine's process without vLLM: the real line, HTTP server and end around an application of a few lines.

Run as `python -m engine_stand_in DESCRIPTOR` it is one started plainly; with SOCKET DESCRIPTOR it is a warm
process that forks them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastserve.errors import EngineFailed
from fastserve.stages.serve import warm
from fastserve.stages.serve.engine_process import run
from fastserve.stages.serve.server import EngineServer, Receive, Scope, Send


class StandIn(EngineServer):
    """Answers with what it was asked, and streams numbers on /stream until the client goes."""

    async def start(self, model: Path, argv: Sequence[str]) -> None:
        if not model.exists():
            raise EngineFailed(f"the engine cannot serve {model.name}")
        self._engine = SimpleNamespace(errored=False)
        self._app = self._answer
        self.child = os.fork()
        if not self.child:  # in the place of vLLM's own process
            signal.pause()
            os._exit(0)
        self.streams = 0

    def about(self) -> dict[str, Any]:
        return {"child": self.child, "parent": os.getppid(), "env": dict(os.environ), "streams": self.streams}

    async def refuse(self, why: str) -> None:
        raise EngineFailed(why)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        query = scope["query_string"].decode()
        if scope["path"] != "/stream":
            await send({"type": "http.response.body", "body": f"{scope['path']}?{query} ".encode() + message["body"]})
            return
        self.streams += 1
        leaving = asyncio.ensure_future(_gone(receive))
        for number in range(int(query)):
            if leaving.done():
                break
            await send({"type": "http.response.body", "body": f"{number}\n".encode(), "more_body": True})
            await asyncio.sleep(0.02)
        leaving.cancel()
        self.streams -= 1
        await send({"type": "http.response.body", "body": b""})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def serve(line: socket.socket) -> None:
    run(line, StandIn, contextlib.nullcontext)


def prepare() -> None:
    """Imports of an engine change variables too."""
    if "CHANGED_BY_IMPORTS" in os.environ:
        os.environ["CHANGED_BY_IMPORTS"] = "yes"


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(socket.socket(fileno=int(sys.argv[1])))
    warm.main(Path(sys.argv[1]), int(sys.argv[2]), prepare, serve)
