"""At which Ray heads a revision shall be while it goes from one to another: a model that gets machines of its own, or a
Ray cluster that is replaced by one with another image.

Nothing answers differently before and after, so there is no rollout: the revision comes up beside itself, with as many
replicas, and only then requests go there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LEAVE_SECONDS = 90.0
"""From the moment at which requests go to the new place until the old one is given up. A gateway that was not told
reads its volume, which its kubelet renews within about a minute."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A revision as one head has it."""

    replicas: int
    """That take requests."""

    answers: bool
    """It takes requests, or rests at none and would wake."""


@dataclass(frozen=True, slots=True)
class Stay:
    """Where a revision shall be now."""

    heads: frozenset[str]
    """Heads that shall have it."""

    routed: str
    """The head that requests go to."""

    least: int = 0
    """Replicas that must be up at the wanted head, so that those that answer now can be given up."""

    @property
    def moves(self) -> bool:
        """Whether it is on its way from one head to another."""
        return len(self.heads) > 1


def stay(wanted: str, standing: Mapping[str, Standing], settled_seconds: float | None) -> Stay:
    """Where a revision shall be.

    wanted: the head that it shall have in the end. standing: how the heads that have it, have it. settled_seconds: for
    how long the wanted head has had it in full; None when it has not, or nobody looked yet.

    What answers is never given up for what does not: the old place stays until the new one has as many replicas, and
    for LEAVE_SECONDS more.
    """
    others = {head: item for head, item in standing.items() if head != wanted and item.answers}
    if not others:
        return Stay(frozenset({wanted}), wanted)
    least = max(item.replicas for item in others.values())
    if is_full(wanted, standing):
        is_left = settled_seconds is not None and settled_seconds >= LEAVE_SECONDS
        return Stay(frozenset({wanted}) if is_left else frozenset({wanted, *others}), wanted, least)
    best = max(sorted(others), key=lambda head: others[head].replicas)
    return Stay(frozenset({wanted, *others}), best, least)


def is_full(wanted: str, standing: Mapping[str, Standing]) -> bool:
    """Whether the wanted head answers with as many replicas as any other has."""
    here = standing.get(wanted)
    most = max((item.replicas for head, item in standing.items() if head != wanted and item.answers), default=0)
    return here is not None and here.answers and here.replicas >= most
