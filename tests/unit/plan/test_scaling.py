"""The policy on traces: bounds, monotone in load, no back and forth, quick up and slow down."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.plan.scaling import Decision, Snapshot, State, decide

STEP = 0.5


def look(**more: object) -> Snapshot:
    usual = Snapshot(now=1000.0, running=1, wanted=1, least=1, most=8, queue=4, requests=0)
    return replace(usual, **more)  # type: ignore[arg-type]


class Fleet:
    """A deployment in virtual time: replicas take `start_seconds` to come up, and go at once."""

    def __init__(self, usual: Snapshot, start_seconds: float = 10.0) -> None:
        self.look, self.state, self.start_seconds = usual, State(), start_seconds
        self.now, self.wanted, self.ready = usual.now, usual.wanted, [0.0] * usual.wanted
        self.history: list[Decision] = []
        self.changes: list[tuple[float, int]] = []

    def step(self, requests: float, **signals: object) -> Decision:
        self.now += STEP
        running = sum(at <= self.now for at in self.ready)
        seen = replace(
            self.look,
            now=self.now,
            running=running,
            wanted=self.wanted,
            requests=requests,
            **signals,  # type: ignore[arg-type]
        )
        decision = decide(seen, self.state)
        self.state = decision.state
        if decision.replicas != self.wanted:
            self.changes.append((self.now - self.look.now, decision.replicas))
        while len(self.ready) < decision.replicas:
            self.ready.append(self.now + self.start_seconds)
        del self.ready[decision.replicas :]
        self.wanted = decision.replicas
        self.history.append(decision)
        return decision

    def run(self, seconds: float, requests: float, **signals: object) -> Fleet:
        for _ in range(round(seconds / STEP)):
            self.step(requests, **signals)
        return self


def bursts(rng: random.Random) -> list[float]:
    trace: list[float] = []
    while len(trace) < 900:
        trace += [rng.choice([0, 0, 3, 12, 60])] * rng.randrange(5, 150)
    return trace


def ramp(rng: random.Random) -> list[float]:
    top = rng.uniform(5, 60)
    return [top * min(at, 900 - at) / 450 for at in range(900)]


def noise(rng: random.Random) -> list[float]:
    level = rng.uniform(1, 30)
    return [max(0.0, rng.gauss(level, level**0.5)) for _ in range(900)]


@pytest.mark.parametrize("shape", [bursts, ramp, noise])
@given(seed=st.integers(0, 10_000), least=st.integers(0, 3), spread=st.integers(0, 8))
@settings(max_examples=15, deadline=None)
def test_bounds_hold_and_quiet_brings_it_back_to_the_least(shape: object, seed: int, least: int, spread: int) -> None:
    most = max(1, least + spread)
    fleet = Fleet(look(least=least, most=most, wanted=max(1, least), idle_seconds=60))
    for requests in shape(random.Random(seed)):  # type: ignore[operator]
        fleet.step(requests)
    assert all(least <= decision.replicas <= most for decision in fleet.history)
    assert all(decision.because.endswith(".") for decision in fleet.history)
    quiet_since = fleet.now - fleet.look.now
    fleet.run(200, 0)
    assert fleet.wanted == least
    assert not [at for at, _ in fleet.changes if at > quiet_since + 130], "and then it stays there"


@given(
    level=st.floats(0.5, 60),
    queue=st.sampled_from([1, 2, 4, 7.5]),
    start=st.integers(1, 12),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None)
def test_noise_around_a_level_never_moves_it_there_and_back(level: float, queue: float, start: int, seed: int) -> None:
    rng = random.Random(seed)
    fleet = Fleet(look(most=100, queue=queue, wanted=start))
    for _ in range(1200):
        fleet.step(level * rng.uniform(0.9, 1.1))
    steps = [
        after - before
        for before, after in zip([start, *(n for _, n in fleet.changes)], (n for _, n in fleet.changes), strict=False)
    ]
    assert all(step > 0 for step in steps) or all(step < 0 for step in steps), fleet.changes
    assert fleet.wanted >= level * 0.9 / queue / 1.1 - 1e-6
    if level > queue * 2:
        assert fleet.wanted <= level * 1.1 / queue / 0.8 + 1


@given(
    requests=st.floats(0, 200),
    more=st.floats(0, 100),
    wanted=st.integers(0, 10),
    up=st.integers(0, 3),
    ttft=st.sampled_from([0.0, 0.2, 0.6, 2.0]),
    kv=st.floats(0, 1),
    speed=st.floats(0, 500),
    age=st.floats(0, 120),
)
@settings(max_examples=300, deadline=None)
def test_more_load_never_means_fewer_replicas(
    requests: float, more: float, wanted: int, up: int, ttft: float, kv: float, speed: float, age: float
) -> None:
    running = max(0, wanted - up)
    before = State(since=1000 - age, at=999.5, peaks=((990.0, requests),), asked_at=995.0, best_tokens_per_s=400.0)
    seen = look(
        running=running, wanted=wanted, least=0, most=50, requests=requests, ttft_target_seconds=0.5,
        ttft_seconds=ttft, kv_use=kv, tokens_per_s=(speed,) * running, slots=16,
    )  # fmt: skip
    less, greater = decide(seen, before), decide(replace(seen, requests=requests + more), before)
    assert greater.replicas >= less.replicas
    assert greater.asked >= less.asked
    worse = decide(replace(seen, ttft_seconds=ttft * 3, kv_use=1.0), before)
    assert worse.replicas >= less.replicas


def test_a_crowd_is_answered_in_one_look_and_a_small_excess_after_two_seconds() -> None:
    fleet = Fleet(look())
    assert fleet.step(9).replicas == 2
    small = Fleet(look())
    assert small.step(4.5).replicas == 1
    small.run(1.5, 4.5)
    assert small.wanted == 1
    assert small.run(1, 4.5).wanted == 2


def test_a_crowd_at_most_doubles_what_runs_unless_replicas_work_as_fast_as_they_can() -> None:
    best = State(since=900.0, at=999.0, best_tokens_per_s=100.0)
    crowd = look(requests=32, running=2, wanted=2)
    assert decide(replace(crowd, tokens_per_s=(30.0, 30.0)), best).replicas == 4
    flat_out = decide(replace(crowd, tokens_per_s=(95.0, 95.0)), best)
    assert flat_out.replicas == 8
    assert "each makes 95 tokens/s, and 100 is the most" in flat_out.because


def test_doubling_counts_what_runs_not_what_was_just_asked_for() -> None:
    assert Fleet(look(most=100), start_seconds=30).run(20, 400).wanted == 2


def test_it_goes_down_after_a_minute_and_to_zero_after_five() -> None:
    fleet = Fleet(look(least=0)).run(40, 30).run(400, 0)
    up = max(number for _, number in fleet.changes)
    assert up > 2
    down = [(at, number) for at, number in fleet.changes if at > 40]
    assert [number for _, number in down] == [1, 0]
    assert 100 <= down[0][0] <= 107
    assert 340 <= down[1][0] <= 342


def test_to_zero_waits_for_the_first_replica_and_for_whoever_asks() -> None:
    slow = Fleet(look(least=0, running=0, idle_seconds=5), start_seconds=0)
    slow.ready = [1060.0]
    slow.run(60, 0)
    assert slow.wanted == 1
    slow.run(4, 0).run(1, 1).run(4, 0)
    assert slow.wanted == 1
    assert slow.run(2, 0).wanted == 0
    assert slow.step(1).replicas == 1


def test_who_did_not_look_for_a_while_does_not_take_it_for_quiet() -> None:
    state = Fleet(look(least=0)).run(10, 1).state
    assert decide(look(now=2000, least=0), state).replicas == 1, "Serve answers requests at zero without asking"


def test_a_missed_time_to_first_token_adds_replicas_and_is_remembered() -> None:
    fleet = Fleet(look(ttft_target_seconds=0.5))
    first = fleet.step(3.5, ttft_seconds=1.0)
    assert first.replicas == 2
    assert "first token takes 1.0s, above target.ttft 500ms" in first.because
    fleet.run(15, 3.5, ttft_seconds=0.4)
    assert fleet.wanted == 2
    fleet.run(240, 3.5, ttft_seconds=0.4)
    assert fleet.wanted == 2, "one replica had 3.5 requests when the target was missed, so two stay"
    fleet.run(1200, 1.0, ttft_seconds=0.2)
    assert fleet.wanted == 1


def test_a_target_that_no_number_of_replicas_reaches_does_not_fill_the_cluster() -> None:
    assert Fleet(look(ttft_target_seconds=0.001, most=50)).run(600, 3, ttft_seconds=0.5).wanted <= 4


def test_a_full_cache_adds_replicas() -> None:
    decision = decide(look(requests=3, kv_use=0.95, most=4), State())
    assert decision.replicas == 2
    assert "95% of the KV cache" in decision.because


def test_full_slots_count_as_overload_since_the_rest_waits_elsewhere() -> None:
    fleet = Fleet(look(queue=50, slots=8, most=4)).run(3, 8)
    assert fleet.wanted == 2


def test_fewer_replicas_must_be_able_to_make_what_is_made_now() -> None:
    fleet = Fleet(look(wanted=3, most=4))
    for _ in range(400):
        fleet.step(3, tokens_per_s=(95.0, 95.0, 95.0))
    assert fleet.wanted == 3, "three requests would fit one replica, but no replica was seen to make 285 tokens/s"
    assert fleet.run(200, 3, tokens_per_s=(25.0, 25.0, 25.0)).wanted == 1


def test_what_the_load_asks_for_is_told_beside_what_the_bounds_leave() -> None:
    decision = decide(look(requests=100, running=2, wanted=2, most=2), State())
    assert (decision.replicas, decision.asked) == (2, 4)
    assert "replicas.max leaves 2" in decision.because


def test_the_state_survives_being_written_down() -> None:
    state = Fleet(look(ttft_target_seconds=0.5)).run(30, 9, ttft_seconds=1.0, tokens_per_s=(50.0,)).state
    assert State.from_json(state.to_json()) == state
