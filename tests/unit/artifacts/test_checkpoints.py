from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastserve.artifacts import attempts
from fastserve.artifacts.checkpoints import (
    begin_checkpoint,
    commit_checkpoint,
    fetch_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    put_checkpoint,
    put_files,
    withdraw_checkpoint,
)
from fastserve.artifacts.folder_store import FolderStore
from fastserve.artifacts.record import FileEntry
from fastserve.artifacts.store import Store
from fastserve.errors import ArtifactNotFound, AttemptFenced, DigestMismatch, StoreFailed
from fastserve.plan.stages import Stage, StageRequest

Asked = Callable[..., StageRequest]
Made = Callable[..., Path]

KEY = "ab" * 32
BASE = f"artifacts/train/{KEY}/checkpoints/"


def put(store: Store, step: int, folder: Path, attempt: int = 1) -> None:
    put_checkpoint(store, Stage.TRAIN, KEY, step, folder, attempt)


def test_the_newest_checkpoint_comes_back_whole(store: Store, made: Made, tmp_path: Path) -> None:
    assert newest_checkpoint(store, Stage.TRAIN, KEY) is None
    for step in (0, 9, 10):
        put(store, step, made({".metadata": b"m", "rank/0.distcp": str(step).encode()}))
    assert newest_checkpoint(store, Stage.TRAIN, KEY) == 10
    folder = fetch_checkpoint(store, Stage.TRAIN, KEY, 10, tmp_path / "into")
    assert folder == tmp_path / "into"
    assert {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == {
        ".metadata": b"m",
        "rank/0.distcp": b"10",
    }


def test_a_torn_checkpoint_is_never_chosen(
    store: Store, made: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        put(store, step, made())
    store.put_file(f"{BASE}4/1-00000000/model/config.json", made() / "model/config.json")
    store.write(BASE + "3/checkpoint.json", b'{"step": 3, "files"')
    victim = next(name for name in store.names(BASE + "2/") if name.endswith("weights.bin"))
    store.delete(victim)
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(store, Stage.TRAIN, KEY) == 1
    assert "weights.bin" in caplog.text
    assert "checkpoint.json is damaged" in caplog.text
    with pytest.raises(ArtifactNotFound, match="step 4"):
        fetch_checkpoint(store, Stage.TRAIN, KEY, 4, tmp_path / "into")
    with pytest.raises(DigestMismatch):
        fetch_checkpoint(store, Stage.TRAIN, KEY, 3, tmp_path / "into")
    assert not (tmp_path / "into").exists()


def test_a_torn_checkpoint_can_be_put_again(store: Store, made: Made, tmp_path: Path) -> None:
    put(store, 5, made())
    store.write(BASE + "5/checkpoint.json", b"torn")
    put(store, 5, made({"again": b"x"}))
    assert newest_checkpoint(store, Stage.TRAIN, KEY) == 5
    assert (fetch_checkpoint(store, Stage.TRAIN, KEY, 5, tmp_path / "into") / "again").read_bytes() == b"x"


def test_a_whole_checkpoint_stays_when_its_step_is_reached_again(store: Store, made: Made, tmp_path: Path) -> None:
    put(store, 5, made({"first": b"1"}))
    put(store, 5, made({"second": b"2"}), attempt=2)
    assert [path.name for path in fetch_checkpoint(store, Stage.TRAIN, KEY, 5, tmp_path / "into").iterdir()] == [
        "first"
    ]
    assert len(store.names(BASE)) == 2


def test_a_fenced_attempt_puts_no_checkpoint(store: Store, asked: Asked, made: Made) -> None:
    attempts.claim(store, asked(1))
    put(store, 5, made())
    attempts.claim(store, asked(2))
    for step in (5, 6):
        with pytest.raises(AttemptFenced):
            put(store, step, made(), attempt=1)
    put(store, 6, made({"newer": b"2"}), attempt=2)
    marker = json.loads(store.read(BASE + "6/checkpoint.json"))
    assert marker["attempt"] == 2
    assert len(store.names(BASE)) == 5


def test_of_two_at_the_same_step_one_counts_and_the_other_leaves_nothing(
    store: Store, made: Made, tmp_path: Path
) -> None:
    folders = [made({"who": str(number).encode()}) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda folder: put(store, 7, folder), folders))
    assert len(store.names(BASE)) == 2
    assert (fetch_checkpoint(store, Stage.TRAIN, KEY, 7, tmp_path / "into") / "who").read_text() in "0123"


def test_a_changed_checkpoint_file_is_named_and_leaves_no_folder(store: Store, made: Made, tmp_path: Path) -> None:
    put(store, 1, made())
    victim = next(name for name in store.names(BASE) if name.endswith("config.json"))
    store.write(victim, b"[]")
    with pytest.raises(DigestMismatch, match=r"config\.json"):
        fetch_checkpoint(store, Stage.TRAIN, KEY, 1, tmp_path / "into" / "here")
    assert list((tmp_path / "into").iterdir()) == []


def test_a_folder_that_is_there_is_not_overwritten(store: Store, made: Made, tmp_path: Path) -> None:
    put(store, 1, made())
    with pytest.raises(StoreFailed, match="already"):
        fetch_checkpoint(store, Stage.TRAIN, KEY, 1, tmp_path)


def test_pruning_keeps_the_newest_and_what_is_being_written(store: Store, made: Made) -> None:
    for step in (1, 2, 3, 4):
        put(store, step, made())
    for step in (2, 5):
        store.put_file(f"{BASE}{step}/1-00000000/half", made() / "model/config.json")
    store.delete(BASE + "1/checkpoint.json")
    prune_checkpoints(store, Stage.TRAIN, KEY, keep=2)
    assert {name.removeprefix(BASE).split("/")[0] for name in store.names(BASE)} == {"3", "4", "5"}
    assert newest_checkpoint(store, Stage.TRAIN, KEY) == 4
    prune_checkpoints(store, Stage.TRAIN, KEY, keep=0)
    assert store.names(BASE) == []


def put_by_workers(store: Store, step: int, folders: list[Path], attempt: int = 1) -> bool:
    """Each folder is one worker's part."""
    own = begin_checkpoint(store, Stage.TRAIN, KEY, step, attempt)
    assert own is not None
    with ThreadPoolExecutor(len(folders)) as pool:
        parts = list(pool.map(lambda folder: put_files(store, Stage.TRAIN, KEY, step, own, folder), folders))
    assert newest_checkpoint(store, Stage.TRAIN, KEY) != step
    return commit_checkpoint(store, Stage.TRAIN, KEY, step, attempt, own, [entry for part in parts for entry in part])


def steps_in(store: Store) -> set[int]:
    return {int(name.removeprefix(BASE).split("/")[0]) for name in store.names(BASE)}


def test_several_workers_write_one_checkpoint_under_one_marker(store: Store, made: Made, tmp_path: Path) -> None:
    folders = [made({f"state/__{rank}_0.distcp": bytes([rank]) * 1000}) for rank in range(3)]
    assert put_by_workers(store, 4, [*folders, made({"run.json": b"{}"})])
    assert newest_checkpoint(store, Stage.TRAIN, KEY) == 4
    assert begin_checkpoint(store, Stage.TRAIN, KEY, 4, 1) is None
    folder = fetch_checkpoint(store, Stage.TRAIN, KEY, 4, tmp_path / "all")
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == [
        "__0_0.distcp",
        "__1_0.distcp",
        "__2_0.distcp",
        "run.json",
    ]
    wanted = ["run.json", "state/__1_0.distcp"]
    folder = fetch_checkpoint(store, Stage.TRAIN, KEY, 4, tmp_path / "some", only=wanted)
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == wanted
    with pytest.raises(ArtifactNotFound, match=r"step 4 has no state/__9_0\.distcp"):
        fetch_checkpoint(store, Stage.TRAIN, KEY, 4, tmp_path / "none", only=["state/__9_0.distcp"])


def test_workers_that_are_overtaken_leave_nothing(store: Store, asked: Asked, made: Made) -> None:
    attempts.claim(store, asked(1))
    own = begin_checkpoint(store, Stage.TRAIN, KEY, 4, 1)
    assert own is not None
    parts = [put_files(store, Stage.TRAIN, KEY, 4, own, made({str(rank): b"x"})) for rank in range(2)]
    attempts.claim(store, asked(2))
    with pytest.raises(AttemptFenced):
        commit_checkpoint(store, Stage.TRAIN, KEY, 4, 1, own, [entry for part in parts for entry in part])
    assert store.names(BASE) == []
    with pytest.raises(AttemptFenced):
        begin_checkpoint(store, Stage.TRAIN, KEY, 6, 1)


def test_a_name_that_two_workers_put_is_refused(store: Store, made: Made) -> None:
    own = begin_checkpoint(store, Stage.TRAIN, KEY, 4, 1)
    assert own is not None
    entries = put_files(store, Stage.TRAIN, KEY, 4, own, made({"same": b"x"}))
    with pytest.raises(StoreFailed, match="two workers put same"):
        commit_checkpoint(store, Stage.TRAIN, KEY, 4, 1, own, [*entries, FileEntry("same", 2, "0" * 64)])
    assert store.names(BASE) == []


def test_of_two_uploads_of_one_step_the_second_is_told_and_leaves_nothing(store: Store, made: Made) -> None:
    names = [begin_checkpoint(store, Stage.TRAIN, KEY, 4, 1) for _ in range(2)]
    said = []
    for own in names:
        assert own is not None
        said.append(
            commit_checkpoint(store, Stage.TRAIN, KEY, 4, 1, own, put_files(store, Stage.TRAIN, KEY, 4, own, made()))
        )
    assert said == [True, False]
    assert len(store.names(BASE)) == 3
    withdraw_checkpoint(store, Stage.TRAIN, KEY, 4, str(names[1]))


def test_pruning_never_takes_the_best_one(store: Store, made: Made) -> None:
    for step in range(1, 7):
        put(store, step, made())
        prune_checkpoints(store, Stage.TRAIN, KEY, keep=2, kept_besides=[None if step < 2 else 2])
    assert steps_in(store) == {2, 5, 6}
    assert newest_checkpoint(store, Stage.TRAIN, KEY, below=5) == 2
    prune_checkpoints(store, Stage.TRAIN, KEY, keep=1, kept_besides=[2])
    assert steps_in(store) == {2, 6}
    prune_checkpoints(store, Stage.TRAIN, KEY, keep=0, kept_besides=[2])
    assert steps_in(store) == set()


def test_pruning_removes_what_killed_writers_left(store: Store, made: Made) -> None:
    """Beside the upload that counts, at steps between those that are kept, and not at a step that may be on its way."""
    for step in (2, 6):
        put(store, step, made())
    for place in ("2/1-0badcafe", "4/1-0badcafe", "6/1-0badcafe", "8/1-0badcafe"):
        store.put_file(f"{BASE}{place}/state/__0_0.distcp", made() / "model/config.json")
    prune_checkpoints(store, Stage.TRAIN, KEY, keep=2)
    assert steps_in(store) == {2, 6, 8}
    assert [name for name in store.names(BASE) if "0badcafe" in name] == [f"{BASE}8/1-0badcafe/state/__0_0.distcp"]
    assert newest_checkpoint(store, Stage.TRAIN, KEY) == 6
    prune_checkpoints(store, Stage.TRAIN, KEY, keep=0)
    assert store.names(BASE) == []


def test_pruning_removes_files_that_a_killed_writer_had_half_written(tmp_path: Path, made: Made) -> None:
    store = FolderStore(tmp_path / "store")
    put(store, 4, made())
    old, new = (tmp_path / "store" / f"{BASE}4/1-0badcafe/state/.fastserve-{name}.tmp" for name in ("1-a", "2-b"))
    old.parent.mkdir(parents=True)
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    prune_checkpoints(store, Stage.TRAIN, KEY, keep=1)
    assert (old.exists(), new.exists()) == (False, True)
    prune_checkpoints(store, Stage.TRAIN, KEY, keep=0)
    assert not (tmp_path / "store" / BASE).exists()
