"""How traffic gets from the revision that serves to the one that is wanted, without a gap.

Three rules carry it: traffic moves only to a revision that is ready; a revision is stopped only when it has no
traffic and is not wanted; a revision that has traffic but died with its cluster comes back unless its successor is
already on the way.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastserve.plan.moves import Done, Move, Refuse, Shift, StartRevision, StopRevision, Unpin, Wait
from fastserve.plan.observed import LiveRevision, Observed, Pin, RevisionState
from fastserve.plan.revision import Revision


def serve_moves(observed: Observed, wanted: Revision | None, blocked: Sequence[Move]) -> list[Move]:
    """What to do so that the right revision gets the traffic.

    wanted: the revision that the manifest asks for; None while its artifact is still to be made.
    blocked: what has to happen before `wanted` may serve: stages to run, or a refusal. Empty: it may.
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
        return [_unknown_pin(pin, observed)]
    target = _target(observed, wanted, pin, blocked)
    serving = _towards(observed, target, pin) if target is not None else _hold(observed)
    return [*dropped, *_settle([*serving, *blocked])]


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
    return [*_recover(observed), *_clean(observed, wanted=None)]


def _towards(observed: Observed, target: Revision, pin: Pin | None) -> list[Move]:
    live = _live(observed, target.digest)
    obsolete = _clean(observed, target)
    if live is None or live.state is RevisionState.STOPPING:
        return [*obsolete, StartRevision(because=_why_start(observed, target, pin), revision=target)]
    if live.state is RevisionState.STARTING:
        return [*obsolete, Wait(because=f"Revision {target.short} is starting: its engine loads.", stage="serve")]
    if live.state is RevisionState.FAILED:
        return [*_recover(observed), *obsolete, _engine_failed(observed, target, live)]
    if {digest: weight for digest, weight in observed.weights.items() if weight} != {target.digest: 100}:
        because = f"Revision {target.short} is ready, so it takes all traffic."
        return [Shift(because=because, weights={target.digest: 100})]
    return obsolete or [Done(because=_why_done(target, pin))]


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
        and ((live := _live(observed, digest)) is None or live.state is RevisionState.STOPPING)
    ]
    return [
        StartRevision(
            because=f"Revision {digest[:8]} has the traffic but is gone, and nothing may take its place yet.",
            revision=Revision.from_json(observed.known_revisions[digest]),
        )
        for digest in gone
    ]


def _live(observed: Observed, digest: str) -> LiveRevision | None:
    return next((live for live in observed.revisions if live.digest == digest), None)


def _serving(observed: Observed, besides: str) -> list[str]:
    """Short digests of the revisions that have traffic."""
    return [digest[:8] for digest, weight in sorted(observed.weights.items()) if weight > 0 and digest != besides]


def _why_start(observed: Observed, target: Revision, pin: Pin | None) -> str:
    if pin is not None:
        return f"Rolled back from revision {pin.instead_of[:8]}, so revision {target.short} is started."
    others = _serving(observed, besides=target.digest)
    beside = f"; {', '.join(others)} keeps the traffic until it is ready" if others else ""
    artifact = f"the {target.artifact_stage} artifact {target.artifact_digest[:8]}"
    return f"Revision {target.short} of {artifact} may serve and is not up{beside}."


def _why_done(target: Revision, pin: Pin | None) -> str:
    if pin is not None:
        return (
            f"Revision {target.short} serves all traffic: it was rolled back to from {pin.instead_of[:8]}, "
            "and stays until the manifest asks for something else."
        )
    return f"Revision {target.short} serves all traffic, as the manifest asks."


def _engine_failed(observed: Observed, target: Revision, live: LiveRevision) -> Refuse:
    others = _serving(observed, besides=target.digest)
    kept = f" Revision {', '.join(others)} keeps the traffic." if others else ""
    told = f": {live.message.strip().rstrip('.')}" if live.message.strip() else ""
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
