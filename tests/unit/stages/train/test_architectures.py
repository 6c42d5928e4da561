"""Whatever decoder transformers loads: two unequal workers learn what one learns, whole or with adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from model_zoo import ARCHITECTURES, write_model
from ranks import run_ranks

from fastserve.artifacts.store import Store
from fastserve.artifacts.stores import open_store
from fastserve.stages.train.corpus import Corpus
from fastserve.stages.train.group import Group
from fastserve.stages.train.task import Task
from fastserve.stages.train.worker import train

UNEQUAL = [{"profile": "local", "count": 1, "speed": 1}, {"profile": "local", "count": 1, "speed": 3}]
STEPS = 3


@pytest.mark.parametrize("kind", sorted(set(ARCHITECTURES) - {"llama"}))
@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_unequal_workers_learn_what_one_learns(
    kind: str, method: str, store: Store, corpus: Corpus, new_task: Callable[..., Task], tmp_path: Path
) -> None:
    folder = write_model(kind, tmp_path / "model")

    def losses(task: Task) -> list[float]:
        rows: list[dict[str, Any]] = []
        own = open_store(task.store_uri)
        ended = train(own, task, corpus, folder, Group.current(), on_step=lambda row: rows.append(dict(row)))
        assert (ended.step, ended.reason) == (STEPS, ""), ended.message
        return [row["loss"] for row in rows]

    wanted = {"method": method, "steps": STEPS, "learningRate": 1e-3, "checkpoint": {"everySteps": 99}}
    together = run_ranks(losses, 2, new_task(1, workers=UNEQUAL, **wanted))
    store.delete_under("artifacts/")
    alone = losses(new_task(1, **wanted))
    assert together[0] == together[1]
    assert together[0] == pytest.approx(alone, rel=2e-6)
    assert alone[-1] < alone[0]
