from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import s3_servers

from fastserve.artifacts import attempts
from fastserve.artifacts.checkpoints import newest_checkpoint, put_checkpoint
from fastserve.artifacts.folder_store import FolderStore
from fastserve.artifacts.store import Store
from fastserve.errors import StoreFull
from fastserve.plan.stages import Stage, StageRequest

Asked = Callable[..., StageRequest]
Made = Callable[..., Path]

KEY = "ab" * 32


@pytest.fixture
def disk(tmp_path: Path, missing: Callable[[str], None]) -> Iterator[Path]:
    """A real file system of 2 MiB."""
    try:
        small = s3_servers.tiny_disk(tmp_path / "disk")
        folder = small.__enter__()
    except RuntimeError as error:
        missing(str(error))
        raise
    yield folder
    small.__exit__(None, None, None)


@pytest.fixture(params=["folder", pytest.param("versitygw", marks=pytest.mark.s3)])
def full_store(request: pytest.FixtureRequest, disk: Path, tmp_path: Path, use: Any) -> Iterator[Store]:
    """A store on the small disk."""
    if request.param == "folder":
        yield FolderStore(disk / "store")
        return
    binary = s3_servers.build_versitygw(request.getfixturevalue("require")("go"))
    with s3_servers.versitygw(binary, disk / "root", tmp_path / "log") as server:
        yield use(server).open()


def test_a_full_store_takes_no_record_and_keeps_nothing_torn(full_store: Store, asked: Asked, made: Made) -> None:
    attempts.claim(full_store, asked())
    small, large = made({"a": b"x" * 100_000}), made({f"part-{n}": b"x" * 700_000 for n in range(5)})
    for _ in range(2):
        with pytest.raises(StoreFull, match="free space"):
            attempts.commit(full_store, asked(), large, {}, {})
        assert attempts.find(full_store, Stage.TRAIN, KEY) is None
        assert not [name for name in full_store.names("") if "/files/" in name]
    attempts.fail(full_store, asked(), "StoreFull", "no space left; free some", final=True)
    assert attempts.commit(full_store, asked(), small, {}, {}).size_bytes == 100_000


def test_a_full_store_keeps_the_checkpoints_it_has(full_store: Store, made: Made) -> None:
    put_checkpoint(full_store, Stage.TRAIN, KEY, 1, made({"a": b"x" * 900_000}), 1)
    before = full_store.names("")
    with pytest.raises(StoreFull):
        put_checkpoint(full_store, Stage.TRAIN, KEY, 2, made({"a": b"x" * 900_000, "b": b"x" * 900_000}), 1)
    assert full_store.names("") == before
    assert newest_checkpoint(full_store, Stage.TRAIN, KEY) == 1


def test_a_disk_without_room_for_a_small_object_keeps_the_old_one(disk: Path) -> None:
    store = FolderStore(disk / "store")
    store.write("progress.json", b"old")
    with pytest.raises(OSError, match="space"):
        (disk / "filler").write_bytes(b"x" * (3 << 20))
    with pytest.raises(StoreFull):
        store.write("progress.json", b"n" * 100_000)
    with pytest.raises(StoreFull):
        store.create("record.json", b"n" * 100_000)
    assert store.read("progress.json") == b"old"
    assert [path.name for path in (disk / "store").iterdir()] == ["progress.json"]


def test_a_full_cache_leaves_no_half_artifact(
    bucket: Any, disk: Path, asked: Asked, made: Made, tmp_path: Path
) -> None:
    store = bucket.open()
    record = attempts.commit(store, asked(), made({f"part-{n}": b"x" * 700_000 for n in range(5)}), {}, {})
    with pytest.raises(StoreFull, match="cache"):
        attempts.fetch(store, record, disk / "cache")
    assert [path.name for path in (disk / "cache").iterdir() if path.is_dir()] == []
    attempts.fetch(store, record, tmp_path / "large-cache")
