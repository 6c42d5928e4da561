"""A revision as a Ray Serve application: one plain deployment, each replica a process with one engine.

No router and no ingress of Ray's own LLM layer: the proxy hands a request to the replica, and vLLM's own server
answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from ray import serve

from fastserve.stages.serve.loopback import keep_on_loopback
from fastserve.stages.serve.server import EngineServer, prepare_environment
from fastserve.stages.serve.settings import Settings


@serve.ingress()
class Engine:
    """A replica. Serve builds it, asks for its health and ends it."""

    async def __init__(self, args: Mapping[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        """Fetch the weights and start the engine. What goes wrong stands in the application's message."""
        settings = Settings.from_json(args)
        keep_on_loopback()
        prepare_environment(dict(settings.env))
        self._server = EngineServer()
        model = await asyncio.to_thread(settings.fetch_model)
        await self._server.start(model, settings.argv)
        self._watch = asyncio.get_running_loop().create_task(self._server.exit_when_dead())

    def __serve_build_asgi_app__(self) -> EngineServer:
        """The ASGI application that Serve calls."""
        return self._server

    async def check_health(self) -> None:
        """Called by Serve; raises when the engine shows no sign of life."""
        await self._server.check()

    async def __del__(self) -> None:
        """Called by Serve when the last stream has ended or its time is over."""
        if hasattr(self, "_watch"):
            self._watch.cancel()
        if hasattr(self, "_server"):
            await self._server.stop()


def build(args: Mapping[str, Any]) -> Any:
    """The Serve application of a revision.

    args: as `cluster.ray_serve.app_for` makes them. What may change lightly is set by the `deployments:` of the
    application's configuration; the values here are those of a deployment without any.
    """
    Settings.from_json(args)  # a damaged configuration is refused here, before a replica starts
    deployment = serve.deployment(
        Engine,
        name="engine",
        max_ongoing_requests=64,
        graceful_shutdown_timeout_s=630,
        health_check_period_s=5,
        health_check_timeout_s=120,
        max_constructor_retry_count=2,
    )
    return deployment.bind(dict(args))
