"""The gate: whether a candidate may take traffic, from intervals rather than from points.

Every limit is compared with a 95 % interval. The limit holds when the whole interval is within it, is broken when the
whole interval is beyond it, and is undecided in between: a lucky or unlucky draw of rows shall neither pass nor fail
a model. One broken limit fails the candidate; else one undecided limit leaves it undecided, and an undecided
candidate serves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from fastserve.spec.evaluate import Gate, TaskLimit
from fastserve.units import show_share

MIN_ROWS = 8
"""Fewest rows from which an interval is computed at all."""

MIN_DISTINCT_ROWS = 4
"""Fewest different rows; copies of one row say no more than the row."""

_Z = 1.96
"""Two-sided 95 % quantile of the normal distribution."""


class GateOutcome(StrEnum):
    """How a limit, or the whole gate, came out."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True, slots=True)
class Interval:
    """A measured value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """As in the metrics of the evaluate stage."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit of the gate and what became of it."""

    name: str
    """In the manifest's words: `perplexityIncrease`, `task.triage.min`."""

    measured: str
    """What was measured, for people: `2.1% (1.8% to 2.4%)`; `-` where it was not measured or there was nothing to
    compare."""

    limit: str
    """What is asked, for people: `at most 5%`."""

    outcome: GateOutcome
    sentence: str
    """A full sentence with the figures and, unless it passed, what to do."""

    bound: float
    """The limit as a number; shares as shares."""

    interval: Interval | None = None
    """What was measured, as numbers."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says of a candidate."""

    outcome: GateOutcome
    reasons: tuple[str, ...]
    """Sentences that explain the outcome: those of the limits that decided it."""

    rows: tuple[Limit, ...] = ()
    """Every limit, in the gate's order."""

    @property
    def refusal(self) -> str:
        """`GateFailed` or `GateInconclusive`; empty when it passed."""
        return {GateOutcome.FAIL: "GateFailed", GateOutcome.INCONCLUSIVE: "GateInconclusive"}.get(self.outcome, "")

    def to_json(self) -> dict[str, Any]:
        """Plain values with the manifest's kind of keys."""
        limits = [
            {
                "name": row.name,
                "measured": None if row.interval is None else row.interval.to_json(),
                "limit": row.bound,
                "outcome": row.outcome.value,
                "sentence": row.sentence,
            }
            for row in self.rows
        ]
        return {"outcome": self.outcome.value, "reasons": list(self.reasons), "limits": limits}


def decide(metrics: Mapping[str, Any], gate: Gate | None) -> Verdict:
    """Judge what the evaluate stage measured.

    metrics: of the evaluate stage's record; each interval is {value, low, high}.
    gate: None: everything is measured and nothing is refused.
    """
    if gate is None:
        return Verdict(GateOutcome.PASS, ("spec.evaluate has no gate, so nothing is refused.",))
    rows = [*_comparisons(metrics, gate)]
    for name, limit in gate.tasks.items():
        rows.extend(_task_rows(metrics, name, limit))
    if not rows:
        return Verdict(GateOutcome.PASS, ("Every limit of spec.evaluate.gate is switched off, so nothing is refused.",))
    for outcome in (GateOutcome.FAIL, GateOutcome.INCONCLUSIVE):
        reasons = tuple(row.sentence for row in rows if row.outcome is outcome)
        if reasons:
            return Verdict(outcome, reasons, tuple(rows))
    return Verdict(GateOutcome.PASS, tuple(row.sentence for row in rows), tuple(rows))


@dataclass(frozen=True, slots=True)
class _Bound:
    """A limit before it is compared."""

    name: str
    value: float
    at_least: bool
    is_share: bool
    advice: str
    """What to do when it is undecided."""

    def show(self, value: float) -> str:
        return show_share(value) if self.is_share else f"{value:.3g}"

    def row(self, outcome: GateOutcome, sentence: str, interval: Interval | None = None) -> Limit:
        measured = "-"
        if interval is not None:
            measured = f"{self.show(interval.value)} ({self.show(interval.low)} to {self.show(interval.high)})"
        limit = f"at {'least' if self.at_least else 'most'} {self.show(self.value)}"
        sentence = sentence.format(name=self.name, figures=f"{measured} against {limit}", advice=self.advice)
        return Limit(self.name, measured, limit, outcome, sentence, self.value, interval)

    def unchanged(self) -> Limit:
        """Nothing to compare: the candidate is its parent."""
        return self.row(GateOutcome.PASS, "{name} holds: the candidate is its parent, byte for byte.")

    def compare(self, raw: Any, few: str | None) -> Limit:
        """raw: the interval from the metrics. few: why there are too few rows, if there are."""
        interval, trouble = _read(raw, few)
        if interval is None:
            return self.row(GateOutcome.INCONCLUSIVE, "{name} is undecided: " + trouble.replace("{", "{{"))
        holds = interval.low >= self.value if self.at_least else interval.high <= self.value
        if holds:
            return self.row(GateOutcome.PASS, "{name} holds: {figures}.", interval)
        broken = interval.high < self.value if self.at_least else interval.low > self.value
        change = "lower" if self.at_least else "raise"
        if broken:
            sentence = (
                "{name} is broken: {figures}; improve the candidate, or " + change + " spec.evaluate.gate.{name}."
            )
            return self.row(GateOutcome.FAIL, sentence, interval)
        sentence = "{name} is undecided: {figures}; {advice}, or " + change + " spec.evaluate.gate.{name}."
        return self.row(GateOutcome.INCONCLUSIVE, sentence, interval)


