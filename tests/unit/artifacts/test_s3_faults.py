from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import s3_servers

from fastserve.artifacts.s3_store import S3Store
from fastserve.errors import FastServeError, StoreFailed

Application = Callable[[dict[str, Any], Any], Iterable[bytes]]

MIB = 1 << 20


def at(server: s3_servers.S3Server, use: Any, **more: Any) -> S3Store:
    place = use(server)
    bucket = place.uri.removeprefix("s3://").split("/")[0]
    return S3Store(bucket, "some/prefix", endpoint=server.endpoint, **more)


def ignores_conditions(application: Application) -> Application:
    """A server that has never heard of If-None-Match on a PUT."""

    def serve(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        environ.pop("HTTP_IF_NONE_MATCH", None)
        return application(environ, start)

    return serve


def refuses_conditions(application: Application) -> Application:
    """A server that says it cannot."""

    def serve(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        if "HTTP_IF_NONE_MATCH" in environ:
            start("501 Not Implemented", [("Content-Type", "application/xml")])
            return [b"<Error><Code>NotImplemented</Code><Message>no such header</Message></Error>"]
        return application(environ, start)

    return serve


class Breaks:
    """A server whose answers to `method` break off after `after_bytes`, the first `times` of them."""

    def __init__(self, method: str, times: int, after_bytes: int) -> None:
        self.method, self.times, self.after_bytes, self.seen = method, times, after_bytes, 0
        self.armed = False

    def __call__(self, application: Application) -> Application:
        def serve(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
            body = application(environ, start)
            if not self.armed or environ["REQUEST_METHOD"] != self.method or self.seen >= self.times:
                return body
            self.seen += 1
            return self.cut(body)

        return serve

    def cut(self, body: Iterable[bytes]) -> Iterable[bytes]:
        left = self.after_bytes
        for chunk in body:
            yield chunk[:left]
            left -= len(chunk[:left])
            if not left:
                break
        raise ConnectionAbortedError("the line is cut")


def busy(times: int) -> Callable[[Application], Application]:
    """A server that asks to slow down, `times` often."""
    left = [times]

    def around(application: Application) -> Application:
        def serve(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
            if environ["PATH_INFO"].endswith("/object") and left[0]:
                left[0] -= 1
                start("503 Slow Down", [("Content-Type", "application/xml")])
                return [b"<Error><Code>SlowDown</Code><Message>later</Message></Error>"]
            return application(environ, start)

        return serve

    return around


@pytest.mark.parametrize("lacking", [ignores_conditions, refuses_conditions])
def test_without_conditional_writes_writers_take_turns_and_one_wins(lacking: Any, use: Any) -> None:
    with s3_servers.moto_server(lacking) as server:
        stores = [at(server, use, turn_seconds=0.6)]
        stores += [
            S3Store(stores[0].bucket, "some/prefix", endpoint=server.endpoint, turn_seconds=0.6) for _ in range(3)
        ]
        for number in range(3):
            name = f"artifacts/{number}/record.json"
            with ThreadPoolExecutor(4) as pool:
                tries = pool.map(
                    lambda item, name=name: (item[1].create(name, b"%d" % item[0]), item[0]), enumerate(stores)
                )
                won = [writer for first, writer in tries if first]
            assert len(won) == 1
            assert stores[0].read(name) == b"%d" % won[0]
            assert not stores[1].create(name, b"late")
        assert len(stores[0].names("")) == 3


def test_a_turn_whose_holder_died_does_not_block_for_ever(use: Any) -> None:
    from fastserve.artifacts.s3_turns import Turns

    with s3_servers.moto_server(ignores_conditions) as server:
        store = at(server, use)
        turns = Turns(store._client, store.bucket, wait_seconds=0.3, stale_seconds=1.5)
        store._client.put_object(Bucket=store.bucket, Key="x/.fastserve-turn-record.json", Body=b"dead")
        assert turns.create("x/record.json", b"alive")
        assert not turns.create("x/record.json", b"second")


@pytest.mark.parametrize("kind", ["moto", pytest.param("versitygw", marks=pytest.mark.s3)])
def test_a_large_file_travels_in_parts(request: pytest.FixtureRequest, kind: str, use: Any, tmp_path: Path) -> None:
    store = at(request.getfixturevalue(kind), use, part_bytes=5 * MIB)
    (tmp_path / "in").write_bytes(secrets.token_bytes(17 * MIB + 3))
    put = store.put_file("large", tmp_path / "in")
    assert "-4" in store._client.head_object(Bucket=store.bucket, Key="some/prefix/large")["ETag"]
    assert store.get_file("large", tmp_path / "out", put.sha256) == put
    assert (tmp_path / "out").read_bytes() == (tmp_path / "in").read_bytes()


@pytest.mark.parametrize("kind", ["moto", pytest.param("versitygw", marks=pytest.mark.s3)])
def test_an_upload_that_was_left_unfinished_is_invisible_and_swept(
    request: pytest.FixtureRequest, kind: str, use: Any
) -> None:
    store = at(request.getfixturevalue(kind), use)
    for name in ("a/1", "b/1"):
        begun = store._client.create_multipart_upload(Bucket=store.bucket, Key=f"some/prefix/{name}")
        store._client.upload_part(
            Bucket=store.bucket, Key=f"some/prefix/{name}", UploadId=begun["UploadId"], PartNumber=1, Body=b"torn"
        )

    def unfinished() -> int:
        return len(store._client.list_multipart_uploads(Bucket=store.bucket).get("Uploads", []))

    assert store.names("") == []
    if kind != "moto":  # which says of every upload that it began in 2010
        store.sweep("a/")
    assert unfinished() == 2
    store.delete_under("a/")
    assert unfinished() == 1
    store.sweep("b/", older_than_seconds=-86400)
    assert unfinished() == 0


def test_a_download_that_breaks_off_goes_on_where_it_stopped(use: Any, tmp_path: Path) -> None:
    fault = Breaks("GET", times=2, after_bytes=1_500_000)
    with s3_servers.moto_server(fault) as server:
        store = at(server, use)
        data = secrets.token_bytes(4_000_000)
        (tmp_path / "in").write_bytes(data)
        put = store.put_file("x", tmp_path / "in")
        fault.armed = True
        assert store.get_file("x", tmp_path / "out", put.sha256) == put
        assert fault.seen == 2
        assert (tmp_path / "out").read_bytes() == data


def test_a_download_that_cannot_end_leaves_no_file(use: Any, tmp_path: Path) -> None:
    fault = Breaks("GET", times=1000, after_bytes=0)
    with s3_servers.moto_server(fault) as server:
        store = at(server, use)
        store.write("x", b"data")
        fault.armed = True
        with pytest.raises(StoreFailed, match="cannot be reached"):
            store.get_file("x", tmp_path / "new" / "out")
        assert list((tmp_path / "new").iterdir()) == []


def test_a_busy_server_is_asked_again(use: Any) -> None:
    with s3_servers.moto_server(busy(2)) as server:
        store = at(server, use)
        store.write("object", b"x")
        assert store.read("object") == b"x"


def test_a_claim_whose_answer_was_lost_is_still_ours(use: Any) -> None:
    fault = Breaks("PUT", times=1, after_bytes=0)
    with s3_servers.moto_server(fault) as server:
        store = at(server, use)
        assert store.create("first", b"1")
        fault.armed = True
        assert store.create("record.json", b"mine")
        assert fault.seen == 1
        assert not store.create("record.json", b"other")
        assert store.read("record.json") == b"mine"


def every_operation(store: S3Store, tmp_path: Path) -> list[Callable[[], object]]:
    (tmp_path / "in").write_bytes(b"x")
    (tmp_path / "large").write_bytes(b"x" * (17 * MIB))
    return [
        lambda: store.read("a"),
        lambda: store.write("a", b""),
        lambda: store.create("a", b""),
        lambda: store.delete("a"),
        lambda: store.names(""),
        lambda: store.put_file("a", tmp_path / "in"),
        lambda: store.put_file("a", tmp_path / "large"),
        lambda: store.get_file("a", tmp_path / "out"),
        lambda: store.delete_under("a/"),
    ]


def refused(operations: list[Callable[[], object]], words: str, secret: str = "none") -> None:
    for operation in operations:
        with pytest.raises(StoreFailed, match=words) as caught:
            operation()
        assert type(caught.value) is StoreFailed
        assert secret not in str(caught.value)


def test_a_bucket_that_is_not_there_is_named(bucket: Any, tmp_path: Path) -> None:
    store = S3Store("no-such-bucket", "x", endpoint=bucket.open().endpoint)
    operations = every_operation(store, tmp_path)
    refused(operations, "there is no bucket 'no-such-bucket'; create it")


@pytest.mark.s3
def test_wrong_credentials_say_which_variables_to_check(
    versitygw: s3_servers.S3Server, use: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = use(versitygw)
    for name, value in (("AWS_SECRET_ACCESS_KEY", "hunter2hunter2"), ("AWS_ACCESS_KEY_ID", "nobody")):
        monkeypatch.setenv(name, value)
        refused(every_operation(place.open(), tmp_path), "check AWS_ACCESS_KEY_ID", "hunter2")


@pytest.mark.s3
def test_blanks_at_the_ends_of_credentials_do_not_matter(
    versitygw: s3_servers.S3Server, use: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = use(versitygw)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", f"  {versitygw.access_key}\n")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"{versitygw.secret_key}\r\n")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "\n")
    assert place.open().create("a", b"")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("AWS_SECRET_ACCESS_KEY", "hunter2 hunter2", "AWS_SECRET_ACCESS_KEY has a blank inside"),
        ("AWS_SECRET_ACCESS_KEY", "hunter2\x01x", "AWS_SECRET_ACCESS_KEY"),
        ("AWS_SECRET_ACCESS_KEY", " \n", "only one of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_credentials_that_cannot_be_are_named_and_not_shown(
    bucket: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv(name, value)
    refused(every_operation(bucket.open(), tmp_path), words, "hunter2")


def test_no_credentials_at_all_say_what_to_set(
    moto: Any, use: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = use(moto)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    refused(every_operation(place.open(), tmp_path), "no credentials; set AWS_ACCESS_KEY_ID")


def test_a_profile_that_is_not_there_is_an_error_of_the_store(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StoreFailed, match=r"nobody.*AWS_"):
        bucket.open().read("a")


def test_an_endpoint_that_nobody_answers_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    endpoint = f"http://127.0.0.1:{s3_servers.free_port()}"
    refused(every_operation(S3Store("acme", endpoint=endpoint), tmp_path), f"{endpoint} cannot be reached", "hunter2")


def test_a_server_that_speaks_no_s3_is_an_error_of_the_store(use: Any) -> None:
    def other(application: Application) -> Application:
        def serve(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
            if "some/prefix" not in environ["PATH_INFO"] and "prefix=" not in environ["QUERY_STRING"]:
                return application(environ, start)
            start("200 OK", [("Content-Type", "text/html")])
            return [b"<html>hello"]

        return serve

    with s3_servers.moto_server(other) as server, pytest.raises(FastServeError):
        at(server, use).names("")
