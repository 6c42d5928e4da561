from __future__ import annotations

import json
import math
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastserve.artifacts import attempts
from fastserve.artifacts.record import Record
from fastserve.artifacts.store import Store
from fastserve.errors import ArtifactNotFound, AttemptFenced, DigestMismatch, StoreFailed
from fastserve.plan.stages import Stage, StageRequest

Asked = Callable[..., StageRequest]
Made = Callable[..., Path]

KEY = "ab" * 32
BASE = f"artifacts/train/{KEY}/"
FILES = {"model/config.json": b"{}", "model/a b-ü.bin": b"\x00\x01" * 5000, "report.json": b"[]"}

COMMIT = """
import pathlib, sys
from fastserve.artifacts import attempts
from fastserve.artifacts.stores import open_store
from fastserve.errors import AttemptFenced
from fastserve.plan.stages import Stage, StageRequest
store = open_store(sys.argv[1])
request = StageRequest("assistant", Stage.TRAIN, sys.argv[2], int(sys.argv[3]), {})
attempts.newest_attempt(store, Stage.TRAIN, sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
try:
    attempts.commit(store, request, pathlib.Path(sys.argv[4]), {}, {})
    print("won")
except AttemptFenced:
    print("fenced")
"""


def commit(store: Store, request: StageRequest, folder: Path, **metrics: Any) -> Record:
    return attempts.commit(store, request, folder, metrics, {"model": "cd" * 32})


def test_an_attempt_is_claimed_once(store: Store, asked: Asked) -> None:
    assert attempts.newest_attempt(store, Stage.TRAIN, KEY) == 0
    assert attempts.claim(store, asked(1))
    assert not attempts.claim(store, asked(1))
    assert attempts.claim(store, asked(10))
    assert attempts.newest_attempt(store, Stage.TRAIN, KEY) == 10
    assert attempts.request_of(store, Stage.TRAIN, KEY, 10) == asked(10)
    with pytest.raises(ArtifactNotFound):
        attempts.request_of(store, Stage.TRAIN, KEY, 2)


def test_an_attempt_is_taken_by_one_of_those_who_ask_for_the_same_thing(store: Store, asked: Asked) -> None:
    ours = asked(1)
    theirs = replace(ours, model="other")
    assert attempts.take(store, ours)
    assert attempts.take(store, ours)  # as after a crash
    assert not attempts.take(store, theirs)
    assert attempts.take(store, replace(theirs, attempt=2))
    assert not attempts.take(store, asked(2))


def test_what_is_committed_is_found_and_fetched(store: Store, asked: Asked, made: Made, tmp_path: Path) -> None:
    attempts.claim(store, asked())
    assert attempts.find(store, Stage.TRAIN, KEY) is None
    record = commit(store, asked(), made(FILES), loss=1.5)
    assert attempts.find(store, Stage.TRAIN, KEY) == record
    assert record.metrics == {"loss": 1.5}
    folder = attempts.fetch(store, record, tmp_path / "cache")
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert {name: path.read_bytes() for name, path in found.items()} == FILES
    assert {stat.S_IMODE(path.stat().st_mode) for path in found.values()} == {0o444}


def test_committing_again_returns_the_same_record(store: Store, asked: Asked, made: Made) -> None:
    record = commit(store, asked(), made(FILES))
    assert commit(store, asked(), made(FILES)) == record
    assert attempts.fetch(store, record, made({"x": b""}) / "cache")


def test_files_without_a_record_are_never_found(store: Store, asked: Asked, made: Made) -> None:
    attempts.claim(store, asked())
    store.put_file(BASE + "attempts/1/files/model/config.json", made(FILES) / "model/config.json")
    assert attempts.find(store, Stage.TRAIN, KEY) is None


def test_an_attempt_is_fenced_when_a_newer_one_is_claimed(store: Store, asked: Asked, made: Made) -> None:
    attempts.claim(store, asked(1))
    attempts.claim(store, asked(2))
    with pytest.raises(AttemptFenced, match="attempt 2 is claimed"):
        commit(store, asked(1), made(FILES))
    assert attempts.find(store, Stage.TRAIN, KEY) is None
    assert store.names(BASE + "attempts/1/files/") == []
    assert commit(store, asked(2), made(FILES)).attempt == 2


def test_a_late_attempt_cannot_touch_what_is_committed(store: Store, asked: Asked, made: Made, tmp_path: Path) -> None:
    record = commit(store, asked(2), made(FILES))
    for attempt in (1, 3):
        with pytest.raises(AttemptFenced):
            commit(store, asked(attempt), made({"other": b"x"}))
        assert store.names(f"{BASE}attempts/{attempt}/files/") == []
    assert attempts.find(store, Stage.TRAIN, KEY) == record
    attempts.fetch(store, record, tmp_path / "cache")


