"""A step shared among unequal workers: every sample once, in proportion, as many micro-batches for one as for all."""

from __future__ import annotations

import time
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.stages.train.division import ATTENTION_TOKENS, packed_rows
from fastserve.stages.train.order import Batch, Order, divide

LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=60)
RANKS = st.lists(st.tuples(st.floats(0.1, 8) | st.just(0.0), st.integers(1, 300)), min_size=1, max_size=6).filter(
    lambda ranks: any(share > 0 for share, _ in ranks)
)


def whole(lengths: list[int]) -> Batch:
    return Batch(0, tuple(range(len(lengths))))


def tokens_through(sizes: list[int], packed: bool) -> int:
    """Tokens that go through the model, with filling."""
    if not packed:
        return max(sizes) * len(sizes)
    rows = packed_rows(sizes)
    return len(rows) * max(sum(sizes[place] for place in row) for row in rows)


def loads(divided: list[list[list[int]]], lengths: list[int]) -> list[int]:
    return [sum(lengths[sample] for micro in rank for sample in micro) for rank in divided]


@given(LENGTHS, RANKS, st.booleans())
def test_every_sample_is_in_one_micro_batch_within_the_limits(
    lengths: list[int], ranks: list[tuple[float, int]], packed: bool
) -> None:
    shares, most = [share for share, _ in ranks], [most for _, most in ranks]
    divided = divide(whole(lengths), lengths, shares, most, packed=packed)
    assert sorted(sample for rank in divided for micro in rank for sample in micro) == list(range(len(lengths)))
    assert len(divided) == len(ranks)
    assert len({len(rank) for rank in divided}) == 1
    assert any(rank[-1] for rank in divided), "a round in which nobody has anything"
    for rank, share_, limit in zip(divided, shares, most, strict=True):
        assert share_ > 0 or not any(rank)
        for micro in filter(None, rank):
            sizes = [lengths[sample] for sample in micro]
            assert len(micro) == 1 or tokens_through(sizes, packed) <= limit


@given(LENGTHS, st.lists(st.floats(0.1, 8), min_size=1, max_size=6))
def test_nobody_ends_later_than_one_sample_after_the_ideal(lengths: list[int], shares: list[float]) -> None:
    ends = [
        load / share
        for load, share in zip(
            loads(divide(whole(lengths), lengths, shares, [10**6] * len(shares), packed=True), lengths),
            shares,
            strict=True,
        )
    ]
    # Whoever ends last was the first to finish its last sample: all others would have ended later with it.
    assert max(ends) <= (sum(lengths) + (len(shares) - 1) * max(lengths)) / sum(shares) * (1 + 1e-9)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_the_last_to_end_is_within_twice_the_best_of_all_divisions(lengths: list[int], shares: list[int]) -> None:
    ended = max(
        load / share
        for load, share in zip(
            loads(divide(whole(lengths), lengths, shares, [10**6] * len(shares), packed=True), lengths),
            shares,
            strict=True,
        )
    )
    best = min(
        max(
            sum(length for length, rank in zip(lengths, chosen, strict=True) if rank == mine) / share
            for mine, share in enumerate(shares)
        )
        for chosen in product(range(len(shares)), repeat=len(lengths))
    )
    assert ended <= 2 * best + 1e-9


@given(LENGTHS, st.lists(RANKS, min_size=1, max_size=5), st.integers(50, 400))
def test_an_epoch_is_whole_however_often_the_plan_changes(
    lengths: list[int], plans: list[list[tuple[float, int]]], batch_tokens: int
) -> None:
    order = Order(lengths, batch_tokens, seed=3)
    seen: list[int] = []
    for step in range(order.batches_an_epoch):
        ranks = plans[step % len(plans)]
        divided = divide(order.at(step), order.lengths, [share for share, _ in ranks], [most for _, most in ranks])
        seen += [sample for rank in divided for micro in rank for sample in micro]
    assert sorted(seen) == list(range(len(lengths)))


@given(LENGTHS, RANKS)
def test_every_rank_computes_the_same(lengths: list[int], ranks: list[tuple[float, int]]) -> None:
    shares, most = [share for share, _ in ranks], [most for _, most in ranks]
    once = divide(whole(lengths), lengths, shares, most)
    assert once == divide(whole(lengths), np.array(lengths, np.int32), np.array(shares), np.array(most))
    assert all(type(sample) is int for rank in once for micro in rank for sample in micro)


