"""How traffic gets from the revision that serves to the one that is wanted, without a gap.

Four rules carry it: traffic moves only to a revision that is ready, and with `serve.rollout` step by step; a revision
is stopped only when it has no traffic and is not wanted; a revision that has traffic but died with its cluster comes
back unless its successor is already on the way; at rest one revision has all the traffic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fastserve.plan.moves import Done, Move, Refuse, Shift, StartRevision, StopRevision, Unpin, Wait
from fastserve.plan.observed import LiveRevision, Observed, Pin, RevisionState
from fastserve.plan.revision import Revision
from fastserve.plan.steps import ROLLED_BACK, answers, fallen_moves, live_of, routed, step_moves
from fastserve.spec.serve import Rollout, Serve

START_SECONDS = 3600.0
"""Longest time that an engine may take to come up before it is called failed."""


def serve_moves(
    observed: Observed, wanted: Revision | None, blocked: Sequence[Move], rollout: Rollout | None, now: float
) -> list[Move]:
    """What to do so that the right revision gets the traffic.

    wanted: the revision that the manifest asks for; None while its artifact is still to be made.
    blocked: what has to happen before `wanted` may serve: stages to run, or a refusal. Empty: it may.
    rollout: how it takes over; None: it gets all traffic when it is ready.
    now: Unix seconds.
    """
    pin = observed.pin
    dropped: list[Move] = []
    if pin is not None and wanted is not None and wanted.digest != pin.instead_of:
        because = (
            f"The manifest no longer asks for revision {pin.instead_of[:8]}, "
            f"so the rollback to {pin.revision[:8]} is over."
        )
        dropped, pin = [Unpin(because=because)], None
    if pin is not None and pin.revision not in observed.known_revisions:
        return _settle([*_hold(observed), _unknown_pin(pin, observed)])
    target = _target(observed, wanted, pin, blocked)
    serving = _towards(observed, target, pin, rollout, now) if target is not None else _hold(observed)
    return [*dropped, *_settle([*serving, *blocked])]


def replica_bounds(serve: Serve, weights: Mapping[str, int], digest: str, pin: Pin | None = None) -> tuple[int, int]:
    """Fewest and most replicas of one revision, over all its profiles, beside the others that there are.

    A new revision starts with one replica beside those that serve; while both have traffic, each has its share of
    `replicas`, rounded up, so there is never more than one replica on top. pin: a rollback is brought up whole.
    """
    least, most = serve.replicas.min, serve.replicas.max
    others = sum(weight for other, weight in weights.items() if other != digest)
    mine = weights.get(digest, 0)
    pinned = pin is not None and pin.revision == digest
    if serve.rollout is None or others == 0 or pinned:
        return least, most
    if mine == 0:
        return 1, 1
    return math.ceil(least * mine / (mine + others)), math.ceil(most * mine / (mine + others))


def unserve_moves(observed: Observed) -> list[Move]:
    """What to do when the manifest no longer has a serve section; empty when nothing is left that serves."""
    if any(observed.weights.values()):
        return [Shift(because="The manifest has no serve section any more, so nothing is routed.", weights={})]
    return [
        StopRevision(
            because=f"Revision {live.digest[:8]} is not wanted: there is no serve section.", digest=live.digest
        )
        for live in observed.revisions
        if live.state is not RevisionState.STOPPING
    ]


def _settle(moves: Sequence[Move]) -> list[Move]:
    """`Refuse` and `Done` only when there is nothing else to do, and `Done` only when nothing is refused."""
    acting = [move for move in moves if not isinstance(move, Done | Refuse)]
    return acting or [move for move in moves if isinstance(move, Refuse)] or list(moves)


def _target(observed: Observed, wanted: Revision | None, pin: Pin | None, blocked: Sequence[Move]) -> Revision | None:
    """The revision that shall have all traffic; None: what has it keeps it."""
    if pin is not None:
        return Revision.from_json(observed.known_revisions[pin.revision])
    return None if blocked else wanted


def _hold(observed: Observed) -> list[Move]:
    """Keep what serves, while nothing new may."""
    return [*_gather(observed, routed(observed), recovers=True), *_recover(observed), *_clean(observed, wanted=None)]


def _towards(observed: Observed, target: Revision, pin: Pin | None, rollout: Rollout | None, now: float) -> list[Move]:
    live, obsolete = live_of(observed, target.digest), _clean(observed, target)
    others = routed(observed, besides=target.digest)
    at_once = pin is not None or rollout is None or target.digest == observed.proven
    if live is not None and live.state is RevisionState.READY:
        if rollout is None or at_once or not _beside(observed, target, others):
            return _all_to(observed, target) or obsolete or [_finished(target, pin)]
        if len(others) > 1:
            return [*obsolete, *_gather(observed, others)]
        return [*obsolete, *step_moves(observed, target, others[0], rollout, now)]
    if observed.weights.get(target.digest, 0) > 0 and others:
        if not at_once and answers(observed, others[0]):
            return [*obsolete, *fallen_moves(observed, target, others[0])]
        failed = live is not None and live.state is RevisionState.FAILED
        given = _gather(observed, others, alone=True) if failed else []
        if given:
            return given
    settled = [*obsolete, *_gather(observed, others)]
    if live is None or live.state is RevisionState.STOPPING:
        return [*settled, StartRevision(because=_why_start(observed, target, pin), revision=target)]
    if live.state is RevisionState.FAILED:
        return [*_recover(observed), *settled, _engine_failed(observed, target, live.message)]
    late = _too_long(observed, target, live, now)
    if late is not None:
        return [*_recover(observed), *settled, late]
    return [*settled, Wait(because=f"Revision {target.short} is starting: its engine loads.", stage="serve")]


def _beside(observed: Observed, target: Revision, others: Sequence[str]) -> bool:
    """Whether there is a revision to take the traffic over from step by step: one that answers, or, with the traffic
    already shared, one that may answer again."""
    if not others:
        return False
    live = live_of(observed, others[0])
    back = observed.weights.get(target.digest, 0) > 0 and live is not None and live.state is RevisionState.STARTING
    return answers(observed, others[0]) or back


def _all_to(observed: Observed, target: Revision) -> list[Move]:
    if {digest: weight for digest, weight in observed.weights.items() if weight} == {target.digest: 100}:
        return []
    because = f"Revision {target.short} is ready, so it takes all traffic."
    return [Shift(because=because, weights={target.digest: 100})]


def _gather(observed: Observed, among: Sequence[str], recovers: bool = False, alone: bool = False) -> list[Move]:
    """Give the traffic of several revisions, none of which is wanted, to the one that had all of it before.

    among: in the order of `routed`. recovers: those that are gone will be brought back, and are waited for. alone: also
    when it is one.
    """
    if len(among) < 2 and not alone:
        return []
    for digest in among:
        if answers(observed, digest):
            because = f"Revision {digest[:8]} takes all traffic: what it was shared with is not wanted any more."
            return [Shift(because=because, weights={digest: 100})]
        live = live_of(observed, digest)
        if live is not None and live.state is RevisionState.STARTING:
            return [Wait(because=f"Revision {digest[:8]} is starting, and gets all traffic then.", stage="serve")]
        if recovers and (live is None or live.state is RevisionState.STOPPING):
            return []
    return []


def _too_long(observed: Observed, target: Revision, live: LiveRevision, now: float) -> Refuse | None:
    """A refusal for an engine that never comes up, nor says that it does not."""
    if live.since is None or observed.weights.get(target.digest, 0) > 0:
        return None
    if now - max(live.since, observed.cluster_since or 0.0) <= START_SECONDS:
        return None
    return _engine_failed(
        observed, target, f"it has been starting for over {START_SECONDS / 60:.0f} minutes. {live.message}"
    )


def _clean(observed: Observed, wanted: Revision | None) -> list[Move]:
    """Stop what has no traffic and is not wanted.

    A revision that is ready stays while no other ready one has the traffic: if the routes were lost, it is the one
    that serves.
    """
    ready = [live.digest for live in observed.revisions if live.state is RevisionState.READY]
    served = any(observed.weights.get(digest, 0) > 0 for digest in ready)
    return [
        StopRevision(because=f"Revision {live.digest[:8]} gets no traffic and is not wanted.", digest=live.digest)
        for live in observed.revisions
        if live.state is not RevisionState.STOPPING
        and observed.weights.get(live.digest, 0) == 0
        and (wanted is None or live.digest != wanted.digest)
        and (served or live.state is not RevisionState.READY)
    ]


def _recover(observed: Observed) -> list[Move]:
    """Bring back what has the traffic but is gone from the serving cluster."""
    gone = [
        digest
        for digest, weight in sorted(observed.weights.items())
        if weight > 0
        and digest in observed.known_revisions
        and ((live := live_of(observed, digest)) is None or live.state is RevisionState.STOPPING)
    ]
    return [
        StartRevision(
            because=f"Revision {digest[:8]} has the traffic but is gone, and nothing may take its place yet.",
            revision=Revision.from_json(observed.known_revisions[digest]),
        )
        for digest in gone
    ]


def _why_start(observed: Observed, target: Revision, pin: Pin | None) -> str:
    if pin is not None:
        return f"Rolled back from revision {pin.instead_of[:8]}, so revision {target.short} is started."
    others = [digest[:8] for digest in routed(observed, besides=target.digest)]
    beside = f"; {', '.join(others)} keeps the traffic until it is ready" if others else ""
    artifact = f"the {target.artifact_stage} artifact {target.artifact_digest[:8]}"
    return f"Revision {target.short} of {artifact} may serve and is not up{beside}."


def _finished(target: Revision, pin: Pin | None) -> Move:
    if pin is None:
        return Done(because=f"Revision {target.short} serves all traffic, as the manifest asks.")
    if pin.reason == ROLLED_BACK:
        return Refuse(because=pin.because, reason=ROLLED_BACK, stage="serve")
    return Done(
        because=f"Revision {target.short} serves all traffic: it was rolled back to from {pin.instead_of[:8]}, "
        "and stays until the manifest asks for something else."
    )


def _engine_failed(observed: Observed, target: Revision, message: str) -> Refuse:
    others = [digest[:8] for digest in routed(observed, besides=target.digest)]
    kept = f" Revision {', '.join(others)} keeps the traffic." if others else ""
    told = f": {message.strip().rstrip('.')}" if message.strip() else ""
    more = f"`fastserve logs {target.model} serve` shows more."
    because = f"The engine of revision {target.short} did not come up{told}.{kept} {more}"
    return Refuse(because=because, reason="EngineFailed", stage="serve")


def _unknown_pin(pin: Pin, observed: Observed) -> Refuse:
    known = ", ".join(sorted(digest[:8] for digest in observed.known_revisions)) or "none"
    because = (
        f"The rollback asks for revision {pin.revision[:8]}, which is not known here; known: {known}. "
        "What serves keeps serving; name one of the known revisions in `fastserve rollback`."
    )
    return Refuse(because=because, reason="RevisionNotFound", stage="serve")
