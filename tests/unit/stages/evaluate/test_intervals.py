import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.stages.evaluate.intervals import bootstrap, paired_drop, ratio_of_rounds, wilson


def share(sums):
    return sums[:, 0] / sums[:, 1]


def test_the_value_is_that_of_all_rows_together_and_not_a_mean_of_means():
    assert bootstrap([[1, 30], [10, 100]], share).value == pytest.approx(31 / 110)


def test_equal_rows_have_no_width():
    found = bootstrap([[2] * 20, [10] * 20], share)
    assert (found.low, found.value, found.high) == pytest.approx((0.2, 0.2, 0.2))


def test_the_width_is_that_of_the_normal_distribution_for_many_rows():
    values = np.random.default_rng(1).normal(5, 2, 400)
    found = bootstrap([values.tolist(), [1] * 400], share)
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)


def test_the_same_seed_gives_the_same_interval():
    rows = [[0.1 * n * n for n in range(20)], [1] * 20]
    assert bootstrap(rows, share, seed=3) == bootstrap(rows, share, seed=3)
    assert bootstrap(rows, share, seed=3) != bootstrap(rows, share, seed=4)


def test_pairs_stay_together():
    parent = [1.0, 5.0, 9.0, 2.0, 7.0, 4.0]
    candidate = [value + 0.5 for value in parent]
    found = bootstrap([candidate, parent, [1] * 6], lambda sums: (sums[:, 0] - sums[:, 1]) / sums[:, 2])
    assert (found.low, found.high) == pytest.approx((0.5, 0.5))


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="no rows"):
        bootstrap([[], []], share)


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 50)), min_size=1, max_size=30))
def test_the_value_lies_within_its_interval(rows):
    found = bootstrap([[value for value, _ in rows], [tokens for _, tokens in rows]], share)
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize(
    ("hits", "rows", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilsons_interval_has_the_published_ends(hits, rows, low, high):
    found = wilson(hits, rows)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 500), st.data())
def test_wilsons_interval_stays_within_the_possible(rows, data):
    hits = data.draw(st.integers(0, rows))
    found = wilson(hits, rows)
    assert 0 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize(("hits", "rows"), [(0, 0), (3, 2), (-1, 2)])
def test_a_share_that_is_none_is_refused(hits, rows):
    with pytest.raises(ValueError, match="no share"):
        wilson(hits, rows)


@pytest.mark.parametrize(
    ("both", "lost", "won", "neither", "low", "high"),
    [(36, 12, 2, 0, 0.0569, 0.3404), (30, 0, 0, 0, -0.1135, 0.1135)],
)
def test_the_paired_interval_has_the_published_ends(both, lost, won, neither, low, high):
    """An example of Newcombe, 1998 (method 10), and a case without any difference."""
    parent = [True] * (both + lost) + [False] * (won + neither)
    candidate = [True] * both + [False] * lost + [True] * won + [False] * neither
    found = paired_drop(parent, candidate)
    assert found.value == pytest.approx((lost - won) / (both + lost + won + neither))
    assert (found.low, found.high) == pytest.approx((low, high), abs=2e-4)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_a_drop_turned_round_is_the_opposite_drop(pairs):
    parent, candidate = [a for a, _ in pairs], [b for _, b in pairs]
    there, back = paired_drop(parent, candidate), paired_drop(candidate, parent)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert -1 - 1e-9 <= there.low <= there.value <= there.high <= 1 + 1e-9


def test_unequal_sides_are_refused():
    with pytest.raises(ValueError, match="same rows"):
        paired_drop([True], [])


def test_rounds_of_one_ratio_give_that_ratio():
    found = ratio_of_rounds([110, 55, 220], [100, 50, 200])
    assert (found.low, found.value, found.high) == pytest.approx((1.1, 1.1, 1.1))


def test_two_rounds_have_students_wide_interval():
    found = ratio_of_rounds([1.2, 1.0], [1.0, 1.0])
    middle, half = math.log(1.2) / 2, 12.706 * (math.log(1.2) / math.sqrt(2)) / math.sqrt(2)
    assert found.value == pytest.approx(math.exp(middle))
    assert found.high == pytest.approx(math.exp(middle + half))


@pytest.mark.parametrize("sides", [([1.0], [1.0]), ([1.0, 2.0], [1.0])])
def test_one_round_says_nothing(sides):
    with pytest.raises(ValueError, match="two rounds"):
        ratio_of_rounds(*sides)
