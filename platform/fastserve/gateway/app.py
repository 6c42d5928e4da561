"""The gateway as a server: default deny, in one order, for every request.

raw path -> method -> Host -> key -> body -> model -> fields -> engine. The path is compared as it came over the wire:
nothing is decoded, joined or normalised, so there is no second spelling of a route. There is no router with
middlewares either; what is not in the two tables below does not exist.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import Callable
from datetime import UTC, date, datetime
from random import Random
from typing import Any

from aiohttp import hdrs, web

from fastserve.gateway import answers, forms, requests
from fastserve.gateway.admin import Admin
from fastserve.gateway.answers import Refusal, bad_request
from fastserve.gateway.config import Config, Key
from fastserve.gateway.exchange import Exchange
from fastserve.gateway.hold import Hold
from fastserve.gateway.keys import Keyring
from fastserve.gateway.patience import EVERY_SECONDS, FIRST_SECONDS
from fastserve.gateway.proxy import Proxy
from fastserve.gateway.routes import Router
from fastserve.gateway.server import IDLE_SECONDS, HttpServer, json_answer
from fastserve.gateway.statistics import Statistics

BODY_SECONDS = 30.0
"""A body must be here by then."""

UPLOAD_PATIENCE = 4
"""A file may take so many times as long."""

_HOST = re.compile(r"(?:[A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")
_MODELS = "/v1/models"
_HEALTH = "/healthz"
_READY = "/readyz"
"""Whether it has orders; before that a client is better off elsewhere."""

log = logging.getLogger("fastserve.gateway")
access = logging.getLogger("fastserve.gateway.access")


def today_utc() -> date:
    """The day in UTC."""
    return datetime.now(UTC).date()


class Gateway:
    """Everything between a client's connection and an engine's."""

    def __init__(
        self,
        config: Config,
        *,
        random: Random | None = None,
        today: Callable[[], date] = today_utc,
        idle_seconds: float = IDLE_SECONDS,
        body_seconds: float = BODY_SECONDS,
        first_comment_seconds: float = FIRST_SECONDS,
        comment_seconds: float = EVERY_SECONDS,
        waits: bool = False,
    ) -> None:
        """waits: its first orders are still to come; the config says only where it listens and who may send them."""
        self.config = config
        self._waits = waits
        self._body_seconds = body_seconds
        self.router = Router(config.models, random or Random())
        self.hold = Hold(self.router)
        self.statistics = Statistics()
        self._keyring = Keyring(config.keys)
        self._today = today
        self._proxy = Proxy(self.router, self.hold, self.statistics, first_comment_seconds, comment_seconds)
        self._tasks: set[asyncio.Task[object]] = set()
        self._stopping = False
        self.server = HttpServer(self.handle, idle_seconds)
        self.admin = Admin(lambda: self.config, self.statistics, self.hold.waiting, self.take)

    def take(self, config: Config) -> bool:
        """Take new orders, unless those in force are newer. Returns whether these are in force now."""
        if config.serial < self.config.serial:
            return False
        if config != self.config or self._waits:
            if _address(config) != _address(self.config):
                log.warning("host and ports change only with a restart; everything else of the config is taken")
            self.replace(config)
            self._waits = False
            taken = {"models": sorted(config.models), "keys": len(config.keys), "serial": config.serial}
            log.info("config taken", extra={"fields": taken})
        return True

    def replace(self, config: Config) -> None:
        """Take new orders; requests that run already go on under the old ones, those that wait under the new."""
        self.config = config
        self.hold.replace(config.models)
        self.statistics.replace(config.models)
        self._keyring = Keyring(config.keys)

    async def close(self, drain_seconds: float) -> None:
        """Send away who waits; let running requests end for up to `drain_seconds`, then end them with an error that
        says why."""
        self.hold.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=drain_seconds)
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)
        await self._proxy.close()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request, whatever it is; log one line when it is over."""
        exchange = Exchange(request)
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            return await self._within_time(exchange)
        except Refusal as refusal:
            return await self._refuse(exchange, refusal)
        except asyncio.CancelledError:
            if not self._stopping:
                raise
            return await self._refuse(exchange, answers.stopping())
        except ConnectionError:
            raise  # the client is gone; the server knows what to do
        except Exception:
            exchange.status, exchange.code = 500, "internal_error"
            raise
        finally:
            if request.raw_path not in (_HEALTH, _READY):
                access.info("request", extra={"fields": exchange.line()})

    async def _within_time(self, exchange: Exchange) -> web.StreamResponse:
        seconds = self.config.read_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                return await self._answer(exchange)
        except TimeoutError:
            if exchange.model is not None and exchange.revision is not None:
                self.statistics.late(exchange.model, exchange.revision)
            raise answers.too_slow(seconds) from None

    async def _refuse(self, exchange: Exchange, refusal: Refusal) -> web.StreamResponse:
        """An error as an answer of its own, or as the last event of a stream that has begun."""
        exchange.code = refusal.code
        begun = exchange.response
        if begun is None:
            exchange.status = refusal.status
            response = json_answer(refusal, exchange.headers())
            if refusal.status in (408, 413):
                response.force_close()
            return response
        # The answer is whole with it, so the connection stays good: a client would send its next request into one that
        # is closed without having been announced.
        with contextlib.suppress(ConnectionError):
            await begun.write(refusal.event())
            await begun.write_eof()
        return begun

    async def _answer(self, exchange: Exchange) -> web.StreamResponse:
        request = exchange.request
        path = request.raw_path.partition("?")[0]
        endpoint = requests.ENDPOINTS.get(path)
        if endpoint is None and path not in (_HEALTH, _READY, _MODELS) and not path.startswith(_MODELS + "/"):
            raise Refusal(404, "There is no such route; GET /v1/models lists the models.", code="route_not_found")
        method = hdrs.METH_GET if endpoint is None else hdrs.METH_POST
        if request.method != method:
            words = f"This route takes {method}, not {request.method[:16]}."
            raise Refusal(405, words, code="method_not_allowed", headers={"Allow": method})
        if not _HOST.fullmatch(",".join(request.headers.getall(hdrs.HOST, ()))):
            raise bad_request("The Host header is missing or not a host.", code="invalid_host")
        if path == _READY and self._waits:
            raise Refusal(503, "The gateway has no orders yet.", code="no_orders")
        if path in (_HEALTH, _READY):
            return _json({"status": "ok"}, exchange)
        key = self._keyring.find(request.headers.getall(hdrs.AUTHORIZATION, ()), self._today())
        exchange.key = key.name
        if endpoint is None:
            return self._models(exchange, key, path)
        given = await self._given(request, endpoint)
        model = self._allowed(exchange, key, requests.model_of(given))
        if self.config.models[model].task not in endpoint.tasks:
            words = f"The model '{model}' does {self.config.models[model].task}; it has no {endpoint.path}."
            raise bad_request(words, "model", "unsupported_endpoint")
        inward = requests.check(endpoint, given)
        exchange.ignored = inward.ignored
        return await self._proxy.answer(exchange, inward)

    def _allowed(self, exchange: Exchange, key: Key, model: str) -> str:
        served = self.config.models.get(model)
        if served is None or not key.allows(model, served.parent):
            raise answers.model_not_found(model)
        exchange.model = model
        return model

    def _models(self, exchange: Exchange, key: Key, path: str) -> web.StreamResponse:
        if path == _MODELS:
            rows = [
                self._row(name)
                for name, served in sorted(self.config.models.items())
                if key.allows(name, served.parent)
            ]
            return _json({"object": "list", "data": rows}, exchange)
        return _json(self._row(self._allowed(exchange, key, path[len(_MODELS) + 1 :])), exchange)

    def _row(self, name: str) -> dict[str, object]:
        served = self.config.models[name]
        row: dict[str, object] = {"id": name, "object": "model", "created": served.created, "owned_by": "fastserve"}
        return row if served.parent is None else {**row, "parent": served.parent}

    async def _given(self, request: web.BaseRequest, endpoint: requests.Endpoint) -> dict[str, Any]:
        """What the body says, not yet checked."""
        if not endpoint.form:
            return requests.parse(await self._body(request, "application/json", self.config.max_body_bytes, 1))
        body = await self._body(request, forms.FORM, self.config.max_upload_bytes, UPLOAD_PATIENCE)
        return forms.parse(request.headers.get(hdrs.CONTENT_TYPE, ""), body, endpoint.lists)

    async def _body(self, request: web.BaseRequest, kind: str, most: int, patience: int) -> bytes:
        """The whole body. Raises Refusal: 413 as soon as it is known to be too long, 415, 408."""
        if request.content_type != kind and (hdrs.CONTENT_TYPE in request.headers or kind == forms.FORM):
            raise Refusal(415, f"Send the header 'Content-Type: {kind}'.", code="unsupported_media_type")
        if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
            raise Refusal(415, "Send the body without Content-Encoding.", code="unsupported_media_type")
        seconds = self._body_seconds * patience
        too_large = Refusal(413, f"The body is longer than {most} bytes.", code="request_too_large")
        if (request.content_length or 0) > most:
            raise too_large
        if request.headers.get(hdrs.EXPECT, "").lower() == "100-continue":
            await self.server.go_on(request)
        parts: list[bytes] = []
        size_bytes = 0
        try:
            async with asyncio.timeout(seconds):
                async for part in request.content.iter_any():
                    size_bytes += len(part)
                    if size_bytes > most:
                        raise too_large
                    parts.append(part)
        except TimeoutError:
            words = f"The body was not here after {seconds:g} s."
            raise Refusal(408, words, code="request_timeout") from None
        except web.RequestPayloadError:
            raise bad_request("The body is not complete.", code="invalid_body") from None
        return b"".join(parts)


def _json(value: object, exchange: Exchange) -> web.Response:
    response = web.Response(
        body=json.dumps(value).encode(), content_type="application/json", headers=exchange.headers()
    )
    exchange.begin(response)
    return response


def _address(config: Config) -> tuple[str, int, int]:
    return config.host, config.port, config.admin_port