def _comparisons(metrics: Mapping[str, Any], gate: Gate) -> list[Limit]:
    """The limits that compare the candidate with its parent."""
    wanted = [
        ("perplexityIncrease", gate.perplexity_increase, True),
        ("klDivergence", gate.kl_divergence, False),
        ("flippedTokens", gate.flipped_tokens, True),
    ]
    few = _too_few(metrics.get("rows"), metrics.get("distinctRows"), "spec.evaluate.data")
    same = _identical(metrics)
    found = []
    for name, limit, is_share in wanted:
        if limit is not None:
            bound = _Bound(name, limit, False, is_share, "evaluate on more rows")
            found.append(bound.unchanged() if same else bound.compare(metrics.get(name), few))
    if gate.endless_answers is not None and "endlessAnswers" in metrics:
        found.append(_endless(metrics["endlessAnswers"], gate.endless_answers, same))
    if gate.speedup is not None:
        found.append(_speedup(metrics.get("speedup"), gate.speedup, same))
    return found


def _identical(metrics: Mapping[str, Any]) -> bool:
    """Whether candidate and parent are the same bytes."""
    models = metrics.get("models")
    if not isinstance(models, Mapping):
        return False
    digests = [models[role].get("digest") for role in ("candidate", "parent") if isinstance(models.get(role), Mapping)]
    return len(digests) == 2 and bool(digests[0]) and digests[0] == digests[1]


def _endless(raw: Any, limit: float, same: bool) -> Limit:
    """The one limit that refuses only what is beyond doubt and is never undecided.

    A hundred answers cannot show that endless ones are rarer than one in a hundred, but they can show the opposite:
    each was seen.
    """
    bound = _Bound("endlessAnswers", limit, False, True, "")
    interval, trouble = _read(raw, None)
    if same:
        return bound.unchanged()
    if interval is None:
        return bound.row(GateOutcome.INCONCLUSIVE, "{name} is undecided: " + trouble.replace("{", "{{"))
    if interval.low <= limit:
        return bound.row(GateOutcome.PASS, "{name} holds: {figures}, judged by the lower end.", interval)
    sentence = (
        "{name} is broken: {figures}; the candidate repeats itself where its parent comes to an end: calibrate on more "
        "rows in the chat template, write method: roundToNearest, or raise spec.evaluate.gate.{name}."
    )
    return bound.row(GateOutcome.FAIL, sentence, interval)


def _speedup(raw: Any, limit: float, same: bool) -> Limit:
    bound = _Bound("speedup", limit, True, False, "evaluate again on a quieter machine")
    if same and limit > 1:
        # Not "nothing to compare": a model is known to be as fast as itself.
        sentence = (
            "{name} is broken: the candidate is its parent; add a compress step or remove spec.evaluate.gate.{name}."
        )
        return bound.row(GateOutcome.FAIL, sentence)
    return bound.unchanged() if same else bound.compare(raw, None)


def _task_rows(metrics: Mapping[str, Any], name: str, limit: TaskLimit) -> list[Limit]:
    tasks = metrics.get("tasks")
    task = tasks.get(name) if isinstance(tasks, Mapping) else None
    task = task if isinstance(task, Mapping) else {}
    few = _too_few(task.get("rows"), task.get("distinctRows"), f"the data of task {name}")
    more = f"give task {name} more rows"
    found = []
    if limit.min is not None:
        advice = more
        if limit.min >= 1:
            advice = "no sample shows a score of exactly 1, so write a min below it, such as 0.95"
        elif (needed := math.ceil(_Z**2 * limit.min / (1 - limit.min))) > _count(task.get("rows")):
            advice += f" (with every answer right, {needed} are needed)"
        bound = _Bound(f"task.{name}.min", limit.min, True, False, advice)
        found.append(bound.compare(task.get("candidate"), few))
    if limit.max_drop is not None:
        bound = _Bound(f"task.{name}.maxDrop", limit.max_drop, False, True, more)
        found.append(bound.unchanged() if _identical(metrics) else bound.compare(task.get("drop"), few))
    return found


def _too_few(rows: Any, distinct: Any, where: str) -> str | None:
    """A clause that says how many rows are missing; None when there are enough."""
    if _count(rows) < MIN_ROWS:
        return f"{where} has {_count(rows)} usable rows, and at least {MIN_ROWS} are needed"
    if distinct is not None and _count(distinct) < MIN_DISTINCT_ROWS:
        return f"{where} has {_count(distinct)} different rows, and at least {MIN_DISTINCT_ROWS} are needed"
    return None


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _read(raw: Any, few: str | None) -> tuple[Interval | None, str]:
    """The interval, or a clause that says why there is none that can decide anything."""
    if few is not None:
        return None, f"{few}."
    if not isinstance(raw, Mapping):
        return None, "it was not measured; evaluate again, or switch its limit off with null."
    ends = [raw.get(end) for end in ("value", "low", "high")]
    numbers = [float(end) for end in ends if isinstance(end, int | float) and not isinstance(end, bool)]
    if len(numbers) < len(ends) or not all(math.isfinite(number) for number in numbers):
        return None, "it came out as no finite number; look at rows.jsonl of the evaluate artifact."
    value, low, high = numbers
    if not low <= high:
        return None, f"its interval ends before it begins ({low:g} to {high:g}); evaluate again."
    return Interval(value, low, high), ""
