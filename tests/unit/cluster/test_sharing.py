"""Wishes beside running training attempts: written when something changes, and only then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastserve.artifacts import attempts
from fastserve.artifacts.store import Store
from fastserve.artifacts.stores import open_store
from fastserve.cluster.sharing import share_machines
from fastserve.plan import keys
from fastserve.plan.observed import Attempt, AttemptState, Observed
from fastserve.plan.sharing import GIVE_BACK_SECONDS, SETTLE_SECONDS, SHORT_SECONDS, Need
from fastserve.plan.stages import Stage
from fastserve.spec.model import Model

NOW = 1_000_000.0
DIGESTS = {"file:///base": "d" * 64, "file:///rows.jsonl": "e" * 64}
WORKERS = [{"profile": "large", "count": 2}, {"profile": "small", "count": 1}]
SHORT = Need("chat", "large", 0, 1, NOW - SHORT_SECONDS)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def model(name: str, **spec: Any) -> Model:
    return Model.model_validate(
        {
            "apiVersion": "fastserve.dev/v1alpha1",
            "kind": "Model",
            "metadata": {"name": name},
            "spec": {"source": "file:///base", **spec},
        }
    )


def trained(name: str = "trained", **train: Any) -> Model:
    section = {"dataset": "file:///rows.jsonl", "workers": WORKERS, "elastic": {"minWorkers": 1}, **train}
    return model(name, train=section)


def served(priority: int) -> Model:
    return model("chat", serve={"priority": priority, "profiles": ["large"]})


def started(store: Store, wanted: Model, state: AttemptState = AttemptState.RUNNING) -> tuple[str, Observed]:
    key = keys.stage_keys(wanted, DIGESTS)[Stage.TRAIN]
    attempts.claim(store, keys.request_for(wanted, Stage.TRAIN, DIGESTS, 1))
    return key, Observed(digests=DIGESTS, attempts={key: Attempt(1, state, model=wanted.name)})


def wish(store: Store, key: str) -> dict[str, Any] | None:
    return attempts.read_wish(store, Stage.TRAIN, key, 1)


def test_a_run_is_asked_for_a_machine_once_and_to_take_it_back_later(store: Store) -> None:
    run = trained()
    key, seen = started(store, run)
    models = {"trained": run, "chat": served(1)}
    observed = {"trained": seen, "chat": Observed(digests=DIGESTS)}
    [said] = share_machines(store, models, observed, [SHORT], NOW)
    assert said.startswith("trained: training lends 1 machine of profile large to chat")
    first = wish(store, key)
    assert first is not None
    assert first["workers"] == {"large": 1, "small": 1}
    assert share_machines(store, models, observed, [SHORT], NOW) == []
    assert wish(store, key) == first
    up = Need("chat", "large", 1)
    later = NOW + 20
    assert share_machines(store, models, observed, [up], later) == []
    renewed = wish(store, key)
    assert renewed is not None
    assert (renewed["at"], renewed["loans"][0]["neededAt"]) == (NOW, later)
    [said] = share_machines(store, models, observed, [], later + GIVE_BACK_SECONDS + SETTLE_SECONDS)
    assert "training takes them back" in said
    lifted = wish(store, key)
    assert lifted is not None
    assert lifted["workers"] is None


def test_what_runs_is_what_was_asked_for_then(store: Store) -> None:
    key, seen = started(store, trained())
    now_fixed = trained(elastic=None, workers=[{"profile": "small", "count": 1}])
    share_machines(store, {"trained": now_fixed, "chat": served(1)}, {"trained": seen}, [SHORT], NOW)
    found = wish(store, key)
    assert found is not None
    assert found["workers"] == {"large": 1, "small": 1}


@pytest.mark.parametrize(
    ("training", "serving", "state"),
    [
        ({"priority": 1}, 1, AttemptState.RUNNING),
        ({"elastic": None}, 1, AttemptState.RUNNING),
        ({}, 0, AttemptState.RUNNING),
        ({}, 1, AttemptState.FAILED),
    ],
)
def test_nobody_else_is_asked(store: Store, training: dict[str, Any], serving: int, state: AttemptState) -> None:
    run = trained(**training)
    key, seen = started(store, run, state)
    assert share_machines(store, {"trained": run, "chat": served(serving)}, {"trained": seen}, [SHORT], NOW) == []
    assert wish(store, key) is None


def test_models_with_one_training_hold_on_as_firmly_as_the_firmest(store: Store) -> None:
    low, high = trained("low"), trained("high", priority=5)
    key, seen = started(store, low)
    models = {"low": low, "high": high, "chat": served(1)}
    assert share_machines(store, models, {"low": seen, "high": seen}, [SHORT], NOW) == []
    assert wish(store, key) is None


def test_a_wish_of_another_version_is_written_anew(store: Store) -> None:
    run = trained()
    key, seen = started(store, run)
    attempts.write_wish(store, Stage.TRAIN, key, 1, {"workers": 2})
    assert share_machines(store, {"trained": run, "chat": served(1)}, {"trained": seen}, [SHORT], NOW) != []
    found = wish(store, key)
    assert found is not None
    assert found["workers"] == {"large": 1, "small": 1}
