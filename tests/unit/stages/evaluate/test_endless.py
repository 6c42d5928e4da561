import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.stages.evaluate.endless import (
    FEWEST_TOKENS,
    LONGEST_PHRASE,
    Answer,
    endless_share,
    is_endless,
    runs_in_circles,
)


def answer(ids, ended=False):
    return Answer(ids, "", ended)


@pytest.mark.parametrize("phrase", [1, 2, 5, 7, LONGEST_PHRASE])
def test_a_phrase_again_and_again_is_a_circle(phrase):
    assert runs_in_circles([900, 901] + list(range(phrase)) * max(3, -(-FEWEST_TOKENS // phrase)))


def test_a_circle_may_be_cut_in_the_middle_of_a_phrase():
    assert runs_in_circles([*range(50, 60), *[1, 2, 3, 4, 5, 6, 7] * 4, 1, 2, 3])


@pytest.mark.parametrize(
    "ids", [[], [1], [1, 1, 1, 1], [1, 2] * 4, list(range(10)) * 2, list(range(40)), [1] * 30 + list(range(5, 20))]
)
def test_a_few_repeats_or_none_at_the_end_are_no_circle(ids):
    assert not runs_in_circles(ids)


@given(st.lists(st.integers(0, 50), unique=True, max_size=48))
def test_an_answer_of_different_tokens_is_never_a_circle(ids):
    assert not runs_in_circles(ids)


@given(st.lists(st.integers(0, 3), max_size=10), st.lists(st.integers(0, 3), min_size=1, max_size=LONGEST_PHRASE))
def test_any_phrase_is_found_behind_any_beginning(beginning, phrase):
    assert runs_in_circles(beginning + phrase * max(3, -(-FEWEST_TOKENS // len(phrase))))


def test_an_answer_that_ended_is_not_endless():
    assert is_endless(answer([1] * 40))
    assert not is_endless(answer([1] * 40, ended=True))


def test_only_answers_that_the_parent_ends_count():
    parent = [answer([1, 2], ended=True)] * 20 + [answer([3] * 48)] * 5
    candidate = [answer([7] * 48)] * 2 + [answer([1, 2], ended=True)] * 18 + [answer([3] * 48)] * 5
    found = endless_share(parent, candidate)
    assert found is not None
    assert found.value == pytest.approx(0.1)
    assert 0.005 < found.low < 0.1 < found.high


def test_a_parent_that_ends_nothing_says_nothing():
    assert endless_share([answer([3] * 48)], [answer([3] * 48)]) is None
