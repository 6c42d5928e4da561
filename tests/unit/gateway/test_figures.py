"""Figures by revision: what is counted, since when, and that nobody else can read or grow them."""

from __future__ import annotations

import asyncio
import math
import random
import re
import sys
import time

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from fastserve.gateway.config import Hold, Revision, Served, Target
from fastserve.gateway.keys import digest
from fastserve.gateway.statistics import MOST_REVISIONS, Statistics
from fastserve.gateway.tally import KEPT_SECONDS, Times, Track

TOKEN = "fs-" + "t" * 40
OPEN = {"admin_port": 1, "admin_sha256": digest(TOKEN)}


@given(st.lists(st.floats(0.01, 600_000), min_size=1, max_size=200), st.sampled_from([0.5, 0.95, 1.0]))
def test_a_percentile_is_right_within_two_percent(values, share):
    times = Times()
    for value in values:
        times.add(value)
    exact = max(0.1, sorted(values)[math.ceil(share * len(values)) - 1])
    assert times.percentile(share) == pytest.approx(exact, rel=0.021, abs=0.01)


def test_without_times_there_is_no_percentile():
    assert Times().to_json() == {"p50": None, "p95": None, "count": 0}


def test_what_is_asked_for_is_what_happened_since_then():
    track = Track()
    for second in (100, 101, 101, 105):
        for tally in track.at(second):
            tally.requests += 1
    assert [track.since(second).requests for second in (0, 100, 101, 102, 105, 106)] == [4, 4, 3, 1, 1, 0]
    assert track.total.requests == 4


def test_seconds_are_forgotten_and_memory_does_not_grow():
    track = Track()
    some = random.Random(0)

    def live(seconds):
        for second in seconds:
            for _ in range(5):
                for tally in track.at(second):
                    tally.requests += 1
                    tally.first.add(some.uniform(0.1, 1e6))

    live(range(KEPT_SECONDS))
    assert track.since(0).requests == 5 * KEPT_SECONDS
    live(range(KEPT_SECONDS, 5 * KEPT_SECONDS))
    assert len(track._seconds) == KEPT_SECONDS
    assert track.since(0).requests == 5 * KEPT_SECONDS
    assert len(track.total.first.seen) <= 401
    assert sys.getsizeof(track.total.first.seen) < 64_000


def test_revisions_that_are_gone_are_forgotten_but_not_while_they_can_be_asked_for():
    now = 1000.0
    statistics = Statistics(lambda: now)
    statistics.run("m", "old").end(tokens=3)
    statistics.run("m", "new").end()
    models = {"m": Served("generate", 0, (Revision("new", 1, (Target("http://1"),)),))}
    statistics.replace(models)
    assert set(statistics.to_json(0, models, lambda _: 0)["models"]["m"]["revisions"]) == {"old", "new"}
    now += KEPT_SECONDS + 1
    statistics.replace(models)
    assert set(statistics.to_json(0, models, lambda _: 0)["models"]["m"]["revisions"]) == {"new"}
    statistics.replace({})
    assert statistics.to_json(0, {}, lambda _: 0)["models"] == {}
    for number in range(3 * MOST_REVISIONS):
        statistics.run("m", str(number)).end()
    assert len(statistics.tracks()[1]["m"]) == MOST_REVISIONS


def test_since_is_never_before_the_start_or_what_is_kept():
    now = 1000.0
    statistics = Statistics(lambda: now)
    assert statistics.to_json(5, {}, lambda _: 0) == {"at": 1000, "started": 1000, "since": 1000, "models": {}}
    now = 5000.0
    assert statistics.to_json(4999, {}, lambda _: 0)["since"] == 4999
    assert statistics.to_json(0, {}, lambda _: 0)["since"] == 5000 - KEPT_SECONDS


def test_streams_and_whole_answers_are_counted_by_revision(play, kit):
    async def scenario(stand):
        async def paced(request, body):
            if not body.get("stream"):
                return await kit.answers_well(request, body)
            return await kit.streams(request, [*[kit.event("x")] * 11, kit.DONE], 0.01)

        await stand.one_engine(paced)
        await asyncio.gather(*(stand.ask(kit.chat(stream=True)) for _ in range(3)))
        await stand.ask(kit.chat())
        revision = stand.stats()["chat"]["revisions"]["a" * 64]
        assert (revision["requests"], revision["errors"], revision["lost"], revision["running"]) == (4, 0, 0, 0)
        assert revision["tokens"] == 3 * 11 + 3
        assert revision["ttftMs"]["count"] == 3
        assert 0 < revision["ttftMs"]["p50"] <= revision["ttftMs"]["p95"]
        assert revision["tokensPerSecond"]["count"] == 3
        speed = revision["tokensPerSecond"]
        assert 1 < speed["mean"] < 101
        assert 1 < speed["p5"] <= speed["p50"] < 103
        assert stand.stats()["chat"]["heldMs"]["count"] == 0

    play(scenario)


