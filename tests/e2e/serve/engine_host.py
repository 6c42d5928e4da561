"""A replica's engine and server without Serve: one process, its HTTP port, and its own methods as routes.

python engine_host.py MODEL SOCKET SECTION RANKS: SOCKET is the descriptor of a bound socket (a port that was only
looked for could be taken by the time the engine is loaded), SECTION the serve section as JSON, RANKS a JSON list.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from pathlib import Path
from typing import Any

import uvicorn

from fastserve.artifacts.describe import describe
from fastserve.errors import EngineFailed
from fastserve.plan.engine import engine_args, engine_env
from fastserve.plan.facts import Hardware
from fastserve.plan.revision import Revision, deciding
from fastserve.plan.stages import Stage
from fastserve.spec.serve import Serve
from fastserve.stages.serve import server as serving
from fastserve.stages.serve.loopback import keep_on_loopback

MACHINE = Hardware(cpus=2, memory_bytes=8 * 2**30)


class Host:
    """The server's own application, and `/_adapters`, `/_stats`, `/_check` beside it."""

    def __init__(self, server: serving.EngineServer) -> None:
        self.server = server

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/_"):
            await self.server(scope, receive, send)
            return
        body = json.loads((await receive()).get("body") or b"null")
        answer = await self._method(scope["path"], body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})

    async def _method(self, path: str, body: Any) -> Any:
        if path == "/_adapters":
            return await self.server.set_adapters(body)
        if path == "/_stats":
            return self.server.stats()
        try:
            await self.server.check()
        except EngineFailed as error:
            return str(error)
        return "well"


async def main(model: Path, bound: socket.socket, section: dict[str, Any], ranks: list[int]) -> None:
    revision = Revision("chat", Stage.SOURCE, "k" * 64, "d" * 64, deciding(Serve.model_validate(section), ranks))
    keep_on_loopback()
    serving.prepare_environment(engine_env(revision, MACHINE))
    serving.IDLE_SECONDS = 0.0  # every check computes
    server = serving.EngineServer()
    await server.start(model, engine_args(revision, describe(model), MACHINE))
    watch = asyncio.get_running_loop().create_task(server.exit_when_dead())
    config = uvicorn.Config(Host(server), log_level="warning", lifespan="off")
    await uvicorn.Server(config).serve([bound])
    watch.cancel()
    await server.stop()


if __name__ == "__main__":
    bound = socket.socket(fileno=int(sys.argv[2]))
    asyncio.run(main(Path(sys.argv[1]), bound, json.loads(sys.argv[3]), json.loads(sys.argv[4])))
