"""Where the time goes: averages that follow at once, and the right rank named for the right reason."""

from __future__ import annotations

import math

import pytest
import torch

from fastserve.plan.shares import TrainingFacts, WorkerFacts, plan_shares, replan
from fastserve.stages.train.meter import SETTLES_AFTER, Meter, Pace, Slow, Times, Watch


def step(own: list[float], tokens: list[float] | None = None, data: list[float] | None = None, wire: float = 0.0):  # type: ignore[no-untyped-def]
    """Times of a step in which every rank waits for the slowest; `wire` seconds more for the exchange itself."""
    wall = max(own) + wire
    tokens = tokens or [100.0] * len(own)
    data = data or [0.0] * len(own)
    return [Times(wall, d, wall - o, t) for o, d, t in zip(own, data, tokens, strict=True)]


def settled(seconds: list[float], count: int = 3) -> Meter:
    meter = Meter([Pace(second / 100) for second in seconds])
    for _ in range(SETTLES_AFTER + count):
        meter.take(step(seconds))
    return meter


def test_the_first_steps_are_not_counted() -> None:
    meter = Meter([Pace(0.01), Pace(0.01)])
    for _ in range(SETTLES_AFTER):
        meter.take(step([9.0, 1.0]))
        assert all(math.isnan(value) for value in meter.seconds_per_token)
    meter.take(step([1.0, 1.0]))
    assert meter.seconds_per_token == pytest.approx([0.01, 0.01])


def test_a_slow_step_moves_the_average_by_its_weight() -> None:
    meter = settled([1.0, 1.0])
    meter.take(step([4.0, 1.0]))
    assert meter.seconds_per_token == pytest.approx([0.6 * 0.04 + 0.4 * 0.01, 0.01])
    assert meter.step_seconds == pytest.approx(0.6 * 4 + 0.4 * 1)
    assert meter.idle_shares()[1] > 0.5


def test_nobody_is_slow_where_all_are_as_they_were() -> None:
    assert settled([1.0, 2.0, 4.0]).slow() is None  # unequal machines are no news
    meter = settled([1.0, 1.0])
    for _ in range(3):
        meter.take(step([2.0, 2.0]))  # both at once: the samples are longer, or the machine they share is busy
    assert meter.slow() is None


def test_a_rank_that_lost_its_speed_is_named_and_recovers() -> None:
    meter = settled([1.0, 1.0, 1.0])
    for _ in range(3):
        meter.take(step([1.0, 4.0, 1.0]))
    slow = meter.slow()
    assert slow is not None
    assert (slow.rank, slow.cause) == (1, "compute")
    assert slow.share == pytest.approx(0.73, abs=0.05)
    assert slow.to_json() == {"rank": 1, "cause": "compute", "share": slow.share}
    for _ in range(5):
        meter.take(step([1.0, 1.0, 1.0]))
    assert meter.slow() is None


def test_a_rank_is_named_even_when_it_was_slow_from_the_first_step() -> None:
    meter = Meter([Pace(0.01)] * 3)
    for _ in range(SETTLES_AFTER + 2):
        meter.take(step([1.2, 1.2, 6.0], data=[0.0, 0.0, 4.8]))
    slow = meter.slow()
    assert slow is not None
    assert (slow.rank, slow.cause) == (2, "data")
    assert slow.share == pytest.approx(0.8)


def test_data_are_the_cause_where_the_time_goes_there() -> None:
    meter = settled([1.0, 1.0])
    for _ in range(3):
        meter.take(step([3.0, 1.0], data=[2.0, 0.0]))
    slow = meter.slow()
    assert slow is not None
    assert (slow.rank, slow.cause) == (0, "data")


def test_the_network_is_looked_at_when_all_stand_still_and_the_slow_link_is_named() -> None:
    meter = settled([1.0, 1.0, 1.0])
    assert not meter.wants_a_look_at_the_network()
    for _ in range(25):
        meter.take(step([1.0, 1.0, 1.0], wire=3.0))
    assert meter.wants_a_look_at_the_network()
    meter.take_links([0.01, 0.01, 0.01])
    assert meter.slow() is None
    assert not meter.wants_a_look_at_the_network()  # not at every step
    meter.take_links([0.01, 0.01, 0.3])
    slow = meter.slow()
    assert slow == Slow(2, "network", pytest.approx(0.75, abs=0.02))


def test_a_rank_without_tokens_has_no_speed_and_does_no_harm() -> None:
    meter = Meter([Pace(0.01), Pace(0.01)])
    for _ in range(SETTLES_AFTER + 2):
        meter.take(step([1.0, 0.1], tokens=[100.0, 0.0]))
    assert math.isnan(meter.seconds_per_token[1])
    assert meter.slow() is None


def test_what_every_micro_batch_costs_does_not_make_a_rank_with_few_tokens_slow() -> None:
    # 1 s a micro-batch and 10 ms a token: alone with 10 tokens it would look ten times slower than it is.
    meter = Meter([Pace(0.01, 1.0), Pace(0.01, 1.0)])
    for _ in range(SETTLES_AFTER + 2):
        meter.take(step([1.1, 11.0], tokens=[10.0, 1000.0]))
    assert meter.seconds_per_token == pytest.approx([0.01, 0.01])
    for _ in range(8):
        meter.take(step([4.4, 11.0], tokens=[10.0, 1000.0]))
    assert meter.seconds_per_token == pytest.approx([0.04, 0.01], rel=1e-2)


def test_a_rank_that_gets_nothing_any_more_slowly_gets_the_benefit_of_the_doubt() -> None:
    meter = settled([1.0, 1.0])
    for _ in range(5):
        meter.take(step([20.0, 1.0]))
    assert meter.seconds_per_token[0] > 0.15
    for _ in range(60):
        meter.take(step([0.0, 1.0], tokens=[0.0, 100.0]))
    assert meter.seconds_per_token[0] == pytest.approx(0.01)


def test_new_shares_come_within_five_steps_of_a_slow_down_and_go_back_after_it() -> None:
    workers = [WorkerFacts(f"rank-{rank}", "local", speed, 1 << 40) for rank, speed in enumerate((100.0, 200.0, 400.0))]
    plan = plan_shares(workers, TrainingFacts(1 << 20, 0, 1 << 10, 1 << 10, 1.0, 1 << 20, 16), 7000)
    first = plan.batch
    meter = Meter([Pace(1 / worker.tokens_per_s) for worker in workers])

    def take(speeds: list[float]) -> None:
        nonlocal plan
        tokens = [share * 7000 for share in plan.batch]
        meter.take(step([t / speed for t, speed in zip(tokens, speeds, strict=True)], tokens))
        if not math.isnan(meter.seconds_per_token[0]):
            plan = replan(plan, meter.seconds_per_token, 0.05)

    for _ in range(6):
        take([100.0, 200.0, 400.0])
    assert plan.batch == first  # nothing to gain
    for _ in range(5):
        take([100.0, 200.0, 100.0])
    assert plan.batch == pytest.approx((0.25, 0.5, 0.25), rel=0.06)
    for _ in range(5):
        take([100.0, 200.0, 400.0])
    assert plan.batch == pytest.approx(first, rel=0.06)


def test_a_watch_tells_waiting_for_data_from_the_rest() -> None:
    watch = Watch(torch.device("cpu"))
    with watch.fetching():
        sum(range(200_000))
    sum(range(200_000))
    assert 0 < watch.data < watch.seconds()
