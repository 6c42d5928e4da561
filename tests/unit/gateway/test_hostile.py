"""Requests that are made to break in: a table of raw bytes, each with the statuses it may get, and none of them 200."""

from __future__ import annotations

import asyncio
import json

import pytest

from fastserve.gateway.keys import digest, new_key

KEY = "fs-" + "k" * 40
BODY = json.dumps({"model": "chat", "messages": [{"role": "user", "content": "hi"}]})


def get(
    target: str, host: str | None = "localhost", auth: str | None = KEY, method: str = "GET", more: str = ""
) -> bytes:
    lines = [f"{method} {target} HTTP/1.1"]
    lines += [] if host is None else [f"Host: {host}"]
    lines += [] if auth is None else [f"Authorization: Bearer {auth}"]
    return ("\r\n".join(lines) + "\r\n" + more + "\r\n").encode("latin-1")


def post(body: str = BODY, more: str = "", target: str = "/v1/chat/completions", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    head = f"Content-Type: application/json\r\nContent-Length: {size}\r\n{more}"
    return get(target, method="POST", more=head) + body.encode()


SPELLINGS = [
    *("//v1/models", "/v1//models", "/v1/models/", "/V1/models", "/v1/Models", "/./v1/models", "/v1/./models"),
    *("/v1/../v1/models", "/v1/../metrics", "/x/../v1/models", "/v1/models/..", "/v1/models/../chat", "/v1/models/."),
    *("/%761/models", "/v1%2fmodels", "/v1/%6dodels", "/%2e%2e/v1/models", "/v1/%2e%2e/metrics", "/v1/models%00"),
    *("/v1/models;x=1", "/v1\\models", "/v1/models\\", "/v1/models%20", "/v1/models%3f", "/v1/models/chat/extra"),
    *("/v1/models/%63hat", "/v1/models/chat%00", "/v1/models/chat;x", "/v1/models//chat", "/v1/models/../../healthz"),
    *("/healthz/", "//healthz", "/healthz/../v1/models", "/healthz%2f..", "/-/routes", "/-/healthz", "/metrics"),
    *("/docs", "/openapi.json", "/tokenize", "/detokenize", "/pause", "/resume", "/sleep", "/wake_up", "/invocations"),
    *("/update_weights", "/collective_rpc", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/pooling", "/version"),
    *(
        "/v1/responses",
        "/v1/messages",
        "/inference/v1/generate",
        "/v1/files",
        "/v1/audio/speech",
        "/api/serve/applications/",
    ),
    *("/m/chat/aaaaaaaa/v1/models", "/", "*", "/.env", "/v1", "/v1/", "/v1/chat", "/v1/chat/completions/"),
    *("http://localhost/v1/models", "http://evil/v1/models", "http://127.0.0.1:8265/api/jobs/", "file:///etc/passwd"),
    *("v1/models", "localhost:80", "///", "/v1/models#/../x", "/v1/models/#", "/v1/models/?x", "/\u00e9"),
]
HOSTS = [
    "a/?x=",
    "x/health?",
    "a b",
    "a@b",
    "a#b",
    "a\\b",
    "http://a",
    "a,b",
    "",
    "a:b",
    "a:999999",
    "[::1",
    "a%2f",
    "\u00e9",
]
METHODS = ["PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "PROPFIND", "POST"]
TORN = {
    "no HTTP": b"hello\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64 + b"\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/9.9": b"GET /v1/models HTTP/9.9\r\nHost: a\r\nAuthorization: Bearer " + KEY.encode() + b"\r\n\r\n",
    "CONNECT": get("127.0.0.1:8265", method="CONNECT"),
    "two lengths": post(more="Content-Length: 3\r\n"),
    "length and chunked": post(more="Transfer-Encoding: chunked\r\n"),
    "unknown coding": get("/v1/chat/completions", method="POST", more="Transfer-Encoding: xchunked\r\n")
    + BODY.encode(),
    "negative length": post(length=-1),
    "length with sign": get("/v1/chat/completions", method="POST", more="Content-Length: +5\r\n") + b"hello",
    "length with underscore": get("/v1/chat/completions", method="POST", more="Content-Length: 1_0\r\n") + b"hello",
    "bad chunk": get("/v1/chat/completions", method="POST", more="Transfer-Encoding: chunked\r\n")
    + b"zz\r\nhi\r\n0\r\n\r\n",
    "header without colon": get("/v1/models", more="broken header\r\n"),
    "folded header": get("/v1/models", more="X: a\r\n b\r\n"),
    "blank before colon": get("/v1/models", more="X : a\r\n"),
    "NUL in a header": get("/v1/models", more="X: a\0b\r\n"),
    "header of 9 KB": get("/v1/models", more=f"X: {'a' * 9000}\r\n"),
    "path of 9 KB": get("/v1/models?" + "a" * 9000),
    "200 headers": get("/v1/models", more="".join(f"X{n}: a\r\n" for n in range(200))),
    "key of 10 KB": get("/v1/models", auth="a" * 10_000),
    "two keys": get("/v1/models", more=f"Authorization: Bearer {KEY}\r\n"),
    "two hosts": get("/v1/models", more="Host: b\r\n"),
    "no host": get("/v1/models", host=None),
    "key in the query": get(f"/v1/models?api_key={KEY}", auth=None),
    "key in x-api-key": get("/v1/models", auth=None, more=f"X-Api-Key: {KEY}\r\n"),
    "key as basic": get("/v1/models", auth=None, more="Authorization: Basic OmZz\r\n"),
    "hash instead of key": get("/v1/models", auth=digest(KEY)),
    "another key": get("/v1/models", auth=new_key()),
    "key cut": get("/v1/models", auth=KEY[:-1]),
    "key longer": get("/v1/models", auth=KEY + "k"),
    "key with a quote": get("/v1/models", auth="' OR (SELECT sleep(9)) OR '"),
    "not JSON": post("{"),
    "two JSON values": post("{}{}"),
    "a list": post("[1]"),
    "a number": post("7"),
    "empty": post(""),
    "NaN": post('{"model":"chat","messages":[{"role":"user","content":"hi"}],"temperature":NaN}'),
    "infinity": post('{"model":"chat","messages":[{"role":"user","content":"hi"}],"temperature":1e999}'),
    "5,000 digits": post('{"model":"chat","n":' + "9" * 5000 + "}"),
    "nested 100,000 deep": post("[" * 100_000 + "]" * 100_000),
    "objects 50,000 deep": post('{"a":' * 50_000 + "1" + "}" * 50_000),
    "half a surrogate pair": post('{"model":"chat","messages":[{"role":"user","content":"\\ud800"}]}'),
    "model of 100 KB": post(json.dumps({"model": "m" * 100_000, "messages": []})),
    "model with a path": post(BODY.replace('"chat"', '"../chat"')),
    "model with a line end": post(BODY.replace('"chat"', '"chat\\r\\nX: y"')),
    "model is a list": post(BODY.replace('"chat"', '["chat"]')),
    "body too long": post(length=5 * 2**20),
}


def statuses(answer: bytes) -> list[int]:
    """Statuses of all answers in what came back."""
    parts = answer.split(b"HTTP/1.")[1:]
    return [int(part[2:5]) for part in parts]


CASES = [
    *((f"spelling {target}", get(target)) for target in SPELLINGS),
    *(
        (f"spelling {target} without key", get(target, auth=None))
        for target in ("/v1/models", "/v1/models/chat", "/metrics")
    ),
    *((f"host {host!r}", get("/v1/models", host=host)) for host in HOSTS),
    *((f"host {host!r} without key", get("/v1/models", host=host, auth=None)) for host in HOSTS),
    *((f"method {method}", get("/v1/models", method=method)) for method in METHODS),
    *TORN.items(),
]


@pytest.mark.parametrize("request_bytes", [case for _, case in CASES], ids=[name for name, _ in CASES])
def test_no_hostile_request_opens_anything(play, request_bytes):
    async def scenario(stand):
        engine = await stand.one_engine()
        answer = await stand.raw(request_bytes)
        assert answer, "no answer at all"
        for status in statuses(answer):
            assert status in (400, 401, 404, 405, 413), answer
        head, _, body = answer.partition(b"\r\n\r\n")
        if body:
            assert b"\r\nContent-Type: application/json" in head
            assert set(json.loads(body.partition(b"HTTP/1.")[0])["error"]) == {"message", "type", "param", "code"}
        assert engine.asked == []
        # And the gateway is as well as before.
        assert (await stand.ask(path="/v1/models", method="GET")).status == 200

    play(scenario)


def test_there_are_at_least_a_hundred_of_them():
    assert len(CASES) >= 100


def test_a_connection_that_never_sends_its_request_is_closed(play):

    async def scenario(stand):
        reader, writer = await asyncio.open_connection("127.0.0.1", stand.port)
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: a\r\nX-Slow:")
        async with asyncio.timeout(60):
            assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()

    play(scenario, {"idle_seconds": 0.2})


def test_a_body_that_never_ends_is_given_up(play):

    async def scenario(stand):
        await stand.one_engine()
        answer = await stand.raw(post(length=len(BODY) + 1))
        assert statuses(answer) == [408]
        assert b"request_timeout" in answer

    play(scenario, {"body_seconds": 0.1})