def test_of_threads_that_commit_at_once_exactly_one_wins(
    store: Store, asked: Asked, made: Made, tmp_path: Path
) -> None:
    folders = {attempt: made({"who": str(attempt).encode()}) for attempt in range(1, 5)}

    def try_it(attempt: int) -> int:
        try:
            return commit(store, asked(attempt), folders[attempt]).attempt
        except AttemptFenced:
            return 0

    with ThreadPoolExecutor(4) as pool:
        winners = [attempt for attempt in pool.map(try_it, folders) if attempt]
    assert len(winners) == 1
    record = attempts.find(store, Stage.TRAIN, KEY)
    assert record is not None
    assert record.attempt == winners[0]
    assert (attempts.fetch(store, record, tmp_path / "cache") / "who").read_text() == str(winners[0])
    assert {name.split("/")[4] for name in store.names(BASE) if "/files/" in name} == {str(winners[0])}


def test_of_processes_that_commit_at_once_exactly_one_wins(place: Any, made: Made, tmp_path: Path) -> None:
    keys = [f"{number:064x}" for number in range(2)]
    for key in keys:
        processes = [place.start(COMMIT, key, str(attempt), str(made(FILES))) for attempt in (1, 2)]
        for process in processes:
            assert process.stdout.readline() == "ready\n", process.communicate()
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        said = sorted(process.communicate(timeout=60)[0].strip() for process in processes)
        assert said == ["fenced", "won"]
        record = attempts.find(place.open(), Stage.TRAIN, key)
        assert record is not None
        attempts.fetch(place.open(), record, tmp_path / "cache")


@pytest.mark.parametrize("harm", ["cut", "empty", "list", "digest", "climb", "stage", "format", "bytes"])
def test_a_damaged_record_is_named_and_not_taken_for_none(store: Store, asked: Asked, made: Made, harm: str) -> None:
    commit(store, asked(), made(FILES))
    name = BASE + "record.json"
    data = store.read(name)
    value = json.loads(data)
    if harm == "digest":
        value["files"][0]["sha256"] = "0" * 64
    if harm == "climb":
        value["files"][0]["path"] = "../../other"
    if harm == "stage":
        value["stage"] = "deploy"
    if harm == "format":
        value["format"] = 99
    bad = {"cut": data[:-20], "empty": b"", "list": b"[]", "bytes": b"\xff\x00"}
    store.write(name, bad.get(harm, json.dumps(value).encode()))
    with pytest.raises(StoreFailed, match=r"record\.json"):
        attempts.find(store, Stage.TRAIN, KEY)
    with pytest.raises(StoreFailed, match=r"record\.json"):
        commit(store, asked(2), made(FILES))


@pytest.mark.parametrize("data", [b"\x00\x01" * 4999 + b"\x00\x02", b"short"])
def test_a_changed_file_is_named_at_fetch(store: Store, asked: Asked, made: Made, tmp_path: Path, data: bytes) -> None:
    record = commit(store, asked(), made(FILES))
    store.write(BASE + "attempts/1/files/model/a b-ü.bin", data)
    with pytest.raises(DigestMismatch, match=r"model/a b-ü\.bin"):
        attempts.fetch(store, record, tmp_path / "cache")
    assert not (tmp_path / "cache" / record.digest).exists()


def test_a_missing_file_is_named_at_fetch(store: Store, asked: Asked, made: Made, tmp_path: Path) -> None:
    record = commit(store, asked(), made(FILES))
    store.delete(BASE + "attempts/1/files/report.json")
    with pytest.raises(ArtifactNotFound, match=r"report\.json"):
        attempts.fetch(store, record, tmp_path / "cache")


def test_progress_and_failure_are_read_back(store: Store, asked: Asked) -> None:
    assert attempts.read_progress(store, Stage.TRAIN, KEY, 1) is None
    assert attempts.failure(store, Stage.TRAIN, KEY, 1) is None
    for done in (1, 2):
        attempts.write_progress(store, asked(), {"done": done, "total": 10})
    attempts.fail(store, asked(), "DatasetInvalid", "rows.jsonl:3: no text; add one", final=True)
    assert attempts.read_progress(store, Stage.TRAIN, KEY, 1) == {"done": 2, "total": 10}
    failure = attempts.failure(store, Stage.TRAIN, KEY, 1)
    assert failure is not None
    assert failure.pop("at") > 1_700_000_000
    assert failure == {"reason": "DatasetInvalid", "message": "rows.jsonl:3: no text; add one", "final": True}