def test_time_to_first_event_is_without_the_hold(play, kit):
    async def scenario(stand):
        stand.serve()
        began = time.monotonic()
        asked = asyncio.create_task(stand.ask(kit.chat(stream=True)))
        await asyncio.sleep(0.5)
        await stand.one_engine()
        await asked
        whole_ms = 1000 * (time.monotonic() - began)
        stats = stand.stats()["chat"]
        held_ms, first_ms = stats["heldMs"]["p50"], stats["revisions"]["a" * 64]["ttftMs"]["p50"]
        assert held_ms > 450
        assert held_ms + first_ms < 1.05 * whole_ms  # as it is told in steps of a few percent

    play(scenario)


def test_errors_are_the_revisions_own_also_when_a_retry_saved_the_request(play, kit):
    async def scenario(stand):
        async def fails(request, body):
            return web.json_response({"error": {"message": "broken", "code": 500}}, status=500)

        bad, good = await stand.engine(fails), await stand.engine()
        stand.serve(Revision("b" * 64, 1e9, (Target(bad.url),)), Revision("a" * 64, 1e-9, (Target(good.url),)))
        assert (await stand.ask(kit.chat())).status == 200
        revisions = stand.stats()["chat"]["revisions"]
        assert (revisions["b" * 64]["requests"], revisions["b" * 64]["errors"]) == (1, 1)
        assert (revisions["a" * 64]["requests"], revisions["a" * 64]["errors"]) == (1, 0)
        assert stand.stats()["chat"]["lost"] == 0

    play(scenario)


def test_a_cut_stream_is_an_error_and_lost(play, kit):
    async def scenario(stand):
        async def torn(request, body):
            return await kit.streams(request, [kit.event("The"), b'data: {"cho'])

        await stand.one_engine(torn)
        await stand.ask(kit.chat(stream=True))
        stats = stand.stats()["chat"]
        revision = stats["revisions"]["a" * 64]
        assert (stats["lost"], revision["lost"], revision["errors"], revision["requests"]) == (1, 1, 1, 1)

    play(scenario)


@pytest.mark.parametrize(("status", "errors"), [(400, 0), (404, 0), (413, 0), (429, 0), (504, 1), (302, 1)])
def test_a_clients_fault_is_no_error_of_the_revision(play, kit, status, errors):
    async def scenario(stand):
        async def refuses(request, body):
            return web.json_response({"error": {"message": "no", "code": status}}, status=status)

        await stand.one_engine(refuses, hold=Hold(seconds=0.1))
        await stand.ask(kit.chat())
        revision = stand.stats()["chat"]["revisions"]["a" * 64]
        assert (revision["requests"], revision["errors"]) == (1, errors)
        assert stand.stats()["chat"]["lost"] == 0

    play(scenario)


async def endless(kit, request):
    return await kit.streams(request, [kit.event("x")] * 10_000, 0.05)


def test_a_client_that_leaves_is_no_error(play, kit):
    async def scenario(stand):
        await stand.one_engine(lambda request, body: endless(kit, request))
        url = f"http://127.0.0.1:{stand.port}/v1/chat/completions"
        headers = {"Authorization": f"Bearer {kit.KEY}"}
        async with stand.session.post(url, json=kit.chat(stream=True), headers=headers) as response:
            await response.content.readany()
            response.close()
        await kit.until(lambda: stand.stats()["chat"]["running"] == 0)
        revision = stand.stats()["chat"]["revisions"]["a" * 64]
        assert (revision["requests"], revision["errors"], revision["running"]) == (1, 0, 0)

    play(scenario)


def test_an_answer_that_takes_too_long_is_an_error(play, kit):
    async def scenario(stand):
        await stand.one_engine(lambda request, body: endless(kit, request))
        await stand.ask(kit.chat(stream=True))
        revision = stand.stats()["chat"]["revisions"]["a" * 64]
        assert (revision["requests"], revision["errors"]) == (1, 1)

    play(scenario, read_timeout_seconds=0.2)


