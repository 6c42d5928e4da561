"""Judging a new revision by what the gateway saw of it and of the old one in the same time.

Both revisions answer the same mix of requests in one window, so whatever else happens to the machines happens to both.
A figure speaks only where it is beyond doubt: a share of failed requests by the lower end of its Wilson interval
(Wilson 1927, J. Am. Stat. Assoc. 22), a median time or speed by the spread of its own answers, taken as log-normal. So
a single unlucky request neither rolls a good revision back nor does silence promote one early.

    while the hold lasts      99 % sure that a limit is broken: bad, at once
    when the hold is over     95 % sure: bad; else good, where there was enough to judge by or nobody asked at all
    little was asked          one more hold; then what there is decides
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from fastserve.plan.observed import Window
from fastserve.spec.serve import Rollout

SURE_AT_ONCE = 2.33
"""Standard deviations of a one-sided 99 % interval: the window is looked at again and again while the hold lasts."""

SURE_AT_END = 1.645
"""The same at 95 %."""

ERRORS_AT_ONCE = 3
"""Failed requests without which nothing is rolled back while the hold lasts."""

ERRORS_AT_END = 2
ENOUGH_REQUESTS = 20
"""Requests of the new revision that make a window enough to go on by, and answers of each one that times are compared
over."""

USUAL_SPREAD = 0.5
"""Relative spread of times and speeds where the gateway does not tell it."""

LEAST_SPREAD = 0.05
"""And the least that is believed."""

MEDIAN_SPREAD = 1.2533
"""Standard error of a median against that of a mean, for a normal distribution: the square root of pi / 2."""

LEAST_MS = 0.1
"""Times below this are taken as this."""


class Outcome(StrEnum):
    """What a window says."""

    GOOD = "good"
    """On to the next step."""

    BAD = "bad"
    UNSURE = "unsure"
    """Nothing yet: the hold is not over, or too little was asked."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a window says, and why."""

    outcome: Outcome
    sentence: str
    """The figures that decided, without a full stop; what is waited for where nothing is decided."""


def judge(rollout: Rollout, old: Window, new: Window) -> Verdict:
    """What the windows of both revisions say since the last shift of traffic."""
    over = new.seconds >= rollout.hold
    fault = _errors(rollout, old, new, over) or _first_token(rollout, old, new, over) or _speed(rollout, old, new, over)
    if fault is not None:
        return Verdict(Outcome.BAD, fault)
    if not over:
        return Verdict(Outcome.UNSURE, f"it is watched for {rollout.hold:g} s")
    if new.requests >= ENOUGH_REQUESTS or new.requests + old.requests == 0 or new.seconds >= 2 * rollout.hold:
        return Verdict(Outcome.GOOD, f"{new.errors} of {new.requests} requests failed in {new.seconds:.0f} s")
    return Verdict(
        Outcome.UNSURE,
        f"it is watched for another {rollout.hold:g} s, since fewer than {ENOUGH_REQUESTS} requests came to it",
    )


def least_share(errors: int, requests: int, sure: float) -> float:
    """The lower end of the Wilson interval of a share: what the share is at least.

    sure: standard deviations of the one-sided interval. 0 without requests.
    """
    if errors == 0:
        return 0.0
    share, weight = errors / requests, sure * sure / requests
    spread = sure * math.sqrt(share * (1 - share) / requests + weight / (4 * requests))
    return max(0.0, (share + weight / 2 - spread) / (1 + weight))


def _errors(rollout: Rollout, old: Window, new: Window, over: bool) -> str | None:
    """More failed than may, and more than of the old revision: what both suffer from is not the new one's fault."""
    if new.errors < (ERRORS_AT_END if over else ERRORS_AT_ONCE):
        return None
    at_least = least_share(new.errors, new.requests, SURE_AT_END if over else SURE_AT_ONCE)
    usual = old.errors / old.requests if old.requests else 0.0
    if at_least <= max(rollout.max_error_rate, usual):
        return None
    return (
        f"{new.errors} of {new.requests} requests failed ({_percent(new.errors / new.requests)}, beyond doubt "
        f"{_percent(at_least)}) where maxErrorRate is {_percent(rollout.max_error_rate)}, against {old.errors} of "
        f"{old.requests} of the old revision in the same time"
    )


def _first_token(rollout: Rollout, old: Window, new: Window, over: bool) -> str | None:
    if new.ttft_ms is None or old.ttft_ms is None or min(new.first_tokens, old.first_tokens) < ENOUGH_REQUESTS:
        return None
    ratio = max(new.ttft_ms, LEAST_MS) / max(old.ttft_ms, LEAST_MS)
    doubt = math.hypot(*(_doubt(item.ttft_ms, item.ttft_p95_ms, item.first_tokens) for item in (new, old)))
    allowed = 1 + rollout.max_ttft_increase
    if math.log(ratio) - (SURE_AT_END if over else SURE_AT_ONCE) * doubt <= math.log(allowed):
        return None
    return (
        f"its median time to the first token was {new.ttft_ms:.0f} ms over {new.first_tokens} answers, {ratio:.2f} "
        f"times the {old.ttft_ms:.0f} ms of the old revision over {old.first_tokens} in the same time, where "
        f"maxTtftIncrease allows {allowed:.4g} times"
    )


def _speed(rollout: Rollout, old: Window, new: Window, over: bool) -> str | None:
    """Tokens/s of an answer, held to the same tolerance as the time to its first token."""
    if not new.tokens_per_s or not old.tokens_per_s or min(new.rates, old.rates) < ENOUGH_REQUESTS:
        return None
    ratio = new.tokens_per_s / old.tokens_per_s
    doubt = math.hypot(*(_doubt(item.slow_tokens_per_s, item.tokens_per_s, item.rates) for item in (new, old)))
    allowed = 1 + rollout.max_ttft_increase
    if -math.log(ratio) - (SURE_AT_END if over else SURE_AT_ONCE) * doubt <= math.log(allowed):
        return None
    return (
        f"its answers came at {new.tokens_per_s:.1f} tokens/s (median of {new.rates}), {ratio:.2f} times the "
        f"{old.tokens_per_s:.1f} of the old revision ({old.rates}) in the same time, where maxTtftIncrease allows "
        f"{1 / allowed:.2f} times"
    )


def _doubt(low: float | None, high: float | None, count: int) -> float:
    """Standard error of the logarithm of a median. low, high: the median and the percentile 45 % away from it."""
    spread = math.log(max(high, LEAST_MS) / max(low, LEAST_MS)) / SURE_AT_END if low and high else USUAL_SPREAD
    return MEDIAN_SPREAD * max(spread, LEAST_SPREAD) / math.sqrt(count)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
