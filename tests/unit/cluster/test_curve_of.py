"""Where the loss curve of a model is read: beside the attempt, or in the artifact."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastserve.artifacts import attempts
from fastserve.artifacts.stores import open_store
from fastserve.cluster.status import curve_of
from fastserve.errors import UsageInvalid
from fastserve.plan.stages import Stage, StageRequest

KEY = "cd" * 32


def test_the_curve_of_a_run_is_found_while_it_works_and_when_it_is_done(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    store = open_store(str(tmp_path / "store"))
    request = StageRequest("m", Stage.TRAIN, KEY, 1, {})
    status = {"name": "m", "stages": {"train": {"state": "running", "key": KEY, "attempt": 1}}}
    assert curve_of(status, store) == []
    attempts.claim(store, request)
    attempts.write_curve(store, request, b'{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    assert curve_of(status, store) == [{"step": 1, "loss": 3.0}]
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "curve.jsonl").write_text('{"step": 2, "loss": 2.0}\n')
    attempts.commit(store, request, tmp_path / "made", {}, {})
    done = {"name": "m", "stages": {"train": {"state": "committed", "key": KEY}}}
    assert curve_of(done, store) == [{"step": 2, "loss": 2.0}]


def test_a_stage_that_waits_has_no_curve_and_a_model_without_training_says_so(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    store = open_store(str(tmp_path / "store"))
    assert curve_of({"name": "m", "stages": {"train": {"state": "waiting", "key": None}}}, store) == []
    with pytest.raises(UsageInvalid, match="leave --plot out"):
        curve_of({"name": "m", "stages": {"source": {}}}, store)
