from __future__ import annotations

import math

import pytest

from fastserve.plan.gate import decide
from fastserve.spec.evaluate import Gate


def interval(value, half=0.0):
    return {"value": value, "low": value - half, "high": value + half}


def metrics(**changed):
    found = {
        "rows": 50,
        "tokens": 5000,
        "models": {"candidate": {"digest": "c" * 64}, "parent": {"digest": "p" * 64}},
        "perplexityIncrease": interval(0.02, 0.005),
        "klDivergence": interval(0.03, 0.01),
        "flippedTokens": interval(0.05, 0.01),
        "speedup": interval(1.2, 0.05),
        "tasks": {},
    }
    return found | changed


def gate(**limits):
    return Gate.model_validate(limits)


def outcomes(verdict):
    return {row.name: row.outcome.value for row in verdict.rows}


def test_without_a_gate_everything_passes():
    assert decide({}, None).outcome == "pass"


def test_the_default_limits_pass_a_good_candidate():
    verdict = decide(metrics(), gate())
    assert verdict.outcome == "pass"
    assert outcomes(verdict) == {"perplexityIncrease": "pass", "klDivergence": "pass", "flippedTokens": "pass"}
    assert verdict.refusal == ""


@pytest.mark.parametrize(
    ("value", "half", "outcome"),
    [
        (0.03, 0.01, "pass"),
        (0.03, 0.02, "pass"),
        (0.03, 0.021, "inconclusive"),
        (0.06, 0.02, "inconclusive"),
        (0.06, 0.01, "inconclusive"),
        (0.06, 0.009, "fail"),
        (-0.5, 0.01, "pass"),
    ],
)
def test_a_limit_is_compared_with_the_whole_interval(value, half, outcome):
    raw = {"value": value, "low": round(value - half, 9), "high": round(value + half, 9)}
    verdict = decide(metrics(perplexityIncrease=raw), gate(perplexityIncrease="5%"))
    assert outcomes(verdict)["perplexityIncrease"] == outcome
    assert verdict.outcome == outcome


def test_one_broken_limit_fails_whatever_else_is_undecided():
    found = metrics(klDivergence=interval(0.5, 0.1), flippedTokens=interval(0.1, 0.05))
    verdict = decide(found, gate())
    assert (verdict.outcome, verdict.refusal) == ("fail", "GateFailed")
    assert len(verdict.reasons) == 1
    assert "klDivergence is broken: 0.5 (0.4 to 0.6) against at most 0.1" in verdict.reasons[0]


def test_one_undecided_limit_leaves_the_candidate_undecided():
    verdict = decide(metrics(flippedTokens=interval(0.1, 0.05)), gate())
    assert (verdict.outcome, verdict.refusal) == ("inconclusive", "GateInconclusive")
    assert "evaluate on more rows" in verdict.reasons[0]


@pytest.mark.parametrize(
    "raw",
    [
        None,
        "0.01",
        {},
        {"value": 0.01},
        interval(math.nan),
        interval(math.inf),
        {"value": 0.01, "low": math.nan, "high": 0.02},
        {"value": 0.01, "low": 0.0, "high": math.inf},
        {"value": 0.01, "low": -math.inf, "high": 0.0},
        {"value": True, "low": False, "high": False},
        {"value": 0.0, "low": 0.01, "high": 0.0},
    ],
)
def test_what_is_no_finite_interval_never_passes(raw):
    verdict = decide(metrics(perplexityIncrease=raw), gate())
    assert outcomes(verdict)["perplexityIncrease"] == "inconclusive"
    assert verdict.outcome == "inconclusive"
    assert "perplexityIncrease is undecided" in verdict.reasons[0]


def test_an_empty_measurement_is_undecided_and_says_so():
    verdict = decide({}, gate(speedup=1.1))
    assert verdict.outcome == "inconclusive"
    assert len(verdict.reasons) == 4


@pytest.mark.parametrize("changed", [{"rows": 7}, {"rows": 4, "distinctRows": 4}, {"rows": 50, "distinctRows": 3}])
def test_too_few_rows_decide_nothing_either_way(changed):
    good = decide(metrics(**changed), gate())
    bad = decide(metrics(**changed, perplexityIncrease=interval(9.0)), gate())
    assert good.outcome == bad.outcome == "inconclusive"
    assert "are needed" in good.reasons[0]


def test_too_few_rows_do_not_touch_the_speed():
    verdict = decide(metrics(rows=2), gate(perplexityIncrease=None, klDivergence=None, flippedTokens=None, speedup=1.1))
    assert verdict.outcome == "pass"


def test_a_limit_switched_off_with_null_is_not_looked_at():
    verdict = decide({}, gate(perplexityIncrease=None, klDivergence=None, flippedTokens=None))
    assert verdict.outcome == "pass"
    assert verdict.rows == ()


