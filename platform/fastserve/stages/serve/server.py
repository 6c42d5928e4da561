"""vLLM's own OpenAI server as one ASGI application, with its engine, its health and its end.

Nothing of vLLM's HTTP surface is rewritten, so what its documentation says of the routes holds. The names used here
move between vLLM's releases; they stand in this file alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastserve.errors import EngineFailed

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

CHECK_SECONDS = 90.0
"""Longest wait for a sign of life; one step of a large prefill on a busy CPU may take most of it."""

IDLE_SECONDS = 30.0
"""An answer this recent is proof enough; only a server that idles longer is asked for a token."""

LAST_ANSWERS_SECONDS = 0.3
"""How long the answers of a dead engine's requests may take to leave, before the process ends."""

log = logging.getLogger("fastserve.serve")


class EngineServer:
    """An engine and the ASGI application in front of it."""

    def __init__(self, engine: Any = None, app: Any = None, generates: bool = False) -> None:
        """engine, app: ones that run already; without them `start` makes them.

        generates: whether the engine answers with text, so that it can be asked for a token.
        """
        self._context: AbstractAsyncContextManager[Any] | None = None
        self._engine = engine
        self._app = app
        self._generates = generates
        self._in_flight = 0
        self._alive_at = time.monotonic()
        self._probes = 0

    async def start(self, model: Path, argv: Sequence[str]) -> None:
        """Load the Hugging Face folder `model` into an engine.

        argv: of vLLM's server, without `--model`. Raises EngineFailed, in the engine's own words, when it does not come
        up.
        """
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
        from vllm.entrypoints.launchers.app import build_app

        began = time.monotonic()
        args = parse(model, argv)
        context = build_async_engine_client(args)
        try:
            self._engine = await context.__aenter__()
            self._context = context
            tasks = await self._engine.get_supported_tasks()
            app = build_app(args, tasks, self._engine.model_config)
            await init_app_state(self._engine, app.state, args, tasks)
        except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
            await self.stop()
            raise EngineFailed(f"the engine cannot serve {model.name}: {error}; see the log of the replica") from error
        app.state.server = SimpleNamespace(should_exit=False)  # vLLM's error handler stops a server through it
        self._generates = "generate" in tasks
        self._app = app
        self._alive_at = time.monotonic()
        log.info("engine up in %.1f s", self._alive_at - began)

    async def stop(self) -> None:
        """End the engine and its processes."""
        self._app = None
        context, self._context = self._context, None
        if context is not None:
            await context.__aexit__(None, None, None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection (https://asgi.readthedocs.io)."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if self._app is None or self.dead:
            await send({"type": "http.response.start", "status": 503, "headers": [(b"retry-after", b"1")]})
            await send({"type": "http.response.body", "body": b""})
            return
        self._in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._in_flight -= 1
            self._alive_at = time.monotonic()

    # -- health ------------------------------------------------------------------------------------------------------

    @property
    def dead(self) -> bool:
        """Whether the engine has ended and will not answer again; known at once, without asking it."""
        return self._engine is not None and bool(self._engine.errored)

    async def check(self) -> None:
        """Raise EngineFailed unless the engine shows that it works.

        While it answers requests, its loop must reply between two steps: a request of our own could wait behind them
        for minutes, and a full engine is not a sick one. When it idles, it must compute a token.
        """
        if self._engine is None or self.dead:
            raise EngineFailed("the engine's process has ended; Serve replaces this replica")
        if not self._in_flight and time.monotonic() - self._alive_at < IDLE_SECONDS:
            return
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                if self._in_flight or not self._generates:
                    await self._engine.is_sleeping()
                else:
                    await self._compute_one_token()
        except TimeoutError as error:
            raise EngineFailed(
                f"the engine gave no sign of life for {CHECK_SECONDS:.0f}s; Serve replaces this replica"
            ) from error
        self._alive_at = time.monotonic()

    async def _compute_one_token(self) -> None:
        from vllm import SamplingParams

        self._probes += 1
        parameters = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        async for _ in self._engine.generate({"prompt_token_ids": [1]}, parameters, f"health-{self._probes}"):
            pass

    async def exit_when_dead(self) -> None:
        """Watch the engine; when it has ended, end this process, so that Serve starts another one at once.

        Serve itself would go on sending requests here until its third failed check.
        """
        while not self.dead:
            await asyncio.sleep(0.1)
        log.error("the engine's process has ended; this replica ends too and Serve starts another")
        await asyncio.sleep(LAST_ANSWERS_SECONDS)
        os._exit(1)


async def _lifespan(receive: Receive, send: Send) -> None:
    """The engine is started and ended by its owner, so there is nothing to do but to agree."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


def parse(model: Path, argv: Sequence[str]) -> Any:
    """vLLM's own parsed arguments. Raises EngineFailed with the parser's words when it refuses them."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = make_arg_parser(FlexibleArgumentParser()).parse_args([f"--model={model}", *argv])
        validate_parsed_serve_args(args)
    except (SystemExit, ValueError, TypeError) as error:
        words = said.getvalue().strip().splitlines()[-1:] or [str(error)]
        raise EngineFailed(f"vLLM refuses its arguments ({words[0]}); change spec.serve.engine.extraArgs") from error
    return args


_ADDRESS = re.compile(r"[a-z0-9+.-]*tcp://", re.IGNORECASE)


def prepare_environment(env: dict[str, str]) -> None:
    """Set what the engine's processes must find, and drop the addresses that a cluster injects for its Services.

    To be called before vLLM is imported: it reads VLLM_PORT, which a Service named `vllm` sets to tcp://address:port.
    """
    for name, value in list(os.environ.items()):
        if _ADDRESS.match(value):
            del os.environ[name]
    os.environ.update(env)
