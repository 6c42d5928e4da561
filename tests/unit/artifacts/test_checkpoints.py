from __future__ import annotations

import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastserve.artifacts import attempts
from fastserve.artifacts.checkpoints import (
    fetch_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    put_checkpoint,
)
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
