"""Which target a request goes to: by weight, by rank, by free slots."""

from __future__ import annotations

import heapq
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.gateway.config import Revision, Served, Target
from fastserve.gateway.routes import REST_SECONDS, Choice, Router


def router_of(*revisions, seed=0, clock=lambda: 0.0):
    return Router({"m": Served("generate", 0, revisions)}, Random(seed), clock)


def one(*targets, **more):
    return router_of(Revision("r", 1, targets), **more)


def sigmas(seen, asked, share):
    """How far a count is from its expectation, in standard deviations of a binomial count."""
    return abs(seen - asked * share) / max(1.0, (asked * share * (1 - share)) ** 0.5)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=6), st.integers(0, 2**32))
def test_traffic_follows_the_weights_and_weight_zero_gets_nothing(shares, seed):
    revisions = tuple(Revision(str(at), share, (Target(f"http://{at}"),)) for at, share in enumerate(shares))
    router = router_of(*revisions, seed=seed)
    asked = 400
    draws = [router.draw("m") for _ in range(asked)]
    if not sum(shares):
        assert draws == [None] * asked
        return
    seen = Counter(draws)
    for at, share in enumerate(shares):
        # Six standard deviations: a false alarm once in 10^8.
        assert sigmas(seen[str(at)], asked, share / sum(shares)) <= 8
        if not share:
            assert seen[str(at)] == 0


@given(st.integers(0, 2**32))
def test_weights_hold_while_one_revision_has_little_room(seed):
    """Draws do not look at capacity: a full revision's requests wait for it instead of going to the other."""
    revisions = (Revision("small", 25, (Target("http://1", 1),)), Revision("large", 75, (Target("http://2", 1000),)))
    router = router_of(*revisions, seed=seed)
    assert router.take("m", "small")
    seen = Counter(router.draw("m") for _ in range(2000))
    assert sigmas(seen["small"], 2000, 0.25) <= 6
    assert router.take("m", "small") is None


class Play:
    """Takes and gives back slots as hypothesis says."""

    def __init__(self, slots, ranks, seed):
        self.targets = tuple(
            Target(f"http://{at}", size, rank=rank) for at, (size, rank) in enumerate(zip(slots, ranks, strict=False))
        )
        self.router = one(*self.targets, seed=seed)
        self.held: list[Choice] = []

    def free(self, target):
        return not target.slots or self.router.running(target.url) < target.slots


places = st.lists(st.integers(0, 4), min_size=1, max_size=5)


@given(places, st.lists(st.integers(0, 2), min_size=5, max_size=5), st.lists(st.booleans(), max_size=80), st.randoms())
def test_never_more_than_the_slots_are_taken_and_a_free_one_is_always_found(slots, ranks, steps, random):
    play = Play(slots, ranks, random.randrange(2**32))
    for takes in steps:
        if not takes and play.held:
            play.router.give_back(play.held.pop(random.randrange(len(play.held))))
            continue
        free = [target for target in play.targets if play.free(target)]
        choice = play.router.take("m", "r")
        assert (choice is None) == (not free)
        if choice is not None:
            play.held.append(choice)
            rank = min(target.rank for target in free)
            assert choice.target in {target.url for target in free if target.rank == rank}
        for target in play.targets:
            assert not target.slots or play.router.running(target.url) <= target.slots
    for choice in play.held:
        play.router.give_back(choice)
    assert all(play.router.running(target.url) == 0 for target in play.targets)


@given(st.lists(st.integers(1, 50), min_size=2, max_size=5), st.integers(0, 2**32))
def test_equal_ranks_are_taken_in_proportion_to_free_slots(slots, seed):
    targets = [Target(f"http://{at}", size) for at, size in enumerate(slots)]
    router = one(*targets, seed=seed)
    asked = 1000
    seen: Counter[str] = Counter()
    for _ in range(asked):
        choice = router.take("m", "r")
        seen[choice.target] += 1
        router.give_back(choice)
    for target in targets:
        assert sigmas(seen[target.url], asked, target.slots / sum(slots)) <= 8


def test_no_target_starves_beside_a_much_larger_one():
    router = one(Target("http://large", 1000), Target("http://small", 1))
    held = [router.take("m", "r") for _ in range(1001)]
    assert Counter(choice.target for choice in held) == {"http://large": 1000, "http://small": 1}
    assert router.take("m", "r") is None


def test_where_slots_are_not_known_the_idlest_is_taken():
    router = one(*(Target(f"http://{at}") for at in range(4)))
    held = [router.take("m", "r") for _ in range(400)]
    assert set(Counter(choice.target for choice in held).values()) == {100}


def test_an_unknown_target_counts_like_its_neighbours_and_is_never_full():
    router = one(Target("http://known", 10), Target("http://unknown"))
    held = Counter(router.take("m", "r").target for _ in range(200))
    assert held == {"http://known": 10, "http://unknown": 190}


