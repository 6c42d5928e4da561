from __future__ import annotations

import hashlib
import os
import secrets
import string
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastserve.artifacts.durable import create_file, rename_if_free
from fastserve.artifacts.folder_store import FolderStore
from fastserve.artifacts.s3_store import S3Store
from fastserve.artifacts.store import Store, check_name
from fastserve.artifacts.stores import open_store
from fastserve.errors import ArtifactNotFound, DigestMismatch, FastServeError, StoreFailed, UsageInvalid

REFUSED = [
    "", "/etc/passwd", "../up", "a/../b", "a/./b", "a//b", "a/", "back\\slash", "nul\0", "line\nbreak", "del\x7f",
    "\ud800", "x" * 256, "/".join(["long"] * 300), ".fastserve-1-2.tmp", "a/.fastserve/b", "\x85",
]  # fmt: skip


def test_what_was_written_is_read_and_replaced(store: Store) -> None:
    store.write("a/b.json", b"one")
    store.write("a/b.json", b"two")
    assert store.read("a/b.json") == b"two"


def test_a_name_that_is_not_there_is_an_error_that_names_it(store: Store) -> None:
    with pytest.raises(ArtifactNotFound, match=r"a/none\.json"):
        store.read("a/none.json")


def test_a_name_is_created_once_and_keeps_its_first_content(store: Store) -> None:
    assert store.create("a/claim.json", b"first")
    assert not store.create("a/claim.json", b"second")
    assert store.read("a/claim.json") == b"first"


def test_of_many_creators_at_once_exactly_one_wins(store: Store) -> None:
    for attempt in range(5):
        name = f"race/{attempt}"
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda writer, name=name: (store.create(name, str(writer).encode()), writer), range(8)))
        winners = [writer for first, writer in won if first]
        assert len(winners) == 1
        assert store.read(name) == str(winners[0]).encode()


def test_names_are_listed_by_any_beginning(store: Store) -> None:
    names = ["a/b/1", "a/b/2", "a/bc", "b", "a/ü ber+%41&?#.txt"]
    for name in names:
        store.write(name, name.encode())
    assert store.names("") == sorted(names)
    assert store.names("a/b/") == ["a/b/1", "a/b/2"]
    assert store.names("a/b") == ["a/b/1", "a/b/2", "a/bc"]
    assert store.names("a/ü") == ["a/ü ber+%41&?#.txt"]
    assert store.names("none/") == []
    assert store.read("a/ü ber+%41&?#.txt") == "a/ü ber+%41&?#.txt".encode()


def test_deleting_twice_is_as_deleting_once(store: Store) -> None:
    store.write("a", b"")
    store.delete("a")
    store.delete("a")
    assert store.names("") == []


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_some_store_cannot_hold_is_refused_by_all(tmp_path: Path, name: str) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x")
    for store in (FolderStore(tmp_path / "store"), S3Store("bucket", endpoint="http://127.0.0.1:1")):
        tries = [
            lambda s: s.read(name),
            lambda s: s.write(name, b""),
            lambda s: s.create(name, b""),
            lambda s: s.delete(name),
            lambda s: s.put_file(name, source),
            lambda s: s.get_file(name, tmp_path / "into"),
            lambda s: s.folder(name),
        ]
        for operation in tries:
            if name == "a/" and operation is tries[-1]:
                continue
            with pytest.raises(StoreFailed):
                operation(store)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@given(st.text(max_size=30))
def test_a_checked_name_never_leaves_its_folder(name: str) -> None:
    try:
        check_name(name)
    except StoreFailed:
        return
    path = os.path.normpath(f"/store/{name}")
    assert path == f"/store/{name}"


