"""The second door: figures for whoever runs the gateway, on a port of its own, with a token of its own.

No client's key opens it and it opens no model. Prometheus' format: exposition text 0.0.4. Label values are the
config's own models and revisions, so there is no series that a client could make.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import re
from collections.abc import Callable, Iterator
from urllib.parse import parse_qs

from aiohttp import hdrs, web

from fastserve.errors import UsageInvalid
from fastserve.gateway.answers import Refusal, bad_request
from fastserve.gateway.config import Config, parse
from fastserve.gateway.keys import digest
from fastserve.gateway.server import HttpServer, json_answer
from fastserve.gateway.statistics import Statistics
from fastserve.gateway.tally import Times

_BEARER = re.compile(r"bearer[ \t]+([\x21-\x7e]{1,256})[ \t]*", re.IGNORECASE)
ORDERS_SECONDS = 10.0
"""Orders must be here by then."""

_BOUNDS_MS = (25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000, 300_000)


class Admin:
    """Answers `GET /stats?since=UNIX_SECONDS` and `GET /metrics`, and takes `PUT /orders`."""

    def __init__(
        self,
        config: Callable[[], Config],
        statistics: Statistics,
        waiting: Callable[[str], int],
        take: Callable[[Config], bool],
    ) -> None:
        """take: puts orders in force, and tells whether they are; newer ones stay."""
        self._config = config
        self._take = take
        self._statistics = statistics
        self._waiting = waiting
        self.server = HttpServer(self.handle)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        try:
            if request.raw_path == "/orders":
                return await self._orders(request)
            return self._answer(request)
        except Refusal as refusal:
            return json_answer(refusal, {})

    async def _orders(self, request: web.BaseRequest) -> web.Response:
        """Take the orders in the body: the text that else stands in the file, so a restart finds the same."""
        self._examine(request.headers.getall(hdrs.AUTHORIZATION, ()), self._config().orders_sha256)
        if request.method != hdrs.METH_PUT:
            words = f"This route takes PUT, not {request.method[:16]}."
            raise Refusal(405, words, code="method_not_allowed", headers={"Allow": "PUT"})
        try:
            async with asyncio.timeout(ORDERS_SECONDS):
                raw = await request.read()
        except (TimeoutError, web.HTTPRequestEntityTooLarge):
            raise Refusal(413, "The orders are too long, or came too slowly.", code="orders_too_long") from None
        try:
            config = parse(json.loads(raw))
        except (UsageInvalid, ValueError, RecursionError) as error:
            raise Refusal(400, f"The orders are not taken: {error}"[:1000], code="invalid_orders") from None
        if not self._take(config):
            raise Refusal(409, "Newer orders are in force.", code="orders_too_old")
        return web.Response(body=json.dumps({"serial": config.serial}).encode(), content_type="application/json")

    def _answer(self, request: web.BaseRequest) -> web.Response:
        self._examine(request.headers.getall(hdrs.AUTHORIZATION, ()), self._config().admin_sha256)
        path, _, query = request.raw_path.partition("?")
        if path not in ("/stats", "/metrics"):
            raise Refusal(404, "There is no such route; GET /stats or /metrics.", code="route_not_found")
        if request.method != hdrs.METH_GET:
            words = f"This route takes GET, not {request.method[:16]}."
            raise Refusal(405, words, code="method_not_allowed", headers={"Allow": "GET"})
        if path == "/metrics":
            return web.Response(text=self.metrics(), headers={"Content-Type": "text/plain; version=0.0.4"})
        steps = parse_qs(query).get("steps") == ["1"]
        figures = self._statistics.to_json(_since(query), self._config().models, self._waiting, steps)
        return web.Response(body=json.dumps(figures).encode(), content_type="application/json")

    def _examine(self, headers: list[str] | tuple[()], wanted: str) -> None:
        match = _BEARER.fullmatch(headers[0]) if len(headers) == 1 else None
        if match is None or not wanted or not hmac.compare_digest(digest(match[1]), wanted):
            raise Refusal(
                401, "The admin token is not valid.", code="invalid_token", headers={"WWW-Authenticate": "Bearer"}
            )

    def metrics(self) -> str:
        """All figures since the start of the process, as Prometheus reads them."""
        return "".join(f"{line}\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        models, revisions = self._statistics.tracks()
        each = [
            (f'model="{model}",revision="{digest[:16]}"', track)
            for model, tracks in sorted(revisions.items())
            for digest, track in sorted(tracks.items())
        ]
        whole = [(f'model="{model}"', track) for model, track in sorted(models.items())]
        waiting = [(f'model="{name}"', self._waiting(name)) for name in sorted(self._config().models)]
        counters = (
            ("requests", "Requests that a replica took.", each, "requests"),
            ("errors", "Requests answered with a 5xx or lost.", each, "errors"),
            ("lost_streams", "Streams cut after their first event.", each, "lost"),
            ("tokens", "Tokens of all answers.", each, "tokens"),
            ("lost", "Requests without a whole answer because replicas were lost.", whole, "lost"),
            ("refused", "Requests that were not held, or too long.", whole, "refused"),
        )
        for name, words, tracks, field in counters:
            yield from _head(f"{name}_total", words, "counter")
            for labels, track in tracks:
                yield f"fastserve_gateway_{name}_total{{{labels}}} {getattr(track.total, field)}"
        yield from _head("running", "Requests that run now.", "gauge")
        for labels, track in each:
            yield f"fastserve_gateway_running{{{labels}}} {track.running}"
        yield from _head("held", "Requests that wait for a free slot or a replica.", "gauge")
        for labels, count in waiting:
            yield f"fastserve_gateway_held{{{labels}}} {count}"
        yield from _head("ttft_seconds", "Time to first event, without the time in the hold.", "histogram")
        for labels, track in each:
            yield from _histogram("ttft_seconds", labels, track.total.first)
        yield from _head("held_seconds", "Time in the hold, of requests that waited there.", "histogram")
        for labels, track in whole:
            yield from _histogram("held_seconds", labels, track.total.held)


def _head(name: str, words: str, kind: str) -> tuple[str, str]:
    return f"# HELP fastserve_gateway_{name} {words}", f"# TYPE fastserve_gateway_{name} {kind}"


def _histogram(name: str, labels: str, times: Times) -> Iterator[str]:
    for bound in _BOUNDS_MS:
        yield f'fastserve_gateway_{name}_bucket{{{labels},le="{bound / 1000:g}"}} {times.up_to(bound)}'
    yield f'fastserve_gateway_{name}_bucket{{{labels},le="+Inf"}} {times.count}'
    yield f"fastserve_gateway_{name}_sum{{{labels}}} {times.sum_ms / 1000:.6f}"
    yield f"fastserve_gateway_{name}_count{{{labels}}} {times.count}"


def _since(query: str) -> float:
    """The Unix second that is asked for; 0 without one. Raises Refusal (400) that names `since`."""
    given = parse_qs(query).get("since", ["0"])
    try:
        since = float(given[0])
    except ValueError:
        since = math.nan
    if len(given) != 1 or not math.isfinite(since) or since < 0:
        raise bad_request("'since' is not a Unix time in seconds.", "since")
    return since
