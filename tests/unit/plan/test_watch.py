"""Judging a window: what is beyond doubt decides, noise does not."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.plan.observed import Window
from fastserve.plan.watch import ENOUGH_REQUESTS, Outcome, judge, least_share
from fastserve.spec.serve import Rollout

ROLLOUT = Rollout.model_validate({"steps": [5, 100], "hold": "60s"})


def window(seconds: float = 30.0, requests: int = 0, errors: int = 0, **more: float) -> Window:
    return Window(seconds, requests, errors, **more)  # type: ignore[arg-type]


def timed(seconds: float, ttft_ms: float, answers: int, p95: float = 2.0) -> Window:
    return Window(seconds, answers, 0, ttft_ms, ttft_ms * p95, answers)


def test_the_lower_end_of_wilsons_interval() -> None:
    # 10 of 100 at 1.96: from 5.52 % on, as in Wilson's own form.
    assert least_share(10, 100, 1.96) == pytest.approx(0.0552, abs=1e-4)
    assert least_share(0, 50, 2.33) == 0.0
    assert least_share(0, 0, 2.33) == 0.0


@given(st.integers(1, 5000), st.data())
def test_a_share_is_at_least_less_than_what_was_seen(requests: int, data: st.DataObject) -> None:
    errors = data.draw(st.integers(0, requests))
    assert 0 <= least_share(errors, requests, 2.33) <= errors / requests + 1e-12


def test_many_failures_are_bad_at_once() -> None:
    verdict = judge(ROLLOUT, window(5, 1900, 2), window(5, 100, 8))
    assert verdict.outcome is Outcome.BAD
    for words in ("8 of 100 requests failed (8 %", "maxErrorRate is 1 %", "2 of 1900 of the old revision"):
        assert words in verdict.sentence


@pytest.mark.parametrize(("requests", "errors"), [(1, 1), (2, 2), (10, 1), (400, 3), (1000, 10)])
def test_a_few_failures_while_the_hold_lasts_are_noise(requests: int, errors: int) -> None:
    assert judge(ROLLOUT, window(5, 1000), window(5, requests, errors)).outcome is Outcome.UNSURE


def test_what_the_old_revision_suffers_from_too_is_not_the_new_ones_fault() -> None:
    both = judge(ROLLOUT, window(90, 1000, 100), window(90, 100, 11))
    assert both.outcome is Outcome.GOOD
    worse = judge(ROLLOUT, window(90, 1000, 100), window(90, 100, 40))
    assert worse.outcome is Outcome.BAD


def test_two_failures_of_two_are_bad_when_the_hold_is_over() -> None:
    assert judge(ROLLOUT, window(60, 40), window(60, 2, 2)).outcome is Outcome.BAD
    assert judge(ROLLOUT, window(60, 40), window(60, 2, 1)).outcome is Outcome.UNSURE


def test_a_window_without_evidence_is_held_once_more_and_then_goes_on() -> None:
    few = ENOUGH_REQUESTS - 1
    for seconds, requests, outcome in (
        (59, 500, Outcome.UNSURE),
        (60, 500, Outcome.GOOD),
        (60, few, Outcome.UNSURE),
        (119, few, Outcome.UNSURE),
        (120, few, Outcome.GOOD),
        (60, 0, Outcome.UNSURE),
        (120, 0, Outcome.GOOD),
    ):
        assert judge(ROLLOUT, window(seconds, 40), window(seconds, requests)).outcome is outcome
    assert judge(ROLLOUT, window(60), window(60)).outcome is Outcome.GOOD, "nobody asked at all"


def test_twice_the_time_to_first_token_is_bad_at_once() -> None:
    verdict = judge(ROLLOUT, timed(10, 100, 400), timed(10, 200, 40))
    assert verdict.outcome is Outcome.BAD
    for words in ("200 ms over 40 answers", "2.00 times the 100 ms", "allows 1.2 times"):
        assert words in verdict.sentence


@pytest.mark.parametrize(("ttft_ms", "answers"), [(110, 5000), (200, ENOUGH_REQUESTS - 1), (130, 30)])
def test_a_rise_within_limits_or_doubt_is_not_bad(ttft_ms: float, answers: int) -> None:
    assert judge(ROLLOUT, timed(61, 100, 400), timed(61, ttft_ms, answers)).outcome is not Outcome.BAD


def test_slower_answers_are_bad_beyond_doubt() -> None:
    def at(tokens_per_s: float, rates: int) -> Window:
        return Window(61, rates, 0, tokens_per_s=tokens_per_s, slow_tokens_per_s=tokens_per_s / 2, rates=rates)

    verdict = judge(ROLLOUT, at(100, 1000), at(50, 200))
    assert verdict.outcome is Outcome.BAD
    assert "50.0 tokens/s (median of 200), 0.50 times the 100.0" in verdict.sentence
    assert judge(ROLLOUT, at(100, 1000), at(90, 200)).outcome is Outcome.GOOD
    assert judge(ROLLOUT, at(100, 1000), at(50, 5)).outcome is Outcome.UNSURE


def play(draw: random.Random, error_rate: float, slower: float, requests: int) -> tuple[Outcome, float]:
    """One hold of 60 s looked at every 2 s, 5 % of `requests` a second to the new one: how it ended, and when."""
    old, new = ([], []), ([], [])
    for second in range(2, 62, 2):
        for times, rate, factor, share in ((old, 0.0, 1.0, 0.95), (new, error_rate, slower, 0.05)):
            for _ in range(round(2 * requests * share)):
                times[0].append(draw.random() < rate)
                times[1].append(draw.lognormvariate(0, 0.4) * 50 * factor)
        windows = []
        for failed, ms in (old, new):
            ordered = sorted(ms)
            p95 = ordered[int(0.95 * (len(ms) - 1))]
            windows.append(Window(second, len(ms), sum(failed), ordered[len(ms) // 2], p95, len(ms)))
        verdict = judge(ROLLOUT, *windows)
        if verdict.outcome is not Outcome.UNSURE:
            return verdict.outcome, second
    raise AssertionError("the hold is over and nothing is decided")


def test_good_candidates_pass_and_bad_ones_do_not() -> None:
    """Many rollouts in virtual time at 100 requests a second, of which the new revision gets 5."""
    draw = random.Random(7)
    runs = 60
    good = [play(draw, 0.0, 1.0, 100)[0] for _ in range(runs)]
    assert good.count(Outcome.GOOD) >= runs - 2
    at_the_limit = [play(draw, 0.002, 1.05, 100)[0] for _ in range(runs)]
    assert at_the_limit.count(Outcome.GOOD) >= runs - 4
    failing = [play(draw, 0.05, 1.0, 100) for _ in range(runs)]
    assert [outcome for outcome, _ in failing].count(Outcome.BAD) >= runs - 1
    slow = [play(draw, 0.0, 2.0, 100) for _ in range(runs)]
    assert all(outcome is Outcome.BAD for outcome, _ in slow)
    assert max(second for _, second in slow) < 60, "before the hold is over"
