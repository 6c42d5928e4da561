"""The sizes of a run: what it is asked for, what others leave it, and when its workers are told to stop."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fastserve.artifacts import attempts
from fastserve.artifacts.store import Store
from fastserve.errors import StoreFailed
from fastserve.plan.sharing import Wish
from fastserve.plan.stages import Stage, StageRequest
from fastserve.spec.train import Train
from fastserve.stages.train import news, pause, size
from fastserve.stages.train.machines import selectors, usable_places
from fastserve.stages.train.size import Size, Sizes
from fastserve.stages.work import Work
from fastserve.telemetry.progress import Reporter

LABEL = "fastserve.dev/profile"
KEY = "a" * 64


def train(elastic: int | None = 1, **count: int) -> Train:
    workers = [{"profile": profile, "count": number} for profile, number in count.items()]
    section = {"dataset": "rows.jsonl", "workers": workers}
    return Train.model_validate(section | ({} if elastic is None else {"elastic": {"minWorkers": elastic}}))


def nodes(*profiles: str, cpus: int = 1) -> list[dict[str, Any]]:
    return [
        {"NodeID": f"{number}", "Alive": True, "Labels": {LABEL: profile}, "Resources": {"CPU": cpus}}
        for number, profile in enumerate(profiles)
    ]


def free(*cpus: float) -> dict[str, dict[str, float]]:
    return {f"{number}": {"CPU": left} for number, left in enumerate(cpus)}


LISTED = {"large": 2, "small": 1}
THREE = nodes("small", "large", "large")


@pytest.mark.parametrize(
    ("held", "left", "found"),
    [
        ({}, free(1, 1, 1), LISTED),
        ({}, free(1, 0, 1), {"large": 1, "small": 1}),
        ({"large": 1, "small": 1}, free(0, 0, 0), {"large": 1, "small": 1}),
        ({"large": 1, "small": 1}, free(0, 0, 1), LISTED),
        ({"large": 1, "small": 1}, free(0, 0.5, 0), {"large": 1, "small": 1}),
        ({}, {}, {"large": 0, "small": 0}),
    ],
)
def test_places_that_others_have_taken_are_none_of_the_run(
    held: Mapping[str, int], left: Mapping[str, Mapping[str, float]], found: Mapping[str, int]
) -> None:
    assert usable_places(LISTED, held, THREE, left, accelerated=False) == found


def test_machines_that_may_come_are_counted_as_there_while_nobody_else_is_on_their_profile() -> None:
    assert usable_places(LISTED, {}, nodes("small", "large"), free(1, 1), accelerated=False) == LISTED
    taken = usable_places(LISTED, {}, nodes("small", "large"), free(1, 0), accelerated=False)
    assert taken == {"large": 0, "small": 1}


def test_accelerators_count_where_workers_have_them_and_any_machine_is_local() -> None:
    there = [{"NodeID": "0", "Alive": True, "Labels": {}, "Resources": {"CPU": 16, "GPU": 4}}]
    left = {"0": {"CPU": 12.0, "GPU": 1.0}}
    assert usable_places({"local": 4}, {}, there, left, accelerated=True) == {"local": 1}
    assert usable_places({"local": 4}, {}, there, left, accelerated=False) == {"local": 12}
    assert usable_places({"local": 1, "large": 1}, {}, there, left, accelerated=True) is None


def test_a_run_that_lends_machines_asks_for_exactly_what_it_keeps() -> None:
    section = train(1, large=2, small=1)
    either = {LABEL: "in(large,small)"}
    assert selectors(section, Size(LISTED, LISTED)) == [either] * 3
    lent = Size({"large": 1, "small": 1}, LISTED)
    assert selectors(section, lent) == [{LABEL: "large"}, {LABEL: "small"}]
    fixed = train(None, large=1, small=1)
    whole = {"large": 1, "small": 1}
    assert selectors(fixed, Size(whole, whole)) == [{LABEL: "large"}, {LABEL: "small"}]
    assert selectors(train(1, local=2), Size({"local": 1}, {"local": 2})) is None


class Cluster:
    """Places by profile that the run has or could have; all of them unless said otherwise."""

    def __init__(self) -> None:
        self.taken: Counter[str] = Counter()

    def usable(self, held: Mapping[str, int]) -> Mapping[str, int]:
        return {profile: count - self.taken[profile] for profile, count in LISTED.items()}


@pytest.fixture
def request_(store: Store) -> StageRequest:
    request = StageRequest("m", Stage.TRAIN, KEY, 1, {})
    attempts.claim(store, request)
    return request


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Parts whose workers were asked to stop."""
    found: list[int] = []
    monkeypatch.setattr(pause, "ask", lambda store, request, part: found.append(part))
    monkeypatch.setattr(size, "LOOK_EVERY_SECONDS", 0.01)
    monkeypatch.setattr(size, "GROW_AFTER_SECONDS", 0.05)
    monkeypatch.setattr(size, "_SETTLES_SECONDS", 0.05)
    return found