def test_a_file_comes_back_with_its_checksum(store: Store, tmp_path: Path) -> None:
    data = secrets.token_bytes(3_000_000)
    (tmp_path / "in").write_bytes(data)
    put = store.put_file("x/weights.safetensors", tmp_path / "in")
    got = store.get_file("x/weights.safetensors", tmp_path / "new" / "out", put.sha256)
    assert put == got
    assert (got.size_bytes, got.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert (tmp_path / "new" / "out").read_bytes() == data


def test_an_empty_file_is_a_file(store: Store, tmp_path: Path) -> None:
    (tmp_path / "in").touch()
    store.put_file("empty", tmp_path / "in")
    assert store.get_file("empty", tmp_path / "out").size_bytes == 0
    assert (tmp_path / "out").read_bytes() == b""


def test_wrong_bytes_are_named_and_leave_no_file(store: Store, tmp_path: Path) -> None:
    store.write("x/y", b"not these")
    with pytest.raises(DigestMismatch, match="x/y"):
        store.get_file("x/y", tmp_path / "out" / "y", "0" * 64)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_is_deleted_with_all_that_is_under_it_and_nothing_beside(store: Store) -> None:
    for name in ("a/1", "a/b/2", "ab"):
        store.write(name, b"x")
    store.delete_under("a/")
    store.delete_under("a/")
    assert store.names("") == ["ab"]
    with pytest.raises(StoreFailed):
        store.delete_under("a")


def test_a_store_opens_again_by_its_own_address(store: Store) -> None:
    store.write("a", b"here")
    assert open_store(store.uri).read("a") == b"here"


_NAMES = st.sampled_from(["a/x", "a/y", "b/x", "c"])
_STEPS = st.lists(
    st.tuples(st.sampled_from(["write", "create", "delete", "wipe"]), _NAMES, st.binary(max_size=8)), max_size=12
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_STEPS)
def test_every_store_behaves_like_a_dictionary(store: Store, steps: list[tuple[str, str, bytes]]) -> None:
    base = "".join(secrets.choice(string.ascii_lowercase) for _ in range(12)) + "/"
    model: dict[str, bytes] = {}
    for kind, name, data in steps:
        if kind == "write":
            store.write(base + name, data)
            model[name] = data
        elif kind == "create":
            assert store.create(base + name, data) == (name not in model)
            model.setdefault(name, data)
        elif kind == "delete":
            store.delete(base + name)
            model.pop(name, None)
        else:
            store.delete_under(base + "a/")
            model = {key: value for key, value in model.items() if not key.startswith("a/")}
        assert store.names(base) == sorted(base + key for key in model)
    assert {key: store.read(base + key) for key in model} == model


def test_a_folder_without_hard_links_still_lets_one_writer_win(tmp_path: Path) -> None:
    # renameat2 is what create_file falls back to; it must refuse as a link does.
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    assert rename_if_free(tmp_path / "one", tmp_path / "target")
    assert not rename_if_free(tmp_path / "two", tmp_path / "target")
    assert (tmp_path / "target").read_text() == "one"
    with pytest.raises(FileNotFoundError):
        rename_if_free(tmp_path / "none", tmp_path / "other")
    assert not create_file(tmp_path / "target", b"three")


def test_what_a_killed_writer_left_is_swept_once_it_is_old(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.write("a/kept", b"x")
    old, new = tmp_path / "a" / ".fastserve-1-aa.tmp", tmp_path / "a" / ".fastserve-2-bb.tmp"
    for path in (old, new):
        path.write_bytes(b"torn")
    os.utime(old, (0, 0))
    assert store.names("") == ["a/kept"]
    store.sweep("a/")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [new.name, "kept"]


@pytest.mark.parametrize(
    ("uri", "kind", "shown"),
    [
        ("/srv/store", FolderStore, "file:///srv/store"),
        ("file:///srv/a%20b", FolderStore, "file:///srv/a%20b"),
        ("s3://acme", S3Store, "s3://acme"),
        ("s3://acme/team/x/", S3Store, "s3://acme/team/x"),
        (
            "s3://acme/x?endpoint=http://127.0.0.1:9000/&region=eu-west-1",
            S3Store,
            "s3://acme/x?endpoint=http://127.0.0.1:9000&region=eu-west-1",
        ),
    ],
)
def test_an_address_opens_a_store(uri: str, kind: type[Store], shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    store = open_store(uri)
    assert isinstance(store, kind)
    assert store.uri == shown
    assert open_store(store.uri).uri == shown


def test_the_endpoint_of_the_environment_is_part_of_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", " http://127.0.0.1:9000\n")
    assert open_store("s3://acme/x").uri == "s3://acme/x?endpoint=http://127.0.0.1:9000"


@pytest.mark.parametrize(
    "uri",
    [
        "gs://bucket/x", "file://host/x", "s3://", "s3://Bad_Bucket/x", "s3://acme/../x", "s3://acme/x?endpiont=http://a",
        "s3://key:hunter2@acme/x", "s3://acme/x?endpoint=ftp://a", "s3://acme?endpoint=http://me:hunter2@host",
        "s3://acme?endpoint=http://host:notaport", "s3://acme?endpoint=http://host/?secret=hunter2",
    ],
)  # fmt: skip
def test_an_address_that_is_no_store_is_refused_without_showing_a_secret(uri: str) -> None:
    with pytest.raises(UsageInvalid) as caught:
        open_store(uri)
    assert "hunter2" not in str(caught.value)


def test_opening_an_s3_store_does_not_import_boto(place: Any) -> None:
    code = (
        "import sys; from fastserve.artifacts.stores import open_store; "
        "open_store(sys.argv[1]); print('boto3' in sys.modules)"
    )
    process = place.start(code)
    output, errors = process.communicate(timeout=60)
    assert (output.strip(), errors) == ("False", "")


def test_permission_denied_says_what_to_do(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o700)
    store = FolderStore(locked / "store")
    store.write("a/b", b"x")
    locked.chmod(0 if os.geteuid() else 0o700)
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        for operation in (
            lambda: store.read("a/b"),
            lambda: store.write("a/b", b"y"),
            lambda: store.create("a/c", b"y"),
            lambda: store.delete("a/b"),
            lambda: store.names("a/"),
            lambda: store.delete_under("a/"),
        ):
            with pytest.raises(StoreFailed, match="give the user rights") as caught:
                operation()
            assert type(caught.value) is StoreFailed
            assert isinstance(caught.value, FastServeError)
    finally:
        if os.geteuid() == 65534:
            os.seteuid(0)
        locked.chmod(0o700)
    assert store.read("a/b") == b"x"
