"""Training and serving on one set of machines: a small world in which runs and replicas follow what is decided."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.plan.sharing import (
    GIVE_BACK_SECONDS,
    SETTLE_SECONDS,
    SHORT_SECONDS,
    Need,
    TrainingRun,
    Wish,
    room_for,
    share,
)

PROFILES = ("large", "small")
BEAT_SECONDS = 2.0


class World:
    """Machines by profile; runs and replicas take them, replicas first come, and keep what they have."""

    def __init__(self, runs: list[TrainingRun], spare: dict[str, int], priorities: dict[str, int]) -> None:
        self.runs, self.priorities, self.now = runs, priorities, 1000.0
        self.machines = Counter(spare)
        for run in runs:
            self.machines.update(run.workers)
        self.wanted: Counter[tuple[str, str]] = Counter()
        self.held: Counter[tuple[str, str]] = Counter()
        self.since: dict[tuple[str, str], float] = {}
        self.changes = [0] * len(runs)
        self.asked: list[Need] = []

    def workers(self, number: int) -> Counter[str]:
        run = self.runs[number]
        wish = run.wish
        return Counter(run.workers if wish is None or wish.workers is None else wish.workers)

    def free(self, profile: str) -> int:
        training = sum(self.workers(number)[profile] for number in range(len(self.runs)))
        return self.machines[profile] - training - sum(held for (_, of), held in self.held.items() if of == profile)

    def needs(self) -> list[Need]:
        return [
            Need(
                model,
                profile,
                self.held[model, profile],
                max(0, self.wanted[model, profile] - self.held[model, profile]),
                self.since.get((model, profile)),
                priority,
            )
            for model, priority in self.priorities.items()
            for profile in PROFILES
        ]

    def loans(self) -> list[tuple[str, str, int]]:
        return [(loan.model, loan.profile, loan.replica) for run in self.runs for loan in run.loans]

    def beat(self) -> None:
        for place, wanted in list(self.wanted.items()):
            self.held[place] = min(self.held[place], wanted)
            while self.held[place] < wanted and self.free(place[1]) > 0:
                self.held[place] += 1
            if self.held[place] < wanted:
                self.since.setdefault(place, self.now)
            else:
                self.since.pop(place, None)
        before, self.asked = self.runs, self.needs()
        wishes = share(before, self.asked, self.now)
        for number, (run, wish) in enumerate(zip(before, wishes, strict=True)):
            old = None if run.wish is None else run.wish.workers
            self.changes[number] += (None if wish is None else wish.workers) != old
        self.runs = [
            TrainingRun(run.model, run.priority, run.workers, run.min_workers, wish)
            for run, wish in zip(before, wishes, strict=True)
        ]
        assert share(self.runs, self.needs(), self.now) == wishes  # twice equals once
        self.now += BEAT_SECONDS

    def beats(self, seconds: float) -> None:
        for _ in range(int(seconds / BEAT_SECONDS) + 1):
            self.beat()


def run(workers: dict[str, int], least: int | None, priority: int = 0, name: str = "trained") -> TrainingRun:
    return TrainingRun(name, priority, workers, least)


def test_a_replica_without_a_machine_gets_one_and_it_comes_back():
    world = World([run({"large": 2, "small": 1}, 1)], {}, {"chat": 1})
    world.wanted["chat", "large"] = 1
    world.beats(SHORT_SECONDS + 2 * BEAT_SECONDS)
    wish = world.runs[0].wish
    assert wish.workers == {"large": 1, "small": 1}
    assert "1 machine of profile large to chat" in wish.because
    assert world.held["chat", "large"] == 1
    world.beats(4 * GIVE_BACK_SECONDS)
    assert world.runs[0].wish.workers == {"large": 1, "small": 1}
    world.wanted["chat", "large"] = 0
    world.beats(GIVE_BACK_SECONDS / 2)
    assert world.runs[0].wish.workers is not None
    world.beats(GIVE_BACK_SECONDS)
    assert world.runs[0].wish.workers is None
    assert world.changes == [2]


def test_a_replica_that_has_just_been_asked_for_takes_nothing():
    runs = [run({"large": 2}, 1)]
    assert share(runs, [Need("chat", "large", 0, 1, 10.0, 1)], 10.0 + SHORT_SECONDS / 2) == [None]
    assert share(runs, [Need("chat", "large", 0, 1, None, 1)], 1e9) == [None]


@pytest.mark.parametrize(
    "kept",
    [run({"large": 2}, None), run({"large": 2}, 2), run({"large": 2}, 1, priority=1), run({"small": 2}, 1)],
    ids=["fixed size", "at its least", "equal priority", "another profile"],
)
def test_who_may_not_give_keeps_all(kept):
    world = World([kept], {}, {"chat": 1})
    world.wanted["chat", "large"] = 1
    world.beats(120)
    assert world.runs[0].wish is None


def test_the_least_important_run_gives_first():
    world = World([run({"large": 2}, 1, 1, "b"), run({"large": 2}, 1, 0, "a")], {}, {"chat": 2})
    world.wanted["chat", "large"] = 1
    world.beats(20)
    assert [world.workers(0)["large"], world.workers(1)["large"]] == [2, 1]
    world.wanted["chat", "large"] = 2
    world.beats(60)
    assert [world.workers(0)["large"], world.workers(1)["large"]] == [1, 1]


def test_a_load_that_comes_and_goes_moves_no_machine_each_time():
    world = World([run({"large": 2}, 1)], {}, {"chat": 1})
    for _ in range(20):
        world.wanted["chat", "large"] = 1
        world.beats(20)
        world.wanted["chat", "large"] = 0
        world.beats(20)
    assert world.changes == [1]


def test_a_run_that_is_raised_above_takes_its_machines_back():
    world = World([run({"large": 2}, 1)], {}, {"chat": 1})
    world.wanted["chat", "large"] = 1
    world.beats(SETTLE_SECONDS + 20)
    [old] = world.runs
    raised = TrainingRun(old.model, 1, old.workers, old.min_workers, old.wish)
    [wish] = share([raised], world.needs(), world.now)
    assert wish.workers is None


def test_a_wish_survives_json():
    world = World([run({"large": 2}, 1)], {}, {"chat": 1})
    world.wanted["chat", "large"] = 1
    world.beats(20)
    wish = world.runs[0].wish
    assert Wish.from_json(json.loads(json.dumps(wish.to_json()))) == wish
    assert Wish.from_json(Wish(None, "", 1.0).to_json()) == Wish(None, "", 1.0)


COUNTS = st.dictionaries(st.sampled_from(PROFILES), st.integers(1, 3), min_size=1)


@st.composite
def training(draw, name):
    workers = draw(COUNTS)
    least = draw(st.none() | st.integers(1, sum(workers.values())))
    return TrainingRun(name, draw(st.integers(0, 2)), workers, least)


LOADS = st.lists(
    st.tuples(
        st.dictionaries(st.tuples(st.sampled_from(("x", "y")), st.sampled_from(PROFILES)), st.integers(0, 3)),
        st.floats(1, 200),
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(training("a"), training("b")),
    st.dictionaries(st.sampled_from(PROFILES), st.integers(0, 2)),
    st.fixed_dictionaries({"x": st.integers(0, 3), "y": st.integers(0, 3)}),
    LOADS,
)
def test_whatever_the_load_nobody_gives_too_much_and_all_comes_back(runs, spare, priorities, loads):
    world = World(list(runs), spare, priorities)
    for wanted, seconds in loads:
        world.wanted.update(wanted)
        for place in list(world.wanted):
            world.wanted[place] = wanted.get(place, 0)
        for _ in range(int(seconds / BEAT_SECONDS) + 1):
            lent_before = [Counter((loan.model, loan.profile) for loan in one.loans) for one in world.runs]
            before = world.loans()
            world.beat()
            for number, one in enumerate(world.runs):
                workers = world.workers(number)
                lent = Counter((loan.model, loan.profile) for loan in one.loans)
                assert all(0 <= workers[profile] <= count for profile, count in one.workers.items())
                assert sum(workers.values()) == sum(one.workers.values()) - lent.total()
                if one.min_workers is None:
                    assert one.wish is None
                else:
                    assert sum(workers.values()) >= one.min_workers
                assert all(priorities[model] > one.priority for model, _ in lent)
                # Nothing new is taken for a replica that does not wait.
                for model, profile in lent - lent_before[number]:
                    assert (model, profile) in world.since
            assert len(set(world.loans())) == len(world.loans())
            wanted_now = {(need.model, need.profile): need.replicas + need.waiting for need in world.asked}
            for model, profile, replica in set(world.loans()) - set(before):
                assert replica <= wanted_now[model, profile]
    for place in world.wanted:
        world.wanted[place] = 0
    world.beats(2 * GIVE_BACK_SECONDS + 2 * SETTLE_SECONDS)
    assert all(one.wish is None or one.wish.workers is None for one in world.runs)


def test_who_can_be_helped_is_helped():
    world = World([run({"large": 3}, 1)], {}, {"x": 1})
    world.wanted["x", "large"] = 3
    world.beats(120)
    assert world.held["x", "large"] == 2


@given(COUNTS, st.none() | st.dictionaries(st.sampled_from(PROFILES), st.integers(0, 3)), st.none() | st.integers(1, 6))
def test_a_run_is_started_with_the_places_that_are_left(wanted, usable, least):
    size = room_for(wanted, usable, least)
    if size != wanted:
        assert sum(size.values()) >= least
        assert all(size[profile] == min(count, usable.get(profile, 0)) for profile, count in wanted.items())
    elif usable is not None and least is not None:
        fits = sum(min(count, usable.get(profile, 0)) for profile, count in wanted.items())
        assert fits < least or fits == sum(wanted.values())
