"""A revision as a Ray Serve application: one plain deployment, each replica a process with one engine.

No router and no ingress of Ray's own LLM layer. The engine and vLLM's own server live in a process beside the replica,
to which the gateway goes directly; what comes through Serve's proxy is passed on to it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve

from fastserve.stages.serve.loopback import keep_on_loopback
from fastserve.stages.serve.remote import RemoteServer, publish
from fastserve.stages.serve.server import prepare_environment
from fastserve.stages.serve.settings import Settings


@serve.ingress()
class Engine:
    """A replica. Serve builds it, asks for its health and ends it."""

    async def __init__(self, args: Mapping[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        """Fetch the weights and start the engine. What goes wrong stands in the application's message."""
        self._settings = settings = Settings.from_json(args)
        self._ttft_ms = 0.0
        keep_on_loopback()
        prepare_environment({})
        seconds = {"process": _age_seconds()}
        began = time.monotonic()
        self._server = RemoteServer()
        model = await asyncio.to_thread(settings.fetch_model)
        seconds["weights"] = time.monotonic() - began
        await self._server.start(model, settings.argv, settings.env)
        seconds["engine"] = time.monotonic() - began - seconds["weights"]
        self._published = publish(serve.get_replica_context().replica_id.unique_id, self._server.url, seconds)
        self._watch = asyncio.get_running_loop().create_task(self._server.exit_when_dead())

    def __serve_build_asgi_app__(self) -> RemoteServer:
        """The ASGI application that Serve calls."""
        return self._server

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Called by Serve with the light settings: before the first request, and whenever they change."""
        self._ttft_ms = float(user_config["target"]["ttft_ms"] or 0.0)
        wanted = await asyncio.to_thread(self._settings.fetch_adapters, user_config["adapters"])
        await self._server.call("set_adapters", wanted)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve every half second, for the autoscaling policy; the target stands beside what is measured."""
        return {**await self._server.call("stats"), "target_ttft_ms": self._ttft_ms}

    async def check_health(self) -> None:
        """Called by Serve; raises when the engine shows no sign of life."""
        await self._server.check()

    async def __del__(self) -> None:
        """Called by Serve when the last stream has ended or its time is over."""
        if hasattr(self, "_watch"):
            self._published()
            self._watch.cancel()
        if hasattr(self, "_server"):
            await self._server.stop()


def _age_seconds() -> float:
    """How long ago this process was started."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


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
