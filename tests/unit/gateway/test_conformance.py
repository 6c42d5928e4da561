"""What OpenAI clients depend on: keys, models, errors, limits, headers."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest
from aiohttp import web

from fastserve.gateway.config import Hold, Revision, Target


def test_no_key_is_told_how_to_send_one(play, kit):
    async def scenario(stand):
        await stand.one_engine()
        answer = await stand.ask(kit.chat(), key=None)
        assert answer.status == 401
        assert answer.error["type"] == "invalid_request_error"
        assert answer.error["code"] == "missing_api_key"
        assert answer.headers["WWW-Authenticate"] == "Bearer"

    play(scenario)


def test_unknown_expired_and_malformed_keys_get_the_same_bytes(play, kit):
    async def scenario(stand):
        engine = await stand.one_engine()
        keys = ["fs-" + "x" * 40, kit.EXPIRED, "short", "' OR (SELECT 1)--", "a" * 4000, "ключ" * 8]
        headers = [{"Authorization": f"Bearer {key}"} for key in keys]
        headers += [
            {"Authorization": value} for value in ("Basic abc", "Bearer", kit.KEY, f"Bearer {kit.KEY} {kit.KEY}")
        ]
        answers = [await stand.ask(kit.chat(), key=None, headers=header) for header in headers]
        assert {answer.status for answer in answers} == {401}
        assert len({answer.raw for answer in answers}) == 1
        assert answers[0].error["code"] == "invalid_api_key"
        assert engine.asked == []

    play(scenario)


def test_a_key_works_through_its_last_day(play, kit):
    async def scenario(stand):
        await stand.one_engine()
        assert (await stand.ask(kit.chat(), key=kit.LAST_DAY)).status == 200

    play(scenario)


@pytest.mark.parametrize("form", ["Bearer {}", "bearer {}", "BEARER {}", "Bearer {} ", "Bearer  {}", "Bearer\t{}"])
def test_small_differences_in_the_header_are_forgiven(play, kit, form):
    async def scenario(stand):
        await stand.one_engine()
        answer = await stand.ask(kit.chat(), key=None, headers={"Authorization": form.format(kit.KEY)})
        assert answer.status == 200

    play(scenario)


def test_a_revoked_key_stops_at_once(play, kit):
    async def scenario(stand):
        await stand.one_engine()
        assert (await stand.ask(kit.chat())).status == 200
        config = stand.gateway.config
        stand.gateway.replace(type(config)(port=0, models=config.models, keys=()))
        assert (await stand.ask(kit.chat())).error["code"] == "invalid_api_key"

    play(scenario)


def test_models_lists_what_the_key_may_use_ready_or_not(play, kit):
    async def scenario(stand):
        await stand.one_engine()
        stand.serve(model="other")
        answer = await stand.ask(path="/v1/models", method="GET")
        assert answer.status == 200
        row = {"object": "model", "created": 1764000000, "owned_by": "fastserve"}
        assert answer.json == {"object": "list", "data": [{"id": "chat", **row}, {"id": "other", **row}]}
        narrow = await stand.ask(path="/v1/models", method="GET", key=kit.NARROW)
        assert [entry["id"] for entry in narrow.json["data"]] == ["other"]
        one = await stand.ask(path="/v1/models/other", method="GET", key=kit.NARROW)
        assert one.json == {"id": "other", **row}

    play(scenario)


def test_a_model_that_is_not_allowed_looks_like_one_that_does_not_exist(play, kit):
    async def scenario(stand):
        await stand.one_engine()
        forbidden = await stand.ask(kit.chat(), key=kit.NARROW)
        stand.gateway.replace(kit.usual_config())
        missing = await stand.ask(kit.chat(), key=kit.NARROW)
        assert forbidden.status == missing.status == 404
        assert forbidden.raw == missing.raw
        assert missing.error["code"] == "model_not_found"
        assert missing.error["param"] == "model"
        asked = await stand.ask(path="/v1/models/chat", method="GET", key=kit.NARROW)
        assert asked.raw == missing.raw

    play(scenario)


def test_health_needs_no_key_and_says_only_ok(play):
    async def scenario(stand):
        answer = await stand.ask(path="/healthz", method="GET", key=None)
        assert (answer.status, answer.json) == (200, {"status": "ok"})

    play(scenario)


def test_wrong_path_method_and_content_type_are_answered_as_json(play, kit):
    async def scenario(stand):
        await stand.one_engine()
        assert (await stand.ask(path="/metrics", method="GET")).error["code"] == "route_not_found"
        wrong = await stand.ask(path="/v1/chat/completions", method="GET")
        assert (wrong.status, wrong.headers["Allow"]) == (405, "POST")
        assert wrong.error["code"] == "method_not_allowed"
        assert (await stand.ask({}, path="/v1/models")).headers["Allow"] == "GET"
        form = await stand.ask(kit.chat(), headers={"Content-Type": "application/x-www-form-urlencoded"})
        assert (form.status, form.error["code"]) == (415, "unsupported_media_type")
        packed = await stand.ask(kit.chat(), headers={"Content-Encoding": "gzip"})
        assert (packed.status, packed.error["code"]) == (415, "unsupported_media_type")

    play(scenario)


def test_a_body_one_byte_too_long_is_refused_with_and_without_a_length(play, kit):
    async def scenario(stand):
        await stand.one_engine()
        assert (await stand.ask(data=b"x" * 1000)).error["code"] == "invalid_json"
        answer = await stand.ask(data=b"x" * 1001)
        assert (answer.status, answer.error["code"]) == (413, "request_too_large")
        assert answer.headers["Connection"] == "close"

        async def pieces(last):
            yield b"x" * 500
            yield b"x" * last

        url = f"http://127.0.0.1:{stand.port}/v1/chat/completions"
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {kit.KEY}"}
        for last, status in ((500, 400), (501, 413)):
            async with stand.session.post(url, data=pieces(last), headers=headers) as chunked:
                assert chunked.status == status

    play(scenario, max_body_bytes=1000)


def test_a_client_that_waits_for_continue_gets_it_after_its_key_was_checked(play, kit):
    async def scenario(stand):
        await stand.one_engine()
        body = json.dumps(kit.chat()).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n"
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", stand.port)
        writer.write(f"{head}Authorization: Bearer {kit.KEY}\r\n\r\n".encode())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        writer.write(body)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        writer.close()
        await writer.wait_closed()
        assert (await stand.raw(f"{head}\r\n".encode())).startswith(b"HTTP/1.1 401 ")

    play(scenario)


def test_the_engine_gets_a_fresh_id_and_the_client_both(play, kit):
    async def scenario(stand):
        engine = await stand.one_engine()
        answers = [await stand.ask(kit.chat(), headers={"X-Request-Id": "mine"}) for _ in range(2)]
        inner = [headers["X-Request-Id"] for headers in engine.headers]
        assert inner == [answer.headers["X-Request-Id"] for answer in answers]
        assert len({*inner, "mine"}) == 3
        assert answers[0].headers["X-Client-Request-Id"] == "mine"
        assert "Authorization" not in engine.headers[0]
        long = await stand.ask(kit.chat(), headers={"X-Request-Id": "x" * 129})
        assert "X-Client-Request-Id" not in long.headers

    play(scenario)


def test_unknown_fields_are_left_out_and_named(play, kit):
    async def scenario(stand):
        engine = await stand.one_engine()
        answer = await stand.ask(kit.chat(metadata={"a": 1}, store=True, temperature=0.5, **{"x\r\ny": 1}))
        assert answer.status == 200
        assert answer.headers["X-FastServe-Ignored"] == "metadata, store, x??y"
        assert engine.asked == [kit.chat(temperature=0.5)]

    play(scenario)


def test_the_revision_that_answered_is_named(play, kit):
    async def scenario(stand):
        await stand.one_engine()
        assert (await stand.ask(kit.chat())).headers["X-FastServe-Revision"] == "a" * 64

    play(scenario)


def test_a_route_exists_only_for_models_of_its_task(play, kit):
    async def scenario(stand):
        await stand.one_engine(task="embed")
        wrong = await stand.ask(kit.chat())
        assert (wrong.status, wrong.error["code"]) == (400, "unsupported_endpoint")
        right = await stand.ask({"model": "chat", "input": ["one", "two"]}, path="/v1/embeddings")
        assert right.status == 200
        await stand.one_engine(task="score", model="rank")
        score = {"model": "rank", "text_1": "q", "text_2": ["a", "b"]}
        assert (await stand.ask(score, path="/v1/score")).status == 200

    play(scenario)


def test_a_model_without_a_replica_says_when_to_come_again(play, kit):
    async def scenario(stand):
        for revisions in (
            (),
            (Revision("a" * 64, 100, ()),),
            (Revision("a" * 64, 0, (Target("http://127.0.0.1:1"),)),),
        ):
            stand.serve(*revisions, hold=Hold(seconds=0.05))
            answer = await stand.ask(kit.chat())
            assert (answer.status, answer.error["code"]) == (503, "model_loading")
            assert 0 < int(answer.headers["Retry-After"]) <= 120

    play(scenario)


ENGINE_ERRORS = [
    (400, {"object": "error", "message": "bad", "type": "BadRequestError", "param": "n", "code": 400}, 400, None, "n"),
    (400, {"error": {"message": "bad", "type": "BadRequestError", "param": None, "code": 400}}, 400, None, None),
    (
        400,
        {"error": {"message": "This model's maximum context length is 10 tokens", "type": "B", "code": 400}},
        *(400, "context_length_exceeded", None),
    ),
    (
        422,
        {"detail": [{"loc": ["body", "messages", 0, "role"], "msg": "Field required"}]},
        400,
        None,
        "messages.0.role",
    ),
    (400, {"detail": "words"}, 400, None, None),
    (404, {"error": {"message": "The model `x` does not exist.", "code": 404}}, 404, "model_not_found", "model"),
    (404, {"detail": "Not Found"}, 502, "upstream_failed", None),
    (404, "Path '/m/one' not found. Ping http://.../-/routes for available routes.", 503, "model_loading", None),
    (401, {"error": "Unauthorized"}, 502, "upstream_failed", None),
    (413, {"error": {"message": "too large", "code": 413}}, 413, "request_too_large", None),
    (429, {"error": {"message": "busy", "code": 429}}, 429, "overloaded", None),
    (500, {"error": {"message": "File /secret/path.py", "code": 500}}, 503, "upstream_unavailable", None),
    (500, "Internal Server Error", 503, "upstream_unavailable", None),
    (503, "Service Unavailable", 503, "model_loading", None),
    (504, "Gateway Timeout", 504, "upstream_timeout", None),
    (302, "", 502, "upstream_failed", None),
    (400, "Bad Request", 400, None, None),
]


@pytest.mark.parametrize(("status", "body", "seen", "code", "param"), ENGINE_ERRORS)
def test_every_shape_of_an_engines_error_becomes_ours(play, kit, status, body, seen, code, param):
    async def fails(request, asked):
        if isinstance(body, str):
            return web.Response(status=status, text=body)
        return web.json_response(body, status=status)

    async def scenario(stand):
        await stand.one_engine(fails, hold=Hold(seconds=0.1))
        answer = await stand.ask(kit.chat())
        assert (answer.status, answer.error["code"], answer.error["param"]) == (seen, code, param)
        assert b"secret" not in answer.raw
        assert b"routes" not in answer.raw
        assert (seen in (429, 503)) == ("Retry-After" in answer.headers)

    play(scenario)


def test_an_answer_that_is_neither_json_nor_events_is_not_passed_on(play, kit):
    async def html(request, asked):
        return web.Response(text="<html>inside</html>", content_type="text/html")

    async def scenario(stand):
        await stand.one_engine(html)
        answer = await stand.ask(kit.chat())
        assert answer.status >= 500
        assert "inside" not in answer.error["message"]

    play(scenario)


def test_the_log_has_one_line_a_request_without_prompt_answer_or_key(play, kit, caplog):
    caplog.set_level(logging.INFO, logger="fastserve.gateway.access")

    async def scenario(stand):
        await stand.one_engine()
        secret = [{"role": "user", "content": "a very private prompt"}]
        await stand.ask({"model": "chat", "messages": secret, "stream": True})
        await stand.ask({"model": "chat", "messages": secret})
        await stand.ask(kit.chat(model="a-private-invention"))
        await stand.ask(path="/healthz", method="GET")

    play(scenario)
    lines = [record.fields for record in caplog.records if record.name == "fastserve.gateway.access"]
    assert [line["status"] for line in lines] == [200, 200, 404]
    assert [line["tokensOut"] for line in lines] == [3, 3, None]
    assert lines[0]["key"] == "team"
    assert lines[0]["model"] == "chat"
    assert lines[0]["revision"] == "a" * 64
    assert 0 < lines[0]["firstByteMs"] <= lines[0]["totalMs"]
    written = json.dumps(lines) + caplog.text
    for word in ("private", "Paris", kit.KEY):
        assert word not in written


def test_a_hundred_requests_on_kept_connections_leave_no_task_behind(play, kit):
    async def scenario(stand):
        await stand.one_engine()
        answers = await asyncio.gather(*(stand.ask(kit.chat(stream=True)) for _ in range(100)))
        assert {answer.status for answer in answers} == {200}
        await kit.until(lambda: stand.gateway._tasks == set())

    play(scenario)
