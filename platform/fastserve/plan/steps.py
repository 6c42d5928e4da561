"""The steps of a rollout: a new revision gets more and more of the traffic, as long as it is no worse than the old one.

Where it stands is read from the weights, how long it stands there from `shifted_at`, and how it does from the windows:
nothing else is kept, so a rollout goes on after a restart of anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastserve.plan.moves import Move, Refuse, RollBack, Shift, Wait
from fastserve.plan.observed import LiveRevision, Observed, Pin, RevisionState
from fastserve.plan.revision import Revision
from fastserve.plan.watch import Outcome, judge
from fastserve.spec.serve import Rollout

ROLLED_BACK = "RolledBack"
"""Reason of a pin that nobody asked for."""

BLIND_SECONDS = 60.0
"""How long, after twice the hold, the gateway may leave us without figures."""


@dataclass(frozen=True, slots=True)
class Step:
    """Where a rollout stands."""

    revision: str
    """Digest of the new revision."""

    old: str
    """Digest of the revision that it is to replace."""

    weight: int
    """Percent of traffic of the new one."""

    number: int
    """Of the step, from 1."""

    steps: tuple[int, ...]
    watched_seconds: float
    hold_seconds: float


def live_of(observed: Observed, digest: str) -> LiveRevision | None:
    """The revision as the serving cluster sees it; None when it knows of none."""
    return next((live for live in observed.revisions if live.digest == digest), None)


def answers(observed: Observed, digest: str) -> bool:
    """Whether requests to a revision with traffic are answered: it is ready, or rests at no replica until somebody
    asks."""
    live = live_of(observed, digest)
    return live is not None and (live.state is RevisionState.READY or _rests(live))


def routed(observed: Observed, besides: str = "") -> list[str]:
    """Revisions that have traffic: first the one that had all of it last, then by how much they have."""
    weights = {digest: weight for digest, weight in observed.weights.items() if weight > 0 and digest != besides}
    return sorted(weights, key=lambda digest: (digest != observed.proven, -weights[digest], digest))


def step_of(observed: Observed, wanted: str, rollout: Rollout | None) -> Step | None:
    """Where the rollout of the revision `wanted` stands; None when none is under way."""
    share, others = observed.weights.get(wanted, 0), routed(observed, besides=wanted)
    if rollout is None or observed.pin is not None or not share or not others or wanted == observed.proven:
        return None
    window = observed.windows.get(wanted)
    return Step(
        revision=wanted,
        old=others[0],
        weight=share,
        number=sum(step < share for step in rollout.steps) + 1,
        steps=tuple(rollout.steps),
        watched_seconds=0.0 if window is None else max(0.0, window.seconds),
        hold_seconds=rollout.hold,
    )


def step_moves(observed: Observed, target: Revision, old: str, rollout: Rollout, now: float) -> list[Move]:
    """What to do with a new revision that is ready, beside an old one that has traffic.

    old: digest of the revision that it replaces. now: Unix seconds.
    """
    share = observed.weights.get(target.digest, 0)
    if share == 0:
        because = f"Revision {target.short} is ready, so it takes its first step beside {old[:8]}: "
        return [_shift(target.digest, old, rollout.steps[0], because)]
    shared = _weights(target.digest, old, share)
    if {digest: weight for digest, weight in observed.weights.items() if weight} != shared:
        return [Shift(because=f"The weights are to sum to 100, with {share} % for {target.short}.", weights=shared)]
    if observed.shifted_at is None or observed.shifted_at > now:
        # A clock that was set back must not make the hold longer than it was meant to be.
        because = f"It is not known since when revision {target.short} has {share} %, so it is watched from now on."
        return [Shift(because=because, weights=shared)]
    new_window, old_window = observed.windows.get(target.digest), observed.windows.get(old)
    if new_window is None or old_window is None:
        return [_blind(target, share, rollout, now - observed.shifted_at)]
    verdict = judge(rollout, old_window, new_window)
    if verdict.outcome is Outcome.BAD:
        return roll_back(observed, target, old, verdict.sentence)
    if verdict.outcome is Outcome.UNSURE:
        because = f"Revision {target.short} has {share} % of traffic beside {old[:8]}: {verdict.sentence}."
        return [Wait(because=because, stage="serve")]
    if not answers(observed, old):
        because = f"Revision {target.short} takes all traffic: {old[:8]} has not answered, and {verdict.sentence}."
        return [Shift(because=because, weights={target.digest: 100})]
    following = next((step for step in rollout.steps if step > share), 100)
    because = f"Revision {target.short} was no worse than {old[:8]} at {share} % ({verdict.sentence}): "
    return [_shift(target.digest, old, following, because)]


def fallen_moves(observed: Observed, target: Revision, old: str) -> list[Move]:
    """What to do when a new revision no longer answers while it has a share of the traffic.

    old: digest of the revision that it replaces, which answers.
    """
    live, share = live_of(observed, target.digest), observed.weights.get(target.digest, 0)
    if live is not None and _rests(live):
        return [Wait(because=f"Revision {target.short} has {share} % of traffic and nobody asks.", stage="serve")]
    restarted = (observed.cluster_since or 0.0) > (observed.shifted_at or 0.0)
    if live is None or live.state is RevisionState.STOPPING or restarted:
        because = f"Revision {target.short} went down with its cluster, so {old[:8]} has all traffic until it is back."
        return [Shift(because=because, weights={old: 100})]
    told = f" ({live.message.strip().rstrip('.')})" if live.message.strip() else ""
    return roll_back(observed, target, old, f"its engine stopped answering{told}")


def roll_back(observed: Observed, target: Revision, old: str, fault: str) -> list[Move]:
    """Give the traffic back to the old revision, and remember why."""
    share = observed.weights.get(target.digest, 0)
    because = (
        f"Revision {target.short} was rolled back to {old[:8]} at {share} % of traffic: {fault}. It is not tried again "
        "until the manifest asks for something else or `fastserve up` is run again."
    )
    moves: list[Move] = [RollBack(because=because, pin=Pin(old, target.digest, ROLLED_BACK, because))]
    if answers(observed, old):
        moves.append(Shift(because=f"Revision {old[:8]} has all traffic again.", weights={old: 100}))
    return moves


def _rests(live: LiveRevision) -> bool:
    """No replica, and none wanted."""
    starting = live.state is RevisionState.STARTING
    return starting and bool(live.places) and not any(place.wanted for place in live.places)


def _weights(target: str, old: str, share: int) -> Mapping[str, int]:
    return {target: 100} if share >= 100 else {old: 100 - share, target: share}


def _shift(target: str, old: str, share: int, because: str) -> Shift:
    return Shift(because=f"{because}{share} % of traffic.", weights=_weights(target, old, share))


def _blind(target: Revision, share: int, rollout: Rollout, seconds: float) -> Move:
    """The gateway does not tell how the revisions do: nothing is decided without it."""
    patience_seconds = 2 * rollout.hold + BLIND_SECONDS
    if seconds <= patience_seconds:
        because = f"Revision {target.short} has {share} % of traffic, and the gateway's figures are waited for."
        return Wait(because=because, stage="serve")
    because = (
        f"Revision {target.short} stays at {share} % of traffic: for {patience_seconds:.0f} s the gateway has not told "
        f"how it does. `fastserve rollback {target.model}` gives the traffic back; the steps go on when the gateway "
        "answers."
    )
    return Refuse(because=because, reason="ClusterFailed", stage="serve")