def test_lower_rank_first_and_the_next_when_it_is_full():
    router = one(Target("http://dear", 2, "h100", 0), Target("http://cheap", 2, "cpu", 1))
    held = [router.take("m", "r") for _ in range(4)]
    assert [choice.target for choice in held] == ["http://dear"] * 2 + ["http://cheap"] * 2
    router.give_back(held[0])
    assert router.take("m", "r").target == "http://dear"


def test_a_target_for_the_worst_case_is_only_asked_after_a_failure():
    router = one(Target("http://1", 1), Target("http://serve", last=True))
    assert router.take("m", "r").target == "http://1"
    assert router.take("m", "r") is None
    assert router.take_any("m", ["http://1"]).target == "http://serve"
    alone = one(Target("http://serve", last=True))
    assert alone.take("m", "r").target == "http://serve"


def test_after_a_failure_another_direct_target_comes_before_the_last_one():
    router = one(Target("http://1", 1), Target("http://2", 1, rank=1), Target("http://serve", last=True))
    assert router.take_any("m", ["http://1"]).target == "http://2"
    assert router.take_any("m", ["http://1"]).target == "http://serve"


def test_a_target_that_took_nothing_rests_and_comes_back():
    now = 100.0
    router = one(Target("http://dead", 10), Target("http://alive", 2, rank=1), clock=lambda: now)
    router.rest("http://dead")
    assert router.take("m", "r").target == "http://alive"
    assert router.take_any("m").target == "http://alive"
    assert router.take("m", "r") is None  # rather waits than asks the dead one again
    assert router.take_any("m", ["http://dead"]) is None
    now += REST_SECONDS
    assert router.take("m", "r").target == "http://dead"
    assert router.take_any("m").target == "http://dead"


def test_the_only_target_is_asked_though_it_rests():
    router = one(Target("http://dead", 10))
    router.rest("http://dead")
    assert router.take("m", "r").target == "http://dead"
    assert router.take_any("m", ["http://dead"]).target == "http://dead"


def test_a_second_try_avoids_the_first_target_where_it_can():
    revisions = (
        Revision("a", 100, (Target("http://1"), Target("http://2"))),
        Revision("b", 1, (Target("http://3"),)),
        Revision("c", 0, (Target("http://4"),)),
    )
    router = router_of(*revisions)

    def seen(tried, times):
        choices = [router.take_any("m", tried) for _ in range(times)]
        for choice in choices:
            router.give_back(choice)
        return {choice.target for choice in choices}

    assert seen(["http://1"], 500) == {"http://2", "http://3"}
    assert seen(["http://1", "http://2"], 50) == {"http://3"}
    every = ["http://1", "http://2", "http://3"]
    assert seen(every, 2000) == set(every)


def test_a_second_try_takes_the_first_target_again_when_all_others_are_full():
    router = one(Target("http://1", 2), Target("http://2", 1))
    assert router.take_any("m", ["http://1"]).target == "http://2"
    assert router.take_any("m", ["http://1"]).target == "http://1"


def test_running_requests_outlive_a_new_config():
    router = one(Target("http://1", 1))
    assert router.take("m", "r")
    router.models = {"m": Served("generate", 0, (Revision("r", 1, (Target("http://1", 1),)),))}
    assert router.take("m", "r") is None


def test_the_same_seed_chooses_the_same():
    revisions = (Revision("a", 50, (Target("http://1"),)), Revision("b", 50, (Target("http://2"),)))
    first, second = router_of(*revisions, seed=5), router_of(*revisions, seed=5)
    assert [first.draw("m") for _ in range(50)] == [second.draw("m") for _ in range(50)]


def finished_within(seconds, targets, speeds, arrivals_per_s):
    """Requests that are done after so long, in virtual time: each slot serves one at a time at its target's speed."""
    router = one(*targets)
    ends: list[tuple[float, int, Choice]] = []
    waiting = done = number = 0
    now, gap = 0.0, 1 / arrivals_per_s
    while now < seconds:
        while ends and ends[0][0] <= now:
            router.give_back(heapq.heappop(ends)[2])
            done += 1
        waiting += 1
        while waiting and (choice := router.take("m", "r")):
            waiting -= 1
            number += 1
            heapq.heappush(ends, (now + 1 / speeds[choice.target], number, choice))
        now += gap
    return done


@pytest.mark.parametrize("slower", [3, 5])
def test_free_capacity_makes_more_of_unequal_targets_than_even_shares_do(slower):
    """A fast target and a slow one, asked for as much as both can do together."""
    speeds = {"http://fast": 1.0, "http://slow": 1 / slower}
    wanted = 12 * (1 + 1 / slower)
    by_capacity = finished_within(200, [Target("http://fast", 12), Target("http://slow", 12)], speeds, wanted)
    solo = 200 * wanted
    assert by_capacity >= 0.9 * solo
    # Even routing sends each half of the requests, whether it keeps up or not.
    even = 200 * sum(min(wanted / 2, 12 * speed) for speed in speeds.values())
    assert by_capacity > 1.15 * even