def same(**changed):
    found = metrics(models={"candidate": {"digest": "s"}, "parent": {"digest": "s"}}, **changed)
    return {key: value for key, value in found.items() if key not in ("perplexityIncrease", "klDivergence", "speedup")}


def test_a_candidate_that_is_its_parent_passes_every_comparison():
    verdict = decide(same(rows=1), gate())
    assert verdict.outcome == "pass"
    assert "byte for byte" in verdict.reasons[0]


def test_a_candidate_that_is_its_parent_is_not_faster_than_itself():
    assert decide(same(), gate(speedup=1.0)).outcome == "pass"
    verdict = decide(same(), gate(speedup=1.1))
    assert verdict.outcome == "fail"
    assert "add a compress step" in verdict.reasons[0]


def test_missing_digests_are_not_taken_for_equal_ones():
    found = metrics(models={"candidate": {}, "parent": {}})
    del found["klDivergence"]
    assert decide(found, gate()).outcome == "inconclusive"


@pytest.mark.parametrize(("value", "outcome"), [(1.2, "pass"), (1.1, "inconclusive"), (1.0, "fail")])
def test_speedup_must_be_reached_by_the_low_end(value, outcome):
    assert outcomes(decide(metrics(speedup=interval(value, 0.06)), gate(speedup=1.1)))["speedup"] == outcome


def task(**changed):
    found = {"rows": 100, "distinctRows": 100, "candidate": interval(0.9, 0.04), "drop": interval(0.0, 0.005)}
    return metrics(tasks={"triage": found | changed})


@pytest.mark.parametrize(
    ("changed", "outcome"),
    [
        ({}, "pass"),
        ({"candidate": interval(0.84, 0.04)}, "inconclusive"),
        ({"candidate": interval(0.7, 0.04)}, "fail"),
        ({"drop": interval(0.05, 0.01)}, "fail"),
        ({"drop": interval(0.01, 0.01)}, "inconclusive"),
        ({"rows": 4, "distinctRows": 1}, "inconclusive"),
        ({"rows": 100, "distinctRows": 1}, "inconclusive"),
        ({"candidate": None}, "inconclusive"),
    ],
)
def test_a_task_keeps_its_score(changed, outcome):
    assert decide(task(**changed), gate(**{"task.triage": {"min": 0.82, "maxDrop": "1%"}})).outcome == outcome


def test_a_task_that_was_not_measured_is_undecided():
    verdict = decide(metrics(), gate(**{"task.triage": {"min": 0.5}}))
    assert verdict.outcome == "inconclusive"
    assert "task.triage.min" in verdict.reasons[0]


def test_a_task_says_how_many_rows_would_show_its_score():
    found = task(rows=20, distinctRows=20, candidate={"value": 1.0, "low": 0.839, "high": 1.0})
    verdict = decide(found, gate(**{"task.triage": {"min": 0.9}}))
    assert "35 are needed" in verdict.reasons[0]


def test_a_task_that_asks_for_certainty_is_told_that_no_sample_shows_it():
    found = task(candidate={"value": 1.0, "low": 0.963, "high": 1.0})
    assert "below it" in decide(found, gate(**{"task.triage": {"min": 1.0}})).reasons[0]


def test_the_score_of_a_task_counts_for_an_unchanged_model_too():
    found = task(candidate=interval(0.5, 0.05)) | {"models": same()["models"]}
    verdict = decide(found, gate(**{"task.triage": {"min": 0.82, "maxDrop": "1%"}}))
    assert outcomes(verdict)["task.triage.min"] == "fail"
    assert outcomes(verdict)["task.triage.maxDrop"] == "pass"


def test_rows_read_as_text_and_as_json():
    verdict = decide(metrics(), gate())
    row = verdict.rows[0]
    assert (row.measured, row.limit) == ("2% (1.5% to 2.5%)", "at most 5%")
    plain = verdict.to_json()
    assert plain["outcome"] == "pass"
    assert plain["limits"][0]["limit"] == 0.05
    assert plain["limits"][0]["measured"] == {"value": 0.02, "low": 0.015, "high": 0.025}


@pytest.mark.parametrize(("low", "outcome"), [(0.0, "pass"), (0.01, "pass"), (0.0101, "fail")])
def test_endless_answers_are_refused_only_beyond_doubt_and_never_left_undecided(low, outcome):
    seen = {"value": 0.03, "low": low, "high": 0.2}
    assert outcomes(decide(metrics(endlessAnswers=seen), gate()))["endlessAnswers"] == outcome


def test_endless_answers_that_were_not_measured_are_not_judged():
    assert "endlessAnswers" not in outcomes(decide(metrics(), gate()))


def test_the_limit_of_endless_answers_can_be_switched_off():
    seen = {"value": 0.5, "low": 0.4, "high": 0.6}
    assert decide(metrics(endlessAnswers=seen), gate(endlessAnswers=None)).outcome == "pass"