def test_a_discarded_attempt_loses_its_files_and_cannot_commit(store: Store, asked: Asked, made: Made) -> None:
    attempts.claim(store, asked())
    store.put_file(BASE + "attempts/1/files/half", made(FILES) / "report.json")
    attempts.fail(store, asked(), "StageFailed", "it broke; see the log", final=False)
    assert attempts.discard(store, Stage.TRAIN, KEY, 1)
    assert attempts.discard(store, Stage.TRAIN, KEY, 1)
    assert store.names(BASE + "attempts/1/files/") == []
    assert attempts.failure(store, Stage.TRAIN, KEY, 1)
    with pytest.raises(AttemptFenced, match="discarded"):
        commit(store, asked(1), made(FILES))
    assert store.names(BASE + "attempts/1/files/") == []
    assert commit(store, asked(2), made(FILES)).attempt == 2


def test_the_committed_attempt_cannot_be_discarded(store: Store, asked: Asked, made: Made, tmp_path: Path) -> None:
    record = commit(store, asked(), made(FILES))
    assert not attempts.discard(store, Stage.TRAIN, KEY, 1)
    attempts.fetch(store, record, tmp_path / "cache")


def test_an_attempt_that_stands_before_its_commit_keeps_its_files(store: Store, asked: Asked, made: Made) -> None:
    # As a process leaves it that was killed between its seal and its record.
    commit(store, asked(1), made(FILES))
    store.delete(BASE + "record.json")
    assert not attempts.discard(store, Stage.TRAIN, KEY, 1)
    assert len(store.names(BASE + "attempts/1/files/")) == 3
    commit(store, asked(2), made(FILES))
    assert attempts.discard(store, Stage.TRAIN, KEY, 1)
    assert store.names(BASE + "attempts/1/files/") == []


def test_a_metric_that_is_no_number_is_refused_before_anything_is_sent(store: Store, asked: Asked, made: Made) -> None:
    with pytest.raises(StoreFailed, match="finite"):
        commit(store, asked(), made(FILES), perplexity=math.nan)
    assert store.names("") == []


def test_links_and_empty_folders_are_refused_before_anything_is_sent(
    store: Store, asked: Asked, made: Made, tmp_path: Path
) -> None:
    linked = made(FILES)
    (linked / "model" / "link").symlink_to("/etc/hostname")
    with pytest.raises(StoreFailed, match="link"):
        commit(store, asked(), linked)
    (tmp_path / "empty" / "model").mkdir(parents=True)
    with pytest.raises(StoreFailed, match="no file"):
        commit(store, asked(), tmp_path / "empty")
    assert store.names("") == []


@pytest.mark.parametrize("key", ["a/b", "..", "", "/etc", "a\nb"])
def test_a_key_that_is_no_name_is_refused(store: Store, asked: Asked, key: str) -> None:
    with pytest.raises(StoreFailed):
        attempts.claim(store, asked(key=key))


def test_a_folder_store_hands_out_its_own_files(asked: Asked, made: Made, tmp_path: Path) -> None:
    from fastserve.artifacts.folder_store import FolderStore

    store = FolderStore(tmp_path / "store")
    record = commit(store, asked(), made(FILES))
    assert attempts.fetch(store, record) == tmp_path / "store" / BASE / "attempts/1/files"
    assert attempts.fetch(store, record, verify=False) == tmp_path / "store" / BASE / "attempts/1/files"


def test_a_cached_artifact_is_not_downloaded_again(bucket: Any, asked: Asked, made: Made, tmp_path: Path) -> None:
    store = bucket.open()
    record = commit(store, asked(), made(FILES))
    first = attempts.fetch(store, record, tmp_path / "cache")
    store.delete_under(BASE)
    assert attempts.fetch(store, record, tmp_path / "cache") == first == tmp_path / "cache" / record.digest


def test_a_damaged_copy_in_the_cache_is_replaced(bucket: Any, asked: Asked, made: Made, tmp_path: Path) -> None:
    store = bucket.open()
    record = commit(store, asked(), made(FILES))
    copy = attempts.fetch(store, record, tmp_path / "cache") / "model" / "config.json"
    copy.chmod(0o644)
    copy.write_bytes(b"!!")
    attempts.fetch(store, record, tmp_path / "cache")
    assert copy.read_bytes() == b"{}"
    copy.unlink()
    attempts.fetch(store, record, tmp_path / "cache")
    assert copy.read_bytes() == b"{}"


def test_many_fetch_the_same_artifact_at_once(bucket: Any, asked: Asked, made: Made, tmp_path: Path) -> None:
    store = bucket.open()
    record = commit(store, asked(), made(FILES))
    with ThreadPoolExecutor(6) as pool:
        folders = set(pool.map(lambda _: attempts.fetch(store, record, tmp_path / "cache"), range(6)))
    assert folders == {tmp_path / "cache" / record.digest}
    assert [path.name for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")] == [record.digest]
