"""Intervals: what a measurement on a few rows says of the rows that were not measured. All are 95 %, two-sided.

Rows are the unit, not tokens: the tokens of a row depend on each other, and treating them as independent would make
every interval too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev

import numpy as np
from numpy.typing import NDArray

from fastserve.plan.gate import Interval

Z = 1.959963984540054
"""Quantile of the normal distribution."""

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Quantile of Student's distribution with 1, 2, 3, ... degrees of freedom; beyond, Z is near, if a little narrow."""

RESAMPLES = 2000


Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""From sums over rows, shape [resamples, columns], to one figure a resample, shape [resamples]."""


def bootstrap(columns: Sequence[Sequence[float]], statistic: Statistic, seed: int = 0) -> Interval:
    """Percentile bootstrap over rows (Efron, 1979, Annals of Statistics 7).

    A row's columns stay together, so comparisons are paired.
    columns: one sequence a column, each of shape [rows]; a resample draws rows with replacement and sums every column.
    statistic: figure from the sums, such as sum of divergences over sum of tokens.
    seed: of the draws, so that the same rows give the same interval.
    Raises ValueError without rows.
    """
    table = np.asarray(columns, dtype=np.float64).T
    if table.size == 0:
        raise ValueError("no rows to compute an interval from")
    rows = table.shape[0]
    # How often each row is drawn, shape [resamples, rows]: one product then sums every column of every resample.
    drawn = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES)
    figures = statistic(drawn @ table)
    value = float(statistic(table.sum(axis=0, keepdims=True))[0])
    low, high = np.percentile(figures, [2.5, 97.5])
    return Interval(value, float(min(low, value)), float(max(high, value)))


def wilson(hits: int, rows: int) -> Interval:
    """Score interval of a share (Wilson, 1927, JASA 22): sensible at 0, at 1 and for few rows.

    Raises ValueError without rows.
    """
    if rows < 1 or not 0 <= hits <= rows:
        raise ValueError(f"{hits} hits of {rows} rows is no share")
    share = hits / rows
    middle = (share + Z**2 / (2 * rows)) / (1 + Z**2 / rows)
    half = Z / (1 + Z**2 / rows) * math.sqrt(share * (1 - share) / rows + Z**2 / (4 * rows**2))
    return Interval(share, max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half)))


def paired_drop(parent: Sequence[bool], candidate: Sequence[bool]) -> Interval:
    """How much lower the candidate's share of hits is than the parent's, on the same rows.

    Newcombe's hybrid score interval for paired shares (1998, Statistics in Medicine 17, method 10). Unlike a bootstrap
    it keeps a width when every row agrees. Raises ValueError without rows or with unequal lengths.
    """
    if not parent or len(parent) != len(candidate):
        raise ValueError("paired figures need the same rows on both sides, at least one")
    rows = len(parent)
    both = sum(a and b for a, b in zip(parent, candidate, strict=True))
    neither = sum(not a and not b for a, b in zip(parent, candidate, strict=True))
    lost = sum(a and not b for a, b in zip(parent, candidate, strict=True))
    won = rows - both - neither - lost
    mine, theirs = wilson(both + lost, rows), wilson(both + won, rows)
    spread = math.sqrt((both + lost) * (won + neither) * (both + won) * (lost + neither))
    excess = float(both * neither - lost * won)
    if excess > 0:
        excess = max(excess - rows / 2, 0.0)
    phi = excess / spread if spread else 0.0

    def reach(mine_end: float, theirs_end: float) -> float:
        a, b = abs(mine.value - mine_end), abs(theirs.value - theirs_end)
        return math.sqrt(max(0.0, a**2 - 2 * phi * a * b + b**2))

    value = mine.value - theirs.value
    return Interval(value, value - reach(mine.low, theirs.high), value + reach(mine.high, theirs.low))


def ratio_of_rounds(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """Geometric mean of paired ratios with Student's interval on their logarithms.

    numerators, denominators: positive figures of the same rounds, at least two. Raises ValueError otherwise.
    """
    if len(numerators) != len(denominators) or len(numerators) < 2:
        raise ValueError("a ratio of rounds needs at least two rounds with both sides")
    logs = [math.log(a / b) for a, b in zip(numerators, denominators, strict=True)]
    degrees = len(logs) - 1
    quantile = STUDENT[degrees - 1] if degrees <= len(STUDENT) else Z
    half = quantile * stdev(logs) / math.sqrt(len(logs))
    middle = fmean(logs)
    return Interval(math.exp(middle), math.exp(middle - half), math.exp(middle + half))