def wish(store: Store, workers: Mapping[str, int] | None) -> None:
    value = Wish(workers, "training lends 1 machine of profile large to chat", time.time()).to_json()
    attempts.write_wish(store, Stage.TRAIN, KEY, 1, value)


def sizes(store: Store, request: StageRequest, cluster: Cluster, tmp_path: Path, least: int | None = 1) -> Sizes:
    work = Work(request, store, tmp_path, Reporter(lambda _: None))
    return Sizes(work, train(least, large=2, small=1), cluster.usable)


def until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 100
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_wish_makes_the_run_stop_and_begin_smaller_and_its_end_makes_it_grow(
    store: Store, request_: StageRequest, asked: list[int], tmp_path: Path
) -> None:
    cluster = Cluster()
    found = sizes(store, request_, cluster, tmp_path)
    assert found.choose() == Size(LISTED, LISTED)
    assert found.now.note == ""
    with found.watching(1):
        time.sleep(0.1)
        assert asked == []
        wish(store, {"large": 1, "small": 1})
        until(lambda: asked == [1])
    small = found.choose()
    assert small.workers == {"large": 1, "small": 1}
    assert found.now.note == "training with 2 of 3 workers: training lends 1 machine of profile large to chat"
    cluster.taken["large"] = 1
    with found.watching(2):
        wish(store, None)
        time.sleep(0.2)
        assert asked == [1]  # the replica is still there
        cluster.taken["large"] = 0
        until(lambda: asked == [1, 2])
    assert found.choose().whole


def test_a_run_begins_with_what_others_leave_and_grows_when_they_go(
    store: Store, request_: StageRequest, asked: list[int], tmp_path: Path
) -> None:
    cluster = Cluster()
    cluster.taken["large"] = 2
    found = sizes(store, request_, cluster, tmp_path)
    assert found.choose().workers == {"large": 0, "small": 1}
    assert found.now.note == "training with 1 of 3 workers: other machines of profile large are taken"
    with found.watching(1):
        cluster.taken["large"] = 1
        until(lambda: asked == [1])
    assert found.choose().workers == {"large": 1, "small": 1}


@pytest.mark.parametrize("least", [None, 3])
def test_a_run_that_may_not_shrink_waits_for_its_machines(
    store: Store, request_: StageRequest, asked: list[int], tmp_path: Path, least: int | None
) -> None:
    cluster = Cluster()
    cluster.taken["large"] = 1
    wish(store, {"large": 1, "small": 1})
    found = sizes(store, request_, cluster, tmp_path, least)
    assert found.choose().whole
    with found.watching(1):
        time.sleep(0.1)
    assert asked == []


def test_a_store_that_cannot_be_read_changes_nothing(
    store: Store, request_: StageRequest, asked: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish(store, {"large": 1, "small": 1})
    found = sizes(store, request_, Cluster(), tmp_path)
    assert found.choose().count == 2

    def unreachable(*_: Any) -> None:
        raise StoreFailed("the store is away")

    monkeypatch.setattr(attempts, "read_wish", unreachable)
    with found.watching(1):
        time.sleep(0.1)
    assert asked == []
    assert found.choose().count == 2
    monkeypatch.setattr(attempts, "read_wish", lambda *_: {"workers": "many"})
    assert found.choose().count == 2


def test_whoever_watches_the_attempt_is_told_of_the_size(store: Store, request_: StageRequest, tmp_path: Path) -> None:
    written: list[dict[str, Any]] = []
    work = Work(request_, store, tmp_path, Reporter(written.append, min_interval_seconds=0))
    reporter = Reporter(lambda progress: news.tell(store, request_, progress), min_interval_seconds=0)
    remark = ""
    with news.following(work, lambda: remark):
        reporter.update(3, 10, "steps", "training", loss=2.0)
        until(lambda: bool(written))
        assert written[-1]["note"] == "training"
        remark = "training with 2 of 3 workers"
        until(lambda: written[-1]["note"] == remark)
        assert written[-1]["metrics"]["size"] == remark
        remark = ""
        until(lambda: written[-1]["metrics"]["size"] == "")
    assert (written[-1]["done"], written[-1]["metrics"]["loss"]) == (3, 2.0)
    assert json.dumps(written[-1])