def test_equal_samples_are_shared_exactly_by_speed() -> None:
    divided = divide(whole([64] * 28), [64] * 28, [1, 2, 4], [4096] * 3)
    assert [[len(micro) for micro in rank] for rank in divided] == [[4], [8], [16]]


def test_heavier_ranks_come_first() -> None:
    assert divide(whole([5]), [5], [1, 3, 1], [100] * 3) == [[[]], [[0]], [[]]]
    assert divide(whole([5]), [5], [2, 2], [100] * 2) == [[[0]], [[]]]


def test_more_micro_batches_are_worth_what_one_costs() -> None:
    lengths = list(range(20, 500, 12))
    counts = [
        len(divide(whole(lengths), lengths, [1], [10**5], round_cost=cost)[0]) for cost in (100.0, 0.2, 0.05, 0.01)
    ]
    assert counts[0] == 1
    assert counts == sorted(counts)
    assert counts[-1] > 4
    assert divide(whole(lengths), lengths, [1], [10**5]) == divide(
        whole(lengths), lengths, [1], [10**5], round_cost=0.01
    )


def test_filling_is_weighed_against_more_micro_batches() -> None:
    short_and_long = [10] * 30 + [300] * 3
    divided = divide(whole(short_and_long), short_and_long, [1, 1, 1], [10**5] * 3)
    assert [[len(micro) for micro in rank] for rank in divided] == [[1, 10]] * 3
    assert [
        len(rank) for rank in divide(whole(short_and_long), short_and_long, [1, 1, 1], [10**5] * 3, packed=True)
    ] == [1] * 3
    assert [len(rank) for rank in divide(whole([30, 29, 28] * 3), [30, 29, 28] * 3, [1, 1, 1], [10**5] * 3)] == [1] * 3


@given(LENGTHS)
def test_packed_rows_hold_every_sample_once_with_little_filling(lengths: list[int]) -> None:
    rows = packed_rows(lengths)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    assert all(rows)
    # One row has no filling, so more than what its attention costs is never filled up.
    assert tokens_through(lengths, packed=True) <= sum(lengths) * (1 + sum(lengths) / ATTENTION_TOKENS)


def test_packed_rows_are_as_narrow_as_their_samples_allow() -> None:
    assert [len(row) for row in packed_rows([512] * 8)] == [1] * 8
    assert len(packed_rows([512, 256, 256, 128, 128, 128, 128])) == 3
    assert len(packed_rows([300, 200])) == 1


@pytest.mark.parametrize(("shares", "samples"), [((1, 2, 4), 40), ((1, 3), 200), ((1, 1, 4, 4, 8, 8), 200)])
def test_a_step_with_filling_is_not_much_longer_than_the_ideal(shares: tuple[int, ...], samples: int) -> None:
    random = np.random.default_rng(1)
    over = []
    for _ in range(10):
        lengths = np.clip(random.lognormal(4.5, 0.7, samples), 20, 512).astype(int).tolist()
        divided = divide(whole(lengths), lengths, shares, [8192] * len(shares))
        seconds = sum(
            max(
                max((lengths[sample] for sample in rank[micro]), default=0) * len(rank[micro]) / share
                for rank, share in zip(divided, shares, strict=True)
            )
            for micro in range(len(divided[0]))
        )
        over.append(seconds / (sum(lengths) / sum(shares)))
        assert max(
            load / share * sum(shares) / sum(lengths)
            for load, share in zip(loads(divided, lengths), shares, strict=True)
        ) < (1.6 if samples == 40 else 1.15)
    assert np.mean(over) < 1.25


@pytest.mark.parametrize(("shares", "most"), [([1, 1], [10]), ([0, 0], [10, 10]), ([], []), ([1, -1], [10, 10])])
def test_what_is_no_plan_is_refused(shares: list[float], most: list[int]) -> None:
    with pytest.raises(ValueError, match="one above 0"):
        divide(whole([1, 2]), [1, 2], shares, most)


@pytest.mark.parametrize("packed", [False, True])
def test_64_workers_and_4096_samples_are_divided_in_a_moment(packed: bool) -> None:
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5, 1, 4096), 5, 2048).astype(np.int32)
    shares = random.uniform(0.5, 4, 64)
    began = time.process_time()
    for _ in range(3):
        divide(Batch(0, tuple(range(4096))), lengths, shares, [16_384] * 64, packed=packed)
    assert (time.process_time() - began) / 3 < 0.25  # about 0.03 on a quiet core
