import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.stages.evaluate.divergence import RowScore, compare, flipped, kl_divergence


def logs(probabilities):
    return {token: math.log(p) for token, p in probabilities.items()}


def test_the_divergence_of_a_distribution_from_itself_is_nothing():
    known = logs({1: 0.5, 2: 0.3})
    assert kl_divergence(known, known) == pytest.approx(0, abs=1e-9)


def test_two_whole_distributions_give_the_textbook_value():
    parent, candidate = logs({0: 0.5, 1: 0.5}), logs({0: 0.25, 1: 0.75})
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl_divergence(parent, candidate) == pytest.approx(expected, abs=1e-6)


def test_what_only_one_side_knows_goes_into_the_remainder():
    parent, candidate = logs({0: 0.6, 1: 0.3}), logs({0: 0.6, 2: 0.3})
    assert kl_divergence(parent, candidate) == pytest.approx(0, abs=1e-9)
    parent, candidate = logs({0: 0.8, 1: 0.1}), logs({0: 0.5, 2: 0.4})
    expected = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    assert kl_divergence(parent, candidate) == pytest.approx(expected)


def test_a_remainder_that_rounding_made_negative_is_harmless():
    assert math.isfinite(kl_divergence(logs({0: 0.7, 1: 0.3 + 1e-9}), logs({0: 0.5, 1: 0.5})))


weights = st.lists(st.floats(0.01, 1), min_size=3, max_size=12)


@given(weights, st.data())
def test_the_divergence_is_never_negative_and_never_above_that_of_all_tokens(raw, data):
    other = data.draw(st.lists(st.floats(0.01, 1), min_size=len(raw), max_size=len(raw)))
    mine = {token: weight / sum(raw) for token, weight in enumerate(raw)}
    theirs = {token: weight / sum(other) for token, weight in enumerate(other)}
    whole = sum(p * math.log(p / theirs[token]) for token, p in mine.items())

    def top(known):
        return logs({token: known[token] for token in sorted(known, key=known.__getitem__)[-2:]} | {0: known[0]})

    assert 0 <= kl_divergence(top(mine), top(theirs)) <= whole + 1e-6


def test_another_most_likely_token_is_a_flip():
    assert flipped(logs({1: 0.6, 2: 0.3}), logs({1: 0.3, 2: 0.6}))
    assert not flipped(logs({1: 0.6, 2: 0.3}), logs({1: 0.5, 3: 0.4}))


def test_a_tie_that_falls_the_other_way_is_no_flip():
    assert not flipped(logs({1: 0.4, 2: 0.4}), logs({2: 0.5, 1: 0.4}))


def test_a_row_adds_up_its_tokens():
    def score(first):
        return RowScore(np.array([[5, 5, 7], [7, 9, 7]], np.int32), np.log([[first, first, 0.2], [0.2, 0.5, 0.2]]))

    parent, candidate = score(0.6), score(0.1)
    assert parent.negative_log_likelihood == pytest.approx(-math.log(0.6) - math.log(0.2))
    divergence, flips = compare(parent, candidate)
    assert flips == 1
    expected = 0.6 * math.log(0.6 / 0.1) + 0.2 * math.log(1) + 0.2 * math.log(0.2 / 0.7)
    assert divergence == pytest.approx(expected)
