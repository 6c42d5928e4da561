"""The loss of a run: beside the attempt while it works, among the artifact's files afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastserve.artifacts import attempts
from fastserve.artifacts.store import Store
from fastserve.plan.stages import Stage, StageRequest

KEY = "ab" * 32


def test_the_curve_is_read_while_it_grows_and_when_it_is_whole(
    store: Store, asked: Callable[..., StageRequest], tmp_path: Path
) -> None:
    assert attempts.read_curve(store, Stage.TRAIN, KEY) == b""
    attempts.claim(store, asked(1))
    attempts.write_curve(store, asked(1), b'{"step": 1}\n')
    attempts.write_curve(store, asked(1), b'{"step": 2}\n')
    assert attempts.read_curve(store, Stage.TRAIN, KEY) == b'{"step": 2}\n'
    attempts.claim(store, asked(2))
    assert attempts.read_curve(store, Stage.TRAIN, KEY) == b""
    assert attempts.read_curve(store, Stage.TRAIN, KEY, 1) == b'{"step": 2}\n'
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "curve.jsonl").write_bytes(b'{"step": 3}\n')
    attempts.commit(store, asked(2), tmp_path / "files", {}, {})
    assert attempts.read_curve(store, Stage.TRAIN, KEY) == b'{"step": 3}\n'
    assert attempts.read_curve(store, Stage.TRAIN, KEY, 1) == b'{"step": 3}\n'
