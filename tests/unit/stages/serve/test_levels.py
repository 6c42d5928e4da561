"""The levels of the queue: who starts where, who sinks, who starves, and what is learned from the answers."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.spec.serve import SchedulerOptions
from fastserve.stages.serve.levels import GROWTH, Lengths, Levels, Place, Waits

SHORT_AND_LONG = st.sampled_from([5, 20, 40, 400, 4000])


def test_the_manifest_and_the_engine_have_the_same_defaults() -> None:
    options, levels = SchedulerOptions(), Levels()
    assert (options.levels, options.quantum, options.starvation) == (
        levels.count,
        levels.quantum,
        levels.starvation_seconds,
    )
    assert Levels.from_json({}) == levels
    assert Levels.from_json({"levels": 4, "quantum": 8, "starvation": 2}) == Levels(4, 8, 2.0)


def test_each_level_is_longer_than_the_one_above_and_the_last_has_no_end() -> None:
    levels = Levels(quantum=40)
    assert [levels.quantum_of(level) for level in range(3)] == [40, 40 * GROWTH, math.inf]


def test_nobody_sinks_while_nothing_is_known() -> None:
    levels, place = Levels(), Place(0, 0)
    assert levels.join(10**6) == 0
    assert not place.sink(levels, 10**6)


@pytest.mark.parametrize(("prompt", "level"), [(1, 0), (2560, 0), (2561, 1), (10240, 1), (10241, 2), (10**9, 2)])
def test_a_long_prompt_skips_the_top(prompt: int, level: int) -> None:
    assert Levels(quantum=40).join(prompt) == level


@given(st.integers(-5, 5), st.integers(-5, 5), st.integers(0, 2), st.integers(0, 2))
def test_a_tenants_priority_is_above_every_level(one: int, other: int, high: int, low: int) -> None:
    levels = Levels()
    if one < other:
        assert levels.class_of(Place(one, high)) < levels.class_of(Place(other, low))


@given(st.lists(st.integers(0, 60), max_size=60), st.integers(1, 50), st.integers(2, 5))
def test_who_goes_on_sinks_to_the_last_level_and_no_further(steps: list[int], quantum: int, count: int) -> None:
    levels, place, produced = Levels(count, quantum), Place(0, 0), 0
    for tokens in steps:
        produced += tokens
        before = place.level
        sunk = place.sink(levels, produced)
        assert place.level == before + sunk <= count - 1
        assert produced - place.mark < levels.quantum_of(place.level) or sunk


def test_who_rises_has_a_whole_quantum_again() -> None:
    levels, place = Levels(quantum=40), Place(0, 2, mark=200, produced=230)
    place.rise()
    assert place.level == 0
    assert not place.sink(levels, 269)
    assert place.sink(levels, 270)


def test_stopped_without_a_token_the_clock_goes_on() -> None:
    place = Place(0, 1, produced=7, since=10.0)
    place.stop(7, 25.0)
    assert place.since == 10.0
    place.stop(8, 30.0)
    assert place.since == 30.0


@given(st.lists(st.floats(0, 100), max_size=30), st.floats(0, 100))
def test_everybody_who_waits_is_told_once_and_in_time(since: list[float], before: float) -> None:
    waits = Waits()
    for number, at in enumerate(since):
        waits.add(str(number), at)
    assert sorted(at for _, at in waits.pop(before)) == sorted(at for at in since if at < before)
    assert sorted(at for _, at in waits.pop(1000)) == sorted(at for at in since if at >= before)


def _learned(lengths: list[int]) -> int:
    known = Lengths()
    for length in lengths:
        known.add(length)
    return known.quantum()


def test_short_and_long_answers_are_told_apart_between_them() -> None:
    draw = random.Random(1)
    mixed = [draw.randint(400, 600) if draw.random() < 0.2 else draw.randint(8, 32) for _ in range(200)]
    assert 28 <= _learned(mixed) <= 32


@pytest.mark.parametrize("low", [1, 100, 200])
def test_answers_that_are_alike_are_left_in_their_order(low: int) -> None:
    draw = random.Random(2)
    lengths = [draw.randint(low, 200) for _ in range(200)]
    assert _learned(lengths) > max(lengths)


def test_a_tail_is_cut_where_it_begins() -> None:
    draw = random.Random(3)
    lengths = [max(2, int(draw.lognormvariate(3.9, 1.25))) for _ in range(256)]
    assert 30 < _learned(lengths) < 200


@given(st.lists(SHORT_AND_LONG, min_size=Lengths.LEAST, max_size=400))
def test_what_is_learned_is_a_number_of_tokens(lengths: list[int]) -> None:
    assert 1 <= _learned(lengths) <= 2 * max(lengths)


def test_a_few_answers_say_nothing_and_old_ones_are_forgotten() -> None:
    known = Lengths()
    asked = [known.add(20) for _ in range(Lengths.LEAST)]
    assert asked == [False] * (Lengths.LEAST - 1) + [True]
    for _ in range(Lengths.WINDOW):
        known.add(300)
    assert known.quantum() == 375
    assert not known.add(0), "an answer without a token is none"
