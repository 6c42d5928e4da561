"""vLLM's own OpenAI server as one ASGI application, with its engine, its health and its end.

Nothing of vLLM's HTTP surface is rewritten, so what its documentation says of the routes holds. The names used here
move between vLLM's releases; they stand in this file alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import multiprocessing
import os
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastserve.errors import EngineFailed
from fastserve.plan.environment import foreign
from fastserve.stages.cgroup import let_engines_reclaim
from fastserve.stages.serve.loras import Loras
from fastserve.stages.serve.signals import Signals

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

CHECK_SECONDS = float(os.environ.get("FASTSERVE_CHECK_SECONDS", "90"))
"""Longest wait for a sign of life; one step of a large prefill on a busy CPU may take most of it."""

IDLE_SECONDS = 30.0
"""An answer this recent is proof enough; only a server that idles longer is asked for a token."""

LAST_ANSWERS_SECONDS = 0.3
"""How long the answers of a dead engine's requests may take to leave, before the process ends."""

_POOLING = ("embed", "classify", "token_embed", "token_classify")
"""Tasks of vLLM's that need nothing but a text."""

log = logging.getLogger("fastserve.serve")


class EngineServer:
    """An engine and the ASGI application in front of it."""

    def __init__(
        self, engine: Any = None, app: Any = None, tasks: Collection[str] = (), signals: Signals | None = None
    ) -> None:
        """engine, app: ones that run already; without them `start` makes them.

        tasks: what the engine does, in vLLM's words, so that it can be asked to do it. signals: what it says of its
        steps.
        """
        self._context: AbstractAsyncContextManager[Any] | None = None
        self._engine = engine
        self._app = app
        self._tasks = tasks
        self._signals = signals
        self._loras: Loras | None = None
        self._refused = 0
        self._in_flight = 0
        self._drains = False
        self._busy_since = time.monotonic()
        self._alive_at = time.monotonic()
        self._stuck = False
        self._probes = 0

    async def start(self, model: Path, argv: Sequence[str]) -> None:
        """Load the Hugging Face folder `model` into an engine.

        argv: of vLLM's server, without `--model`. Raises EngineFailed, in the engine's own words, when it does not come
        up.
        """
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
        from vllm.entrypoints.launchers.app import build_app

        let_engines_reclaim()
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
        self._tasks = tasks
        self._signals = Signals(self._engine.vllm_config.scheduler_config.max_num_seqs)
        self._engine.logger_manager.stat_loggers.append(self._signals)
        if self._engine.vllm_config.lora_config is not None:
            self._loras = Loras(self._engine, app.state.openai_serving_models)
        self._app = app
        self._alive_at = time.monotonic()
        log.info("engine up in %.1f s", self._alive_at - began)

    async def drain(self) -> None:
        """Take nothing new, and wait until what runs has ended."""
        self._drains = True
        while self._in_flight and not (self.dead or self._stuck):
            await asyncio.sleep(0.1)

    async def stop(self) -> None:
        """End the engine and its processes."""
        self._app = None
        context, self._context = self._context, None
        if context is not None:
            await context.__aexit__(None, None, None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection (https://asgi.readthedocs.io)."""
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        if self._app is None or self._drains or self.dead or self._stuck:
            await send({"type": "http.response.start", "status": 503, "headers": [(b"retry-after", b"1")]})
            await send({"type": "http.response.body", "body": b""})
            return
        if not self._in_flight:
            self._busy_since = time.monotonic()
        self._in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._in_flight -= 1
            self._alive_at = time.monotonic()

    # -- adapters and signals ----------------------------------------------------------------------------------------

    async def set_adapters(self, wanted: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
        """Serve exactly these adapters: `name`, and `path` of a folder. Returns `name` and `why` of those refused."""
        if self._loras is None:
            refused = [{"name": item["name"], "why": "the engine was started without adapters"} for item in wanted]
        else:
            refused = await self._loras.make(wanted)
        self._refused = len(refused)
        return refused

    def stats(self) -> dict[str, float]:
        """What `Signals.values` says, and how many adapters were refused; empty without an engine."""
        if self._signals is None:
            return {}
        return {**self._signals.values(), "adapters_refused": float(self._refused)}

    # -- health ------------------------------------------------------------------------------------------------------

    @property
    def dead(self) -> bool:
        """Whether the engine has ended and will not answer again; known at once, without asking it."""
        return self._engine is not None and bool(self._engine.errored)

    async def check(self) -> None:
        """Raise EngineFailed unless the engine shows that it works.

        While it answers requests, its loop must reply between two steps, and they must get on: a request of our own
        could wait behind them for minutes, and a full engine is not a sick one. When it idles, it must compute a token,
        or a vector.
        """
        if self._engine is None or self.dead:
            raise EngineFailed("the engine's process has ended; Serve replaces this replica")
        if not self._in_flight and time.monotonic() - self._alive_at < IDLE_SECONDS:
            return
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                if self._in_flight:
                    await self._engine.is_sleeping()
                else:
                    await self._compute()
        except TimeoutError as error:
            self._stuck = True
            raise EngineFailed(
                f"the engine gave no sign of life for {CHECK_SECONDS:.0f}s; Serve replaces this replica"
            ) from error
        if self._stands_still():
            self._stuck = True
            raise EngineFailed(
                f"the engine has requests and computed nothing for {CHECK_SECONDS:.0f}s; Serve replaces this replica"
            )
        self._alive_at = time.monotonic()

    def _stands_still(self) -> bool:
        """Whether the engine's loop turns, with requests in it, and none of them gets on."""
        if self._signals is None or not self._in_flight:
            return False
        moved_at = max(self._signals.moved_at, self._busy_since)
        return time.monotonic() - moved_at > CHECK_SECONDS and self._engine.output_processor.has_unfinished_requests()

    async def _compute(self) -> None:
        """The least that the engine can do: one token, or the vector of one token."""
        from vllm import PoolingParams, SamplingParams

        self._probes += 1
        name, prompt = f"health-{self._probes}", {"prompt_token_ids": [1]}
        pooling = next((task for task in _POOLING if task in self._tasks), None)
        if "transcription" in self._tasks or ("generate" not in self._tasks and pooling is None):
            await self._engine.is_sleeping()  # it would need sound
        elif "generate" in self._tasks:
            parameters = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
            async for _ in self._engine.generate(prompt, parameters, name):
                pass
        else:
            async for _ in self._engine.encode(prompt, PoolingParams(task=pooling), name):
                pass

    async def exit_when_dead(self) -> None:
        """Watch the engine; when it has ended or is stuck, end this process, so that Serve starts another one at once.

        Serve itself would go on sending requests here until its third failed check.
        """
        while not (self.dead or self._stuck):
            await asyncio.sleep(0.1)
        what = "is stuck" if self._stuck else "has ended"
        log.error("the engine's process %s; this replica ends too and Serve starts another", what)
        await asyncio.sleep(LAST_ANSWERS_SECONDS)
        for process in multiprocessing.active_children():
            process.kill()  # one that is stuck would not notice that it is alone, and keep its memory
        os._exit(1)


async def lifespan(receive: Receive, send: Send) -> None:
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


def prepare_environment(env: dict[str, str]) -> None:
    """Set what the engine's processes must find, and drop what is not meant for them (`plan.environment`).

    To be called before vLLM is imported: it reads VLLM_PORT, which a Service named `vllm` sets to tcp://address:port.
    """
    for name in foreign(os.environ):
        del os.environ[name]
    os.environ.update(env)