class Door:
    """A client of the admin port."""

    def __init__(self, session, port):
        self._session = session
        self._url = f"http://127.0.0.1:{port}"

    async def get(self, path, token=TOKEN, method="GET", **more):
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        async with self._session.request(method, f"{self._url}{path}", headers=headers, **more) as response:
            body = await response.text()
            return response.status, body if "text/plain" in response.headers["Content-Type"] else await response.json()


async def open_door(stand, kit):
    runner = web.ServerRunner(stand.gateway.admin.server, shutdown_timeout=0.1)
    port = await kit.listen(runner)
    stand.stack.push_async_callback(runner.cleanup)
    return Door(await stand.stack.enter_async_context(aiohttp.ClientSession()), port)


def test_only_the_token_opens_the_admin_port(play, kit):
    async def scenario(stand):
        door = await open_door(stand, kit)
        assert (await door.get("/stats"))[0] == 200
        for token in (None, "", kit.KEY, TOKEN + "x", digest(TOKEN), "x" * 300):
            for path in ("/stats", "/metrics", "/"):
                status, body = await door.get(path, token)
                assert (status, body["error"]["code"]) == (401, "invalid_token")
        assert (await door.get("/"))[0] == 404
        assert (await door.get("/v1/models"))[0] == 404
        assert (await door.get("/stats", method="POST"))[0] == 405
        assert (await stand.ask(path="/stats", method="GET")).status == 404
        assert (await stand.ask(path="/v1/models", method="GET", key=TOKEN)).status == 401

    play(scenario, **OPEN)


def test_without_a_token_in_the_config_nothing_opens_it(play, kit):
    async def scenario(stand):
        door = await open_door(stand, kit)
        assert (await door.get("/stats", ""))[0] == 401
        assert (await door.get("/stats"))[0] == 401

    play(scenario)


def test_stats_answers_what_was_asked_for(play, kit):
    async def scenario(stand):
        door = await open_door(stand, kit)
        await stand.one_engine()
        await stand.ask(kit.chat(stream=True))
        _, body = await door.get("/stats?since=0")
        assert set(body) == {"at", "started", "since", "models"}
        assert body["since"] == body["started"]
        chat = body["models"]["chat"]
        assert set(chat) == {"held", "running", "refused", "lost", "heldMs", "revisions"}
        assert chat["revisions"]["a" * 64]["requests"] == 1
        _, later = await door.get(f"/stats?since={body['at'] + 5}")
        assert later["models"]["chat"]["revisions"]["a" * 64]["requests"] == 0
        for wrong in ("x", "nan", "inf", "-1", "1&since=2"):
            status, refusal = await door.get(f"/stats?since={wrong}")
            assert (status, refusal["error"]["param"]) == (400, "since")

    play(scenario, **OPEN)


LINE = re.compile(r'fastserve_gateway_[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? [0-9.e+-]+')


def test_metrics_are_prometheus_text_and_no_client_can_make_a_series(play, kit):
    async def scenario(stand):
        door = await open_door(stand, kit)
        await stand.one_engine(hold=Hold(seconds=0.05))
        await stand.ask(kit.chat(stream=True))
        _, before = await door.get("/metrics")
        assert 'fastserve_gateway_requests_total{model="chat",revision="aaaaaaaaaaaaaaaa"} 1' in before
        assert 'fastserve_gateway_ttft_seconds_count{model="chat",revision="aaaaaaaaaaaaaaaa"} 1' in before
        assert 'fastserve_gateway_held{model="chat"} 0' in before
        for line in before.splitlines():
            assert line.startswith("# ") or LINE.fullmatch(line), line
        for number in range(50):
            await stand.ask(kit.chat(model=f"private-{number}"))
            await stand.ask(path=f"/private/{number}", method="BREW")
        _, after = await door.get("/metrics")
        assert len(after.splitlines()) == len(before.splitlines())
        assert "private" not in after
        buckets = re.findall(r'ttft_seconds_bucket\{[^}]*le="([^"]+)"\} (\d+)', after)
        counts = [int(count) for _, count in buckets]
        assert counts == sorted(counts)
        assert buckets[-1] == ("+Inf", "1")

    play(scenario, **OPEN)
