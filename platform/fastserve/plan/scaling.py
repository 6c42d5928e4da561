"""How many replicas there should be, from what is measured: up at once, down slowly, never back and forth.

Everything is counted in requests for each replica, queued and running together: that is what users feel and what an
engine can batch. `target.queue` says how many are fine. Time to first token and the KV cache only correct that number:
when they show that so many were too many, fewer count as fine from then on, and the number comes back slowly. So there
is one rule for all signals, and one pair of thresholds that keeps them from fighting.

The pair: more replicas from 1.1 times the target on, fewer only when the largest load of the last minute would have
been 0.8 of it. What lies between changes nothing, so noise of 10 % around any level never does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any, Self

UPSCALE_SECONDS = 2.0
"""How long the load must be above the target before replicas are added; far above it, one look is enough."""

DOWNSCALE_SECONDS = 60.0
"""How long the load must have been small enough before replicas are taken away."""

TO_ZERO_SECONDS = 300.0
"""How long nobody must have asked before the last replica goes."""

ABOVE = 1.1
"""Load, in multiples of the target, from which there are too few replicas."""

FAR_ABOVE = 2.0
"""The same, from which nobody waits for a second look."""

BELOW = 0.8
"""Load, in multiples of the target, that fewer replicas may have."""

FULL_SLOTS = 0.8
"""Part of its slots that a replica may have in use: what comes beyond them waits where nobody here can count it."""

FULL_CACHE = 0.9
"""Use of the KV cache from which requests are preempted for it before long."""

BUSY = 0.8
"""Part of the best speed that one replica was seen to have from which it counts as working as fast as it can."""

LESSON_SECONDS = 10.0
"""Between two lessons: replicas report what they saw in the last so many seconds."""

FORGET_A_MINUTE = 1.02
"""How fast what was learned is given up again: the load may have become another."""

BLIND_SECONDS = 5.0
"""Looks further apart than this saw nothing of what came between: somebody may have asked."""

_BUCKETS = 12
_SPEED_FORGET_A_MINUTE = 0.99
_EPSILON = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One application at one moment."""

    now: float
    """Unix seconds."""

    running: int
    """Replicas that take requests."""

    wanted: int
    """Replicas there shall be: those that run, and those that start."""

    least: int
    most: int
    """Bounds of `replicas`, or of this profile's part of them."""

    queue: float
    """target.queue: requests for each replica, queued and running."""

    requests: float
    """Queued and running requests of all replicas."""

    ttft_target_seconds: float | None = None
    """target.ttft; None: nobody asked for one."""

    ttft_seconds: float = 0.0
    """Median time to first token of the last seconds, of the slowest replica; 0: nothing was measured."""

    kv_use: float = 0.0
    """Part of the KV cache that is in use, 0 to 1, of the fullest replica."""

    tokens_per_s: tuple[float, ...] = ()
    """Of each replica that reported, over the last seconds."""

    slots: float = 0.0
    """Requests that one replica takes at once; 0: not known."""

    up_seconds: float = UPSCALE_SECONDS
    down_seconds: float = DOWNSCALE_SECONDS
    idle_seconds: float = TO_ZERO_SECONDS


