"""What a worker finds out before its first step."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from ranks import run_ranks

from fastserve.artifacts.store import Store
from fastserve.errors import InsufficientHardware
from fastserve.plan.brought import Kind
from fastserve.spec.train import Train
from fastserve.stages.train.corpus import Corpus
from fastserve.stages.train.group import Group
from fastserve.stages.train.machines import Machines, machines, selectors
from fastserve.stages.train.place import PROFILE_LABEL, Place, memory_bytes, resident_bytes
from fastserve.stages.train.size import Size
from fastserve.stages.train.start import given_speeds, start
from fastserve.stages.train.task import Task

NewTask = Callable[..., Task]


def train_of(*workers: tuple[str, int, float | None], **section: Any) -> Train:
    listed = [
        {"profile": profile, "count": count, **({} if speed is None else {"speed": speed})}
        for profile, count, speed in workers
    ]
    return Train.model_validate({"dataset": "rows.jsonl", "workers": listed, **section})


def all_of(train: Train) -> Size:
    listed = {workers.profile: workers.count for workers in train.workers}
    return Size(listed, listed)


def test_given_speeds_go_by_profile_not_by_the_order_of_ranks() -> None:
    train = train_of(("slow", 1, 1), ("fast", 2, 4))
    assert given_speeds(train, ["fast", "slow", "fast"]) == [4.0, 1.0, 4.0]
    assert given_speeds(train, ["fast", "fast"]) == [4.0, 4.0]  # the slow one is gone
    assert given_speeds(train_of(("local", 1, 1), ("local", 1, 3)), ["local", "local"]) == [1.0, 3.0]
    assert given_speeds(train_of(("a", 1, 3), ("b", 1, None)), ["b", "a"]) == [1.0, 3.0]
    assert given_speeds(train_of(("a", 1, None)), ["a"]) is None


def node(profile: str | None = None, alive: bool = True, gpus: int = 0, number: str = "") -> dict[str, Any]:
    labels = {} if profile is None else {PROFILE_LABEL: profile}
    resources = {"CPU": 4.0, **({"GPU": float(gpus)} if gpus else {})}
    return {"Alive": alive, "Labels": labels, "Resources": resources, "NodeID": number or str(id(labels))}


def test_workers_go_to_the_machines_of_their_profiles() -> None:
    train = train_of(("l4", 2, None), ("a100", 1, None))
    nodes = [node("l4", gpus=1), node("a100", gpus=8), node(), node("l4", alive=False, gpus=1)]
    assert machines(train, nodes) == Machines(2, accelerated=True)
    assert selectors(train, all_of(train)) == [{PROFILE_LABEL: "l4"}, {PROFILE_LABEL: "l4"}, {PROFILE_LABEL: "a100"}]
    assert machines(train, [node("l4", gpus=1), node("a100")]) == Machines(2, accelerated=False)
    assert machines(train_of(("local", 2, None)), [node()]).one
    local = train_of(("local", 2, None))
    assert selectors(local, all_of(local)) is None


def test_a_profile_that_no_machine_has_is_refused_with_those_there_are() -> None:
    train = train_of(("h100", 1, None))
    with pytest.raises(
        InsufficientHardware, match=r"profile h100 \(there are: l4, local\).*fastserve.dev/profile=h100"
    ):
        machines(train, [node("l4"), node()])


def test_machines_that_are_brought_are_as_good_as_there() -> None:
    """All of them have been given back: there is the head alone, which computes nothing."""
    train, head = train_of(("h100", 2, None)), {"Alive": True, "NodeID": "head", "Resources": {}}
    kinds = {"h100": Kind(16, 8), "l4": Kind(4, 1), "local": Kind(2)}
    assert machines(train, [head], kinds) == Machines(0, accelerated=True, smallest=kinds["h100"])
    assert selectors(train, all_of(train), kinds) == [{PROFILE_LABEL: "h100"}] * 2
    with pytest.raises(InsufficientHardware, match=r"profile a100 \(there are: h100, l4, local\)"):
        machines(train_of(("a100", 1, None)), [head], kinds)


def test_where_local_machines_are_brought_no_others_will_do() -> None:
    train, kinds = train_of(("local", 2, None)), {"l4": Kind(4, 1), "local": Kind(2)}
    there = [{"Alive": True, "NodeID": "head", "Resources": {}}, node("l4", gpus=1), node("local", number="a")]
    assert machines(train, there, kinds) == Machines(1, accelerated=False, smallest=kinds["local"])
    assert selectors(train, all_of(train), kinds) == [{PROFILE_LABEL: "local"}] * 2
    mixed = train_of(("local", 1, None), ("l4", 1, None))
    assert selectors(mixed, all_of(mixed), kinds) == [{PROFILE_LABEL: "local"}, {PROFILE_LABEL: "l4"}]
    assert not machines(mixed, there, kinds).accelerated
    one_of_two = train_of(("local", 1, None), ("l4", 1, None), elastic={"minWorkers": 1})
    assert selectors(one_of_two, all_of(one_of_two), kinds) == [{PROFILE_LABEL: "in(l4,local)"}] * 2


def test_an_elastic_run_takes_machines_of_any_of_its_profiles() -> None:
    train = train_of(("l4", 2, None), ("a100", 1, None), elastic={"minWorkers": 1})
    assert selectors(train, all_of(train)) == [{PROFILE_LABEL: "in(a100,l4)"}] * 3
    alike = train_of(("l4", 2, None), elastic={"minWorkers": 1})
    assert selectors(alike, all_of(alike)) == [{PROFILE_LABEL: "l4"}] * 2
    lent = Size({"l4": 1, "a100": 1}, {"l4": 2, "a100": 1})
    assert selectors(train, lent) == [{PROFILE_LABEL: "l4"}, {PROFILE_LABEL: "a100"}]
    assert machines(train, [node("l4")]).one  # the other kind may still come
    with pytest.raises(InsufficientHardware):
        machines(train, [node()])


def test_workers_of_one_machine_share_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    def rank() -> tuple[int, int]:
        group = Group.current()
        return memory_bytes(Place(node="one"), group), memory_bytes(Place(node=f"of-{group.rank}"), group)

    total = psutil.virtual_memory().total
    for shared, alone in run_ranks(rank, 2):
        assert 0 < shared < alone <= total
        assert shared == pytest.approx(alone / 2, rel=0.2)


def test_resident_memory_is_this_process_s_own() -> None:
    assert resident_bytes() == pytest.approx(psutil.Process(os.getpid()).memory_info().rss, rel=0.2)


def test_a_start_measures_plans_and_proves_once(
    store: Store, tiny_model: Path, corpus: Corpus, new_task: NewTask
) -> None:
    task = new_task(method="full", steps=3)

    def rank() -> Any:
        started = start(store, task, corpus, tiny_model, Group.current(), Place("l4"))
        return started.plan.to_json(), started.proof, started.measured, started.engine.kept_bytes

    found = run_ranks(rank, 3)
    plans = [plan for plan, _, _, _ in found]
    assert plans[0] == plans[1] == plans[2]
    for number, (plan, proof, measured, kept) in enumerate(found):
        assert measured
        assert proof.gradient_error <= 2e-6
        assert all(worker["tokens_per_s"] > 100 for worker in plan["workers"])
        assert kept == pytest.approx(plan["kept_bytes"][number], rel=0.02, abs=2048)


def test_speeds_of_the_manifest_take_the_place_of_a_probe(
    store: Store, tiny_model: Path, corpus: Corpus, new_task: NewTask
) -> None:
    workers = [{"profile": "local", "count": 1, "speed": 1}, {"profile": "local", "count": 1, "speed": 3}]
    task = new_task(method="full", steps=3, workers=workers)

    def rank() -> Any:
        started = start(store, task, corpus, tiny_model, Group.current(), Place())
        return started.plan.batch, started.plan.state, started.measured

    for batch, state, measured in run_ranks(rank, 2):
        assert batch == pytest.approx((0.25, 0.75))
        assert state == pytest.approx((0.25, 0.75))
        assert not measured
