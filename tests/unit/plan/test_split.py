"""Cutting a whole: exact sums, caps kept, and never slower than any other cut."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from math import isclose

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.errors import InsufficientMemory
from fastserve.plan.split import shares_of, split_batch, split_state

speeds = st.lists(st.floats(0.01, 1000), min_size=1, max_size=4)


def cuts(total: int, workers: int) -> Iterator[tuple[int, ...]]:
    """Every way to cut `total` pieces."""
    for bars in itertools.combinations(range(total + workers - 1), workers - 1):
        edges = (-1, *bars, total + workers - 1)
        yield tuple(right - left - 1 for left, right in itertools.pairwise(edges))


def slowest(parts: tuple[int, ...], rates: list[float]) -> float:
    return max(part / rate for part, rate in zip(parts, rates, strict=True))


@given(st.integers(0, 12), speeds)
def test_no_other_cut_of_the_batch_ends_earlier(total: int, rates: list[float]) -> None:
    found = split_batch(total, rates)
    assert sum(found) == total
    best = min(slowest(cut, rates) for cut in cuts(total, len(rates)))
    assert isclose(slowest(found, rates), best, rel_tol=1e-12)


@given(st.integers(0, 12), st.lists(st.tuples(st.floats(0.01, 1000), st.integers(0, 8)), min_size=1, max_size=4))
def test_no_other_cut_within_the_rooms_ends_earlier(total: int, workers: list[tuple[float, int]]) -> None:
    rates, rooms = [rate for rate, _ in workers], [room for _, room in workers]
    if sum(rooms) < total:
        with pytest.raises(InsufficientMemory, match="are missing"):
            split_state(total, rooms, rates)
        with pytest.raises(ValueError, match="at most"):
            split_batch(total, rates, rooms)
        return
    found = split_state(total, rooms, rates)
    assert sum(found) == total
    assert all(part <= room for part, room in zip(found, rooms, strict=True))
    allowed = (cut for cut in cuts(total, len(rates)) if all(a <= b for a, b in zip(cut, rooms, strict=True)))
    assert isclose(slowest(found, rates), min(slowest(cut, rates) for cut in allowed), rel_tol=1e-12)


@given(st.lists(st.tuples(st.floats(1e-3, 1e6), st.integers(0, 10**13)), min_size=1, max_size=50), st.floats(0, 1))
def test_large_wholes_are_cut_exactly(workers: list[tuple[float, int]], part: float) -> None:
    rates, rooms = [rate for rate, _ in workers], [room for _, room in workers]
    total = int(sum(rooms) * part)
    found = split_state(total, rooms, rates)
    assert sum(found) == total
    assert all(0 <= mine <= room for mine, room in zip(found, rooms, strict=True))
    # Nobody takes what a worker with room left would have had done earlier.
    last = slowest(found, rates)
    for mine, room, rate in zip(found, rooms, rates, strict=True):
        assert mine == room or (mine + 1) / rate >= last * (1 - 1e-9)


def test_equal_speeds_fill_the_rooms_level_by_level() -> None:
    assert split_state(90, [10, 100, 100], [1, 1, 1]) == (10, 40, 40)
    assert split_state(90, [0, 100, 5], [1, 1, 1]) == (0, 85, 5)


def test_a_fast_worker_with_a_small_room_leaves_the_rest_to_the_others_by_speed() -> None:
    assert split_state(100, [10, 1000, 1000], [10, 2, 1]) == (10, 60, 30)


def test_ties_go_to_the_first() -> None:
    assert split_batch(4, [1, 1, 1]) == (2, 1, 1)


def test_the_shortfall_is_told() -> None:
    with pytest.raises(InsufficientMemory, match=r"room for 1\.5 GiB of it, so 512 MiB are missing"):
        split_state(2 << 30, [1 << 30, 1 << 29], [1, 1])


@given(st.lists(st.integers(0, 10**14), min_size=1, max_size=60).filter(any))
def test_shares_sum_to_one_in_any_order(parts: list[int]) -> None:
    found = shares_of(parts, sum(parts))
    assert sum(found) == sum(reversed(found)) == sum(sorted(found)) == 1
    assert all(
        (share == 0) == (part == 0) or abs(share * sum(parts) - part) < sum(parts) / 2**39
        for share, part in zip(found, parts, strict=True)
    )
