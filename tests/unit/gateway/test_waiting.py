"""Requests that nothing can take yet: held, told, bounded, and served when something can."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from aiohttp import web

from fastserve.gateway.config import Hold, Revision, Target
from fastserve.gateway.patience import COMMENT

SOON = {"first_comment_seconds": 0.05, "comment_seconds": 0.05}


def gate(kit):
    """An engine that answers when it is let."""
    go_on = asyncio.Event()

    async def handler(request, body):
        await go_on.wait()
        return await kit.answers_well(request, body)

    return handler, go_on


async def until(check, seconds=100.0):
    async with asyncio.timeout(seconds):
        while not check():
            await asyncio.sleep(0.005)


async def commented(stand, kit, count=1):
    """A stream that has so many comments, and no answer yet."""
    url = f"http://127.0.0.1:{stand.port}/v1/chat/completions"
    headers = {"Authorization": f"Bearer {kit.KEY}"}
    response = await stand.session.post(url, json=kit.chat(stream=True), headers=headers)
    assert response.status == 200
    assert await response.content.readexactly(count * len(COMMENT)) == COMMENT * count
    return response


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_to_a_model_at_zero_is_answered_when_a_revision_is_there(play, kit, stream):
    async def scenario(stand):
        stand.serve()
        asked = asyncio.create_task(stand.ask(kit.chat(stream=stream)))
        await until(lambda: stand.gateway.hold.waiting("chat") == 1)
        assert stand.stats()["chat"]["held"] == 1
        await asyncio.sleep(0.02)
        await stand.one_engine()
        answer = await asked
        assert answer.status == 200
        assert answer.headers["X-FastServe-Revision"] == "a" * 64
        stats = stand.stats()["chat"]
        assert (stats["held"], stats["running"], stats["heldMs"]["count"]) == (0, 0, 1)
        assert stats["heldMs"]["p50"] > 15

    play(scenario)


def test_a_stream_that_waits_gets_headers_and_comments_and_then_its_answer(play, kit):
    async def scenario(stand):
        stand.serve()
        url = f"http://127.0.0.1:{stand.port}/v1/chat/completions"
        headers = {"Authorization": f"Bearer {kit.KEY}"}
        async with stand.session.post(url, json=kit.chat(stream=True), headers=headers) as response:
            assert (response.status, response.headers["Content-Type"]) == (200, "text/event-stream")
            assert await response.content.readexactly(2 * len(COMMENT)) == COMMENT * 2
            await stand.one_engine()
            rest = await response.content.read()
        events = rest.replace(COMMENT, b"")
        assert events == kit.event("The") + kit.event(" capital") + kit.event(" is Paris") + kit.DONE
        assert rest.rstrip(b"\n").endswith(events.rstrip(b"\n"))  # no comment inside the answer

    play(scenario, SOON)


def test_a_stream_whose_engine_is_slow_to_begin_gets_comments_too(play, kit):
    """A cold start that Ray Serve holds looks like that."""

    async def scenario(stand):
        handler, go_on = gate(kit)
        await stand.one_engine(handler)
        response = await commented(stand, kit, 2)
        go_on.set()
        rest = await response.content.read()
        assert (
            rest.replace(COMMENT, b"") == kit.event("The") + kit.event(" capital") + kit.event(" is Paris") + kit.DONE
        )

    play(scenario, SOON)


def test_headers_and_the_first_comment_come_after_a_second_and_lines_are_only_data_and_comments(play, kit):
    async def scenario(stand):
        stand.serve()
        url = f"http://127.0.0.1:{stand.port}/v1/chat/completions"
        headers = {"Authorization": f"Bearer {kit.KEY}"}
        began = time.monotonic()
        async with stand.session.post(url, json=kit.chat(stream=True), headers=headers) as response:
            got = await response.content.readexactly(len(COMMENT))
            assert time.monotonic() - began > 0.9  # not before: most answers need no comment
            await stand.one_engine()
            got += await response.content.read()
        assert {line[:5] for line in got.splitlines() if line} == {b": wai", b"data:"}

    play(scenario, {"first_comment_seconds": 1.0})


def test_one_that_waits_in_vain_is_told_as_its_kind_needs_it(play, kit):
    async def scenario(stand):
        stand.serve(hold=Hold(seconds=0.2))
        silent = await stand.ask(kit.chat())
        assert (silent.status, silent.error["code"]) == (503, "model_loading")
        assert 0 < int(silent.headers["Retry-After"]) <= 120
        spoken = await stand.ask(kit.chat(stream=True))
        assert spoken.status == 200
        last = spoken.raw.replace(COMMENT, b"")
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "model_loading"
        assert b"[DONE]" not in spoken.raw
        assert stand.stats()["chat"]["refused"] == 2

    play(scenario, SOON)


def test_a_full_line_is_refused_at_once_also_a_stream(play, kit):
    async def scenario(stand):
        stand.serve(hold=Hold(requests=1))
        held = asyncio.create_task(stand.ask(kit.chat()))
        await until(lambda: stand.gateway.hold.waiting("chat") == 1)
        for stream in (True, False):
            answer = await stand.ask(kit.chat(stream=stream))
            assert (answer.status, answer.error["code"]) == (429, "overloaded")
            assert 0 < int(answer.headers["Retry-After"]) <= 120
        await stand.one_engine()
        assert (await held).status == 200
        assert stand.stats()["chat"]["refused"] == 2

    play(scenario)


def test_an_engine_never_has_more_than_its_slots_and_all_are_answered(play, kit):
    most = 0

    async def scenario(stand):
        async def counted(request, body):
            nonlocal most
            most = max(most, stand.gateway.router.running(engine.url))
            await asyncio.sleep(0.01)
            return await kit.answers_well(request, body)

        engine = await stand.one_engine(counted, slots=3)
        answers = await asyncio.gather(*(stand.ask(kit.chat(stream=bool(at % 2))) for at in range(40)))
        assert {answer.status for answer in answers} == {200}
        assert len(engine.asked) == 40
        assert most == 3

    play(scenario)


def test_a_client_that_leaves_while_it_waits_frees_its_place(play, kit):
    async def scenario(stand):
        stand.serve(hold=Hold(requests=1))
        for stream in (False, True):
            body = json.dumps(kit.chat(stream=stream)).encode()
            head = (
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {kit.KEY}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            reader, writer = await asyncio.open_connection("127.0.0.1", stand.port)
            writer.write(head.encode() + body)
            await until(lambda: stand.gateway.hold.waiting("chat") == 1)
            if stream:
                await reader.readuntil(COMMENT)
            writer.close()
            await until(lambda: stand.gateway.hold.waiting("chat") == 0)
        await until(lambda: not stand.gateway._tasks)

    play(scenario, SOON)


def test_a_model_that_is_full_does_not_touch_another(play, kit):
    async def scenario(stand):
        handler, go_on = gate(kit)
        await stand.one_engine(handler, slots=1, hold=Hold(requests=2))
        busy = [asyncio.create_task(stand.ask(kit.chat())) for _ in range(3)]
        await until(lambda: stand.gateway.hold.waiting("chat") == 2)
        assert (await stand.ask(kit.chat())).status == 429
        await stand.one_engine(model="other", slots=1)
        for _ in range(5):
            assert (await stand.ask(kit.chat(model="other"))).status == 200
        go_on.set()
        assert {answer.status for answer in await asyncio.gather(*busy)} == {200}

    play(scenario)


def test_stopping_tells_those_who_wait_and_lets_those_who_run_finish(play, kit):
    async def scenario(stand):
        handler, go_on = gate(kit)
        engine = await stand.one_engine(handler, slots=1)
        runs = asyncio.create_task(stand.ask(kit.chat()))
        await until(lambda: engine.asked)
        waits = asyncio.create_task(stand.ask(kit.chat()))
        spoken = await commented(stand, kit)
        await until(lambda: stand.gateway.hold.waiting("chat") == 2)
        closing = asyncio.create_task(stand.gateway.close(100.0))
        silent = await waits
        assert (silent.status, silent.error["code"]) == (503, "gateway_stopping")
        assert b"gateway_stopping" in await spoken.content.read()
        go_on.set()
        assert (await runs).status == 200
        await closing

    play(scenario, SOON)


def test_a_refused_connection_costs_nothing_while_another_target_can_take_it(play, kit):
    async def scenario(stand):
        good = await stand.engine()
        targets = (Target("http://127.0.0.1:9", 100), Target("http://127.0.0.1:11", 100), Target(good.url, 1))
        stand.serve(Revision("a" * 64, 1, targets))
        answers = await asyncio.gather(*(stand.ask(kit.chat(stream=bool(at % 2))) for at in range(12)))
        assert {answer.status for answer in answers} == {200}
        revision = stand.stats()["chat"]["revisions"]["a" * 64]
        assert (revision["requests"], revision["errors"], revision["running"]) == (12, 0, 0)

    play(scenario)


def test_a_refused_connection_waits_for_a_target_that_comes_up(play, kit):
    async def scenario(stand):
        stand.serve(Revision("a" * 64, 1, (Target("http://127.0.0.1:9"),)))
        asked = asyncio.create_task(stand.ask(kit.chat()))
        await asyncio.sleep(0.1)
        await stand.one_engine()
        answer = await asked
        assert answer.status == 200

    play(scenario)


@pytest.mark.parametrize(
    ("status", "words", "stream"), [(503, "Service Unavailable", True), (404, "Path '/m/one' not found.", False)]
)
def test_what_serve_cannot_take_yet_is_tried_until_it_can(play, kit, status, words, stream):
    """While the next replica comes up, Serve may say several times that it has none."""

    async def scenario(stand):
        async def comes_up(request, body):
            if len(engine.asked) <= 2:
                return web.Response(status=status, text=words)
            return await kit.answers_well(request, body)

        engine = await stand.one_engine(comes_up)
        answer = await stand.ask(kit.chat(stream=stream))
        assert answer.status == 200
        assert answer.raw.endswith(kit.DONE) or not stream
        revision = stand.stats()["chat"]["revisions"]["a" * 64]
        assert (revision["requests"], revision["errors"]) == (1, 0)

    play(scenario, SOON)


def test_a_replica_killed_before_the_first_byte_is_not_seen_by_its_client(play, kit):
    """Serve says 500 for what ran on the replica, 500 or 503 for a moment after, then holds until the next is up."""
    words = {1: (500, "Internal Server Error"), 2: (500, "Internal Server Error")}

    async def scenario(stand):
        async def dies(request, body):
            status, text = words.get(len(engine.asked), (200, ""))
            if status != 200:
                return web.Response(status=status, text=text)
            await asyncio.sleep(0.2)
            return await kit.answers_well(request, body)

        engine = await stand.one_engine(dies)
        answer = await stand.ask(kit.chat())
        assert answer.status == 200
        assert stand.stats()["chat"]["lost"] == 0

    play(scenario)


def test_a_retry_elsewhere_needs_no_hold(play, kit):
    async def scenario(stand):
        async def fails(request, body):
            return web.json_response({"error": {"message": "broken", "code": 500}}, status=500)

        bad, good = await stand.engine(fails), await stand.engine()
        for dead in (bad.url, "http://127.0.0.1:9"):
            revisions = Revision("b" * 64, 1e9, (Target(dead),)), Revision("a" * 64, 1e-9, (Target(good.url),))
            stand.serve(*revisions, hold=Hold(0, 0.0))
            assert (await stand.ask(kit.chat())).status == 200

    play(scenario)


def test_a_dead_direct_target_hands_over_to_the_one_that_holds(play, kit):
    async def scenario(stand):
        serve = await stand.engine()
        direct = await stand.engine()
        stand.serve(Revision("a" * 64, 1, (Target("http://127.0.0.1:9", 4), Target(serve.url, last=True))))
        assert (await stand.ask(kit.chat())).status == 200
        assert len(serve.asked) == 1
        stand.serve(Revision("a" * 64, 1, (Target(direct.url, 4), Target(serve.url, last=True))))
        answers = await asyncio.gather(*(stand.ask(kit.chat(stream=True)) for _ in range(12)))
        assert {answer.status for answer in answers} == {200}
        assert (len(direct.asked), len(serve.asked)) == (12, 1)

    play(scenario)


def test_the_one_that_holds_is_asked_when_the_failed_replica_is_gone(play, kit):
    """An engine that dies says 500 itself, and for a moment through Serve too."""

    async def scenario(stand):
        died = 0.0

        async def dies(request, body):
            nonlocal died
            died = died or time.monotonic()
            return web.json_response({"error": {"message": "engine dead", "code": 500}}, status=500)

        async def dies_for_a_moment(request, body):
            if time.monotonic() - died < 0.4:
                return await dies(request, body)
            return await kit.answers_well(request, body)

        direct, serve = await stand.engine(dies), await stand.engine(dies_for_a_moment)
        stand.serve(Revision("a" * 64, 1, (Target(direct.url, 4), Target(serve.url, last=True))))
        answers = await asyncio.gather(*(stand.ask(kit.chat()) for _ in range(4)))
        assert {answer.status for answer in answers} == {200}
        assert (len(direct.asked), len(serve.asked)) == (4, 4)

    play(scenario)


def test_early_headers_name_no_revision_for_another_may_answer(play, kit):
    async def scenario(stand):
        handler, go_on = gate(kit)
        await stand.one_engine(handler)
        answer = await commented(stand, kit)
        go_on.set()
        assert (await answer.content.read()).endswith(kit.DONE)
        assert "X-FastServe-Revision" not in answer.headers

    play(scenario, SOON)


def test_a_retry_is_allowed_after_comments(play, kit):
    async def scenario(stand):
        async def dies_late(request, body):
            await asyncio.sleep(0.12)
            request.transport.abort()
            return web.Response()

        bad, good = await stand.engine(dies_late), await stand.engine()
        stand.serve(Revision("b" * 64, 1e9, (Target(bad.url),)), Revision("a" * 64, 1e-9, (Target(good.url),)))
        answer = await stand.ask(kit.chat(stream=True))
        assert answer.raw.startswith(COMMENT)
        assert answer.raw.endswith(kit.DONE)
        stats = stand.stats()["chat"]
        assert stats["lost"] == 0
        assert stats["revisions"]["b" * 64]["errors"] == 1
        assert stats["revisions"]["a" * 64]["errors"] == 0

    play(scenario, SOON)


def test_an_engines_refusal_after_comments_is_an_event(play, kit):
    async def scenario(stand):
        async def refuses(request, body):
            await asyncio.sleep(0.12)
            return web.json_response({"error": {"message": "bad", "code": 400}}, status=400)

        await stand.one_engine(refuses)
        answer = await stand.ask(kit.chat(stream=True))
        assert answer.status == 200
        assert json.loads(answer.raw.replace(COMMENT, b"")[6:])["error"]["message"] == "bad"
        assert stand.stats()["chat"]["revisions"]["a" * 64]["errors"] == 0

    play(scenario, SOON)


def test_a_lost_request_goes_before_those_that_have_not_had_a_replica_yet(play, kit):
    order = []

    async def scenario(stand):
        handler, go_on = gate(kit)

        async def good_engine(request, body):
            order.append(body["seed"])
            return await handler(request, body)

        async def dies(request, body):
            await die.wait()
            request.transport.abort()
            return web.Response()

        die = asyncio.Event()
        good, bad = await stand.engine(good_engine), await stand.engine(dies)
        stand.serve(Revision("a" * 64, 1, (Target(bad.url, 1),)))
        first = asyncio.create_task(stand.ask(kit.chat(seed=1)))
        await until(lambda: bad.asked)
        stand.serve(Revision("a" * 64, 1, (Target(good.url, 1),)))
        rest = [asyncio.create_task(stand.ask(kit.chat(seed=2)))]
        await until(lambda: good.asked)
        for seed in (3, 4):
            rest.append(asyncio.create_task(stand.ask(kit.chat(seed=seed))))
            await until(lambda seed=seed: stand.gateway.hold.waiting("chat") == seed - 2)
        die.set()
        await until(lambda: stand.gateway.hold.waiting("chat") == 3)
        go_on.set()
        assert {answer.status for answer in await asyncio.gather(first, *rest)} == {200}
        assert order == [2, 1, 3, 4]

    play(scenario)