@dataclass(frozen=True, slots=True)
class State:
    """What the next decision must know of the ones before. Lost, it costs a minute of caution and nothing else."""

    since: float | None = None
    """When looking began; None before the first look."""

    at: float = 0.0
    """The last look."""

    peaks: tuple[tuple[float, float], ...] = ()
    """Largest number of requests in each part of the last `down_seconds`, with the time at which the part began."""

    asked_at: float | None = None
    """When somebody asked last, or when the first replica came up."""

    above_since: float | None = None
    fine: float | None = None
    """Requests for each replica that were learned to be fine; None: target.queue is."""

    learned_at: float = 0.0
    best_tokens_per_s: float = 0.0
    """The most that one replica was seen to make, slowly forgotten."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Back from plain values."""
        return cls(**{**value, "peaks": tuple((float(at), float(peak)) for at, peak in value.get("peaks", ()))})


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas there shall be."""

    replicas: int
    because: str
    """A full sentence with the figures that decided."""

    state: State
    asked: int
    """The same without the bounds: what the load alone asks for."""


def decide(look: Snapshot, before: State) -> Decision:
    """How many replicas there shall be now.

    look: what is there. before: the state of the last decision; `State()` at first.
    """
    state, lesson = _learn(look, _remember(look, before))
    fine = _fine(look, state)
    asked, because = _asked(look, state, fine, lesson)
    if asked > look.wanted:
        state, asked, because = _up(look, state, fine, asked, because, sure=lesson is not None)
    else:
        state = replace(state, above_since=None)
    return _bounded(look, state, asked, because)


def peak(state: State) -> float:
    """Largest number of requests of the last minute."""
    return max((load for _, load in state.peaks), default=0.0)


def _remember(look: Snapshot, before: State) -> State:
    """The state with this look in it."""
    minutes = max(0.0, look.now - before.at) / 60 if before.since is not None else 0.0
    width = max(look.down_seconds / _BUCKETS, _EPSILON)
    kept = [item for item in before.peaks if look.now - look.down_seconds - width < item[0] <= look.now]
    if kept and look.now - kept[-1][0] < width:
        kept[-1] = (kept[-1][0], max(kept[-1][1], look.requests))
    else:
        kept.append((look.now, look.requests))
    blind = look.now - before.at > BLIND_SECONDS
    asking = look.requests > 0 or look.running == 0 or before.asked_at is None or blind
    fine = None if before.fine is None else before.fine * FORGET_A_MINUTE**minutes
    best = before.best_tokens_per_s * _SPEED_FORGET_A_MINUTE**minutes
    return replace(
        before,
        since=look.now if before.since is None else before.since,
        at=look.now,
        peaks=tuple(kept),
        asked_at=look.now if asking else before.asked_at,
        fine=None if fine is None or fine >= look.queue else fine,
        best_tokens_per_s=max(best, *look.tokens_per_s, 0.0),
    )


def _learn(look: Snapshot, state: State) -> tuple[State, str | None]:
    """The state, and in words what was just learned: that so many requests for each replica are too many.

    Nothing is learned while replicas start (they will change it), twice from the same seconds, or where each replica
    has no more than one request: another replica cannot make that one faster.
    """
    width = look.down_seconds / _BUCKETS
    recent = max([load for at, load in state.peaks if at > look.now - LESSON_SECONDS - width], default=0.0)
    load = max(look.requests, recent) / max(look.running, 1)
    starting = look.running < look.wanted
    if starting or load <= 1 or look.requests <= 0 or look.now - state.learned_at < LESSON_SECONDS:
        return state, None
    factor, words = 1.0, None
    if look.ttft_target_seconds is not None and look.ttft_seconds > look.ttft_target_seconds:
        factor = min(0.9, max(0.5, look.ttft_target_seconds / look.ttft_seconds))
        taken, target = _seconds(look.ttft_seconds), _seconds(look.ttft_target_seconds)
        words = f"the first token takes {taken}, above target.ttft {target}"
    if look.kv_use >= FULL_CACHE:
        factor = min(factor, BELOW)
        words = words or f"{look.kv_use:.0%} of the KV cache is in use"
    if words is None:
        return state, None
    fine = max(1.0, min(load, _fine(look, state)) * factor)
    return replace(state, fine=fine, learned_at=look.now), words


def _fine(look: Snapshot, state: State) -> float:
    """Requests for each replica that are fine."""
    most = look.queue if state.fine is None else min(look.queue, state.fine)
    return min(most, FULL_SLOTS * look.slots) if look.slots > 0 else most


def _asked(look: Snapshot, state: State, fine: float, lesson: str | None) -> tuple[int, str]:
    """What the load asks for, without bounds and delays, and why."""
    each = look.requests / max(look.wanted, 1)
    told = f"{_count(look.requests, 'request')}, {each:.1f} for each of {_count(look.wanted, 'replica')}"
    aim = f"target.queue {look.queue:g}" if fine >= look.queue else f"the {fine:.1f} that were fine"
    if lesson is not None:
        more = max(ceil(look.requests / fine - _EPSILON), look.running + 1)
        return max(more, look.wanted), f"{told}: {lesson}"
    if look.wanted == 0:
        return (ceil(look.requests / fine - _EPSILON), f"{told}") if look.requests > 0 else (0, "nobody asks")
    if look.requests > ABOVE * fine * look.wanted:
        return ceil(look.requests / fine - _EPSILON), f"{told}, above {aim}"
    return _fewer(look, state, fine, told)


def _fewer(look: Snapshot, state: State, fine: float, told: str) -> tuple[int, str]:
    """As many as there are, or fewer where the last minute allows it."""
    idle = look.now - (state.asked_at if state.asked_at is not None else look.now)
    if look.least == 0 and look.running > 0 and idle >= look.idle_seconds:
        return 0, f"nobody has asked for {_seconds(idle)}"
    stay = look.wanted, f"{told}, as target.queue {look.queue:g} allows"
    if state.since is None or look.now - state.since < look.down_seconds or look.wanted <= 1:
        return stay
    most = peak(state)
    enough = max(1, ceil(most / (BELOW * fine) - _EPSILON))
    total, best = sum(look.tokens_per_s), state.best_tokens_per_s
    if best > 0:
        enough = max(enough, ceil(total / (0.9 * best) - _EPSILON))
    missed = look.ttft_target_seconds is not None and look.ttft_seconds > look.ttft_target_seconds
    if enough >= look.wanted or (missed and look.requests > look.wanted):
        return stay
    return enough, f"at most {_count(most, 'request')} at once in the last {_seconds(look.down_seconds)}"


def _up(look: Snapshot, state: State, fine: float, asked: int, because: str, sure: bool) -> tuple[State, int, str]:
    """Add replicas now, or look again first; how many at once is for the measured speed to say.

    A crowd that has only just come may be gone before a replica is up, so it at most doubles what runs. Replicas that
    work as fast as one was ever seen to are short of hands for certain: then all that the load asks for are added.
    """
    since = look.now if state.above_since is None else state.above_since
    state = replace(state, above_since=since)
    far = look.wanted == 0 or look.requests > FAR_ABOVE * fine * look.wanted
    if not (sure or far or look.now - since >= look.up_seconds):
        return state, look.wanted, f"{because}; a second look decides"
    speeds, best = look.tokens_per_s, state.best_tokens_per_s
    each = sum(speeds) / len(speeds) if speeds else 0.0
    if best > 0 and each >= BUSY * best:
        return state, asked, f"{because}; each makes {each:.0f} tokens/s, and {best:.0f} is the most that one made"
    doubled = max(look.wanted, 2 * max(look.running, 1))
    if asked > doubled:
        return state, doubled, f"{because}; at most twice as many at once"
    return state, asked, because


def _bounded(look: Snapshot, state: State, asked: int, because: str) -> Decision:
    replicas = min(look.most, max(look.least, asked))
    if asked > look.most:
        because += f"; replicas.max leaves {look.most}"
    elif asked < look.least:
        because += f"; replicas.min keeps {look.least}"
    return Decision(replicas, because[:1].upper() + because[1:] + ".", state, asked)


def _count(number: float, noun: str) -> str:
    shown = f"{number:.0f}" if abs(number - round(number)) < 0.05 else f"{number:.1f}"
    return f"{shown} {noun}" + ("" if shown == "1" else "s")


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f}ms" if value < 1 else f"{value:.1f}s" if value < 10 else f"{value:.0f}s"
