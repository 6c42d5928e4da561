"""Streams: at once, untouched, and never ending without a word."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web

from fastserve.gateway.config import Revision, Target


def dies_after(kit, *pieces):
    """An engine that writes pieces and is then killed."""

    async def handler(request, body):
        if pieces:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            for piece in pieces:
                await response.write(piece)
            await asyncio.sleep(0.02)
        request.transport.abort()
        return web.Response()

    return handler


def plain(status, words):
    async def handler(request, body):
        return web.Response(status=status, text=words)

    return handler


def test_a_stream_arrives_byte_for_byte_with_headers_that_forbid_buffering(play, kit):
    pieces = [kit.event("a"), b": comment\n\n", kit.event("b") + kit.event("c"), kit.DONE]

    async def engine(request, body):
        return await kit.streams(request, pieces)

    async def scenario(stand):
        await stand.one_engine(engine)
        answer = await stand.ask(kit.chat(stream=True))
        assert answer.status == 200
        assert answer.raw == b"".join(pieces)
        assert answer.headers["Content-Type"] == "text/event-stream"
        assert answer.headers["Cache-Control"] == "no-cache"
        assert answer.headers["X-Accel-Buffering"] == "no"
        assert answer.headers["X-Request-Id"]

    play(scenario)


def test_each_event_is_passed_on_before_the_next_is_made(play, kit):
    """The engine makes the next event only when the client has the last: any buffering would wait for ever."""
    go_on = asyncio.Event()

    async def engine(request, body):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(5):
            await response.write(kit.event(str(number)))
            await go_on.wait()
            go_on.clear()
        await response.write(kit.DONE)
        return response

    async def scenario(stand):
        await stand.one_engine(engine)
        url = f"http://127.0.0.1:{stand.port}/v1/chat/completions"
        headers = {"Authorization": f"Bearer {kit.KEY}"}
        async with stand.session.post(url, json=kit.chat(stream=True), headers=headers) as response:
            for number in range(5):
                assert await response.content.readuntil(b"\n\n") == kit.event(str(number))
                go_on.set()
            assert await response.content.read() == kit.DONE

    play(scenario)


def test_no_byte_is_lost_when_many_streams_go_as_fast_as_they_can(play, kit):
    def pieces(seed):
        return [kit.event(f"{seed} {number} " + "x" * (number % 97)) for number in range(1000)]

    async def engine(request, body):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in [*pieces(body["seed"]), kit.DONE]:
            await response.write(piece)
        return response

    async def scenario(stand):
        await stand.one_engine(engine)
        answers = await asyncio.gather(*(stand.ask(kit.chat(stream=True, seed=seed)) for seed in range(8)))
        for seed, answer in enumerate(answers):
            assert answer.raw == b"".join([*pieces(seed), kit.DONE])

    play(scenario)


def test_an_event_in_pieces_is_put_together(play, kit):
    whole = kit.event("one") + kit.event("two") + kit.DONE

    async def engine(request, body):
        return await kit.streams(request, [whole[at : at + 7] for at in range(0, len(whole), 7)], 0.001)

    async def scenario(stand):
        await stand.one_engine(engine)
        assert (await stand.ask(kit.chat(stream=True))).raw == whole

    play(scenario)


@pytest.mark.parametrize("torn", [b"", b'data: {"choices":[{"del'])
def test_a_replica_lost_in_mid_stream_ends_it_with_an_error_and_without_done(play, kit, torn):
    async def scenario(stand):
        await stand.one_engine(dies_after(kit, kit.event("The"), kit.event(" cap") + torn))
        answer = await stand.ask(kit.chat(stream=True))
        assert answer.status == 200
        head, _, last = answer.raw.rstrip(b"\n").rpartition(b"\n\n")
        assert head + b"\n\n" == kit.event("The") + kit.event(" cap")
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "upstream_lost"
        assert b"[DONE]" not in answer.raw

    play(scenario)


def test_the_connection_of_a_lost_stream_is_good_for_the_next_request(play, kit):
    async def scenario(stand):
        await stand.one_engine(dies_after(kit, kit.event("The")))
        body = json.dumps(kit.chat(stream=True)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {kit.KEY}\r\n"
        request = f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        reader, writer = await asyncio.open_connection("127.0.0.1", stand.port)
        for _ in range(3):
            writer.write(request)
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n0\r\n\r\n"), 10)
            assert answer.startswith(b"HTTP/1.1 200")
            assert b"upstream_lost" in answer
        writer.close()

    play(scenario)


def test_a_stream_that_ends_cleanly_without_done_is_lost_too(play, kit):
    async def engine(request, body):
        return await kit.streams(request, [kit.event("The")])

    async def scenario(stand):
        await stand.one_engine(engine)
        assert b"upstream_lost" in (await stand.ask(kit.chat(stream=True))).raw

    play(scenario)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("first", ["dies at once", "dies after headers", "500", "502", "503", "404 of Serve", "nobody"])
def test_a_try_lost_before_the_first_byte_is_made_again_elsewhere(play, kit, first, stream):
    async def headers_then_death(request, body):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(0.01)
        request.transport.abort()
        return response

    handlers = {
        "dies at once": dies_after(kit),
        "dies after headers": headers_then_death,
        "500": plain(500, "Internal Server Error"),
        "502": plain(502, "Bad Gateway"),
        "503": plain(503, "none free"),
        "404 of Serve": plain(404, "Path '/m/one' not found."),
    }

    async def scenario(stand):
        good = await stand.engine()
        bad = "http://127.0.0.1:9" if first == "nobody" else (await stand.engine(handlers[first])).url
        # All the traffic goes to the bad revision; the good one is only there to be the second try.
        stand.serve(Revision("b" * 64, 1e9, (Target(bad),)), Revision("a" * 64, 1e-9, (Target(good.url),)))
        answer = await stand.ask(kit.chat(stream=stream))
        assert answer.status == 200
        assert answer.headers["X-FastServe-Revision"] == "a" * 64
        assert len(good.asked) == 1

    play(scenario)


def test_the_same_target_is_tried_twice_when_it_is_the_only_one(play, kit):
    async def scenario(stand):
        async def dies_once(request, body):
            if len(engine.asked) == 1:
                request.transport.abort()
            return await kit.answers_well(request, body)

        engine = await stand.one_engine(dies_once)
        assert (await stand.ask(kit.chat())).status == 200
        assert len(engine.asked) == 2

    play(scenario)


def test_there_is_one_retry_and_no_more(play, kit):
    async def scenario(stand):
        engine = await stand.one_engine(dies_after(kit))
        answer = await stand.ask(kit.chat())
        assert (answer.status, answer.error["code"]) == (503, "upstream_unavailable")
        assert 0 < int(answer.headers["Retry-After"]) <= 120
        assert len(engine.asked) == 2

    play(scenario)


@pytest.mark.parametrize("status", [400, 413, 429, 504])
def test_what_is_the_requests_own_fault_is_not_tried_again(play, kit, status):
    async def refuses(request, body):
        return web.json_response({"error": {"message": "no", "code": status}}, status=status)

    async def scenario(stand):
        engine = await stand.one_engine(refuses)
        await stand.ask(kit.chat())
        assert len(engine.asked) == 1

    play(scenario)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_the_generation_at_once(play, kit, stream):
    async def engine_for_ever(request, body):
        if body.get("stream"):
            return await kit.streams(request, [kit.event("x")] * 100_000, 0.01)
        await asyncio.sleep(600)
        return web.Response()

    async def scenario(stand):
        engine = await stand.one_engine(engine_for_ever)
        body = json.dumps(kit.chat(stream=stream)).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {kit.KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", stand.port)
        writer.write(head.encode() + body)
        if stream:
            await reader.readuntil(b"data: ")
        else:
            while not engine.asked:
                await asyncio.sleep(0.005)
        assert stand.gateway.router.running(engine.url) == 1
        writer.close()
        async with asyncio.timeout(60):
            await engine.gone.wait()
        await kit.until(lambda: stand.gateway.router.running(engine.url) == 0)
        await kit.until(lambda: stand.gateway._tasks == set())

    play(scenario)


def test_the_whole_time_of_a_request_is_bounded_before_and_in_the_middle_of_an_answer(play, kit):
    async def slow(request, body):
        if body.get("stream"):
            return await kit.streams(request, [kit.event("x")] * 1000, 0.05)
        await asyncio.sleep(60)
        return web.Response()

    async def scenario(stand):
        await stand.one_engine(slow)
        whole = await stand.ask(kit.chat())
        assert (whole.status, whole.error["code"]) == (504, "deadline_exceeded")
        for _ in range(10):  # on a machine that stands still the time may be over before the first event
            streamed = await stand.ask(kit.chat(stream=True))
            if streamed.raw.startswith(kit.event("x")):
                break
        assert streamed.raw.startswith(kit.event("x"))
        assert json.loads(streamed.raw.rstrip().rpartition(b"data: ")[2])["error"]["code"] == "deadline_exceeded"

    play(scenario, read_timeout_seconds=0.2)


def test_a_new_config_does_not_disturb_a_stream_that_runs(play, kit):
    async def scenario(stand):
        async def slow(request, body):
            return await kit.streams(request, [*[kit.event("x")] * 20, kit.DONE], 0.01)

        old = await stand.one_engine(slow)
        running = asyncio.create_task(stand.ask(kit.chat(stream=True)))
        while not old.asked:
            await asyncio.sleep(0.005)
        new = await stand.engine()
        stand.serve(Revision("c" * 64, 100, (Target(new.url),)))
        assert (await stand.ask(kit.chat())).headers["X-FastServe-Revision"] == "c" * 64
        stand.gateway.replace(kit.usual_config())
        assert (await running).raw == kit.event("x") * 20 + kit.DONE

    play(scenario)


def test_stopping_lets_streams_finish_and_cuts_the_rest_with_an_error(play, kit):
    async def scenario(stand):
        go_on = asyncio.Event()

        async def endless_or_short(request, body):
            if body["max_tokens"] > 5:
                return await kit.streams(request, [kit.event("x")] * 10_000, 0.02)
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await response.write(kit.event("x"))
            await go_on.wait()
            await response.write(kit.event("x") * 4 + kit.DONE)
            return response

        await stand.one_engine(endless_or_short)
        url = f"http://127.0.0.1:{stand.port}/v1/chat/completions"
        headers = {"Authorization": f"Bearer {kit.KEY}"}
        short, long = [
            await stand.session.post(url, json=kit.chat(stream=True, max_tokens=count), headers=headers)
            for count in (5, 500)
        ]
        closing = asyncio.create_task(stand.gateway.close(3.0))
        go_on.set()
        assert await short.content.read() == kit.event("x") * 5 + kit.DONE
        rest = await long.content.read()
        await closing
        assert b"gateway_stopping" in rest
        assert b"[DONE]" not in rest

    play(scenario)


def test_a_client_that_does_not_read_makes_the_engine_wait(play, kit):
    made = 0

    async def fire_hose(request, body):
        nonlocal made
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(2000):
            await response.write(kit.event("x" * 50_000))
            made += 1
        return response

    async def scenario(stand):
        engine = await stand.one_engine(fire_hose)
        url = f"http://127.0.0.1:{stand.port}/v1/chat/completions"
        headers = {"Authorization": f"Bearer {kit.KEY}"}
        async with stand.session.post(url, json=kit.chat(stream=True), headers=headers):
            before = -1
            while before != made:
                before = made
                await asyncio.sleep(0.1)
        assert made < 1000
        async with asyncio.timeout(60):
            await engine.gone.wait()

    play(scenario)
