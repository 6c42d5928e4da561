from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastserve.artifacts import attempts
from fastserve.artifacts.store import Store
from fastserve.plan.stages import Stage, StageRequest

# Opens the store, says so, then commits when told: so that the kill falls into the commit and not into the imports.
COMMIT = """
import pathlib, sys, time
from fastserve.artifacts import attempts
from fastserve.artifacts.stores import open_store
from fastserve.plan.stages import Stage, StageRequest
store = open_store(sys.argv[1])
folder = pathlib.Path(sys.argv[2])
for line in sys.stdin:
    request = StageRequest("assistant", Stage.TRAIN, line.strip(), 1, {})
    attempts.claim(store, request)
    print("go", flush=True)
    began = time.monotonic()
    attempts.commit(store, request, folder, {"loss": 1.0}, {})
    print(time.monotonic() - began, flush=True)
"""


def test_a_commit_that_is_killed_anywhere_is_whole_or_absent(
    place: Any, made: Callable[..., Path], tmp_path: Path
) -> None:
    folder = made({f"model/{number:02}.bin": bytes([number]) * 300_000 for number in range(12)})
    store = place.open()
    usual_seconds = commit_undisturbed(place, folder)
    kills = 8 if place.environment else 20  # a bucket's client takes longer to start
    torn = 0
    for kill in range(kills):
        key = f"{kill:064x}"
        commit_and_kill(place, folder, key, after_seconds=usual_seconds * 1.1 * kill / kills)
        record = attempts.find(store, Stage.TRAIN, key)
        if record is None:
            torn += 1
            again = StageRequest("assistant", Stage.TRAIN, key, 2, {})
            assert attempts.claim(store, again)
            record = attempts.commit(store, again, folder, {}, {})
            assert nothing_is_left(store, key)
        assert len(list(attempts.fetch(store, record, tmp_path / "cache").rglob("*.bin"))) == 12
    assert torn, "some were killed before their commit"


def commit_undisturbed(place: Any, folder: Path) -> float:
    """Seconds that a commit takes here."""
    process = place.start(COMMIT, str(folder))
    output, errors = process.communicate("first\n", timeout=120)
    assert output.startswith("go\n"), errors
    return float(output.split()[1])


def commit_and_kill(place: Any, folder: Path, key: str, after_seconds: float) -> None:
    process = place.start(COMMIT, str(folder))
    process.stdin.write(key + "\n")
    process.stdin.flush()
    assert process.stdout.readline() == "go\n", process.communicate()
    time.sleep(after_seconds)
    process.kill()
    process.communicate()


def nothing_is_left(store: Store, key: str) -> bool:
    """Discards the killed attempt until its last PUT, which may still be under way, has come and gone."""
    end = time.monotonic() + 60
    base = f"artifacts/train/{key}/attempts/1/files/"
    while time.monotonic() < end:
        assert attempts.discard(store, Stage.TRAIN, key, 1)
        time.sleep(0.05)
        if not store.names(base):
            return True
    return False
