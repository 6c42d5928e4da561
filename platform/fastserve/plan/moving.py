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
class Route:
    """Where requests for a revision have gone until now."""

    head: str
    seconds: float
    """For how long."""


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


def stay(wanted: str, standing: Mapping[str, Standing], before: Route | None) -> Stay:
    """Where a revision shall be.

    wanted: the head that it shall have in the end. standing: how the heads that have it, have it. before: where its
    requests have gone until now; None when nobody knows.

    What answers is never given up for what does not: requests go on where they go until the wanted head has as many
    replicas. Other places are kept for LEAVE_SECONDS after requests have left them, and no longer, also while the
    wanted head is still to come: it may be waiting for just their machines.
    """
    others = {head: item for head, item in standing.items() if head != wanted and item.answers}
    if not others:
        return Stay(frozenset({wanted}), wanted)
    least = max(item.replicas for item in others.values())
    if is_full(wanted, standing):
        routed = wanted
    elif before is not None and before.head in others:
        routed = before.head
    else:
        routed = max(sorted(others), key=lambda head: others[head].replicas)
    is_left = before is not None and before.head == routed and before.seconds >= LEAVE_SECONDS
    return Stay(frozenset({wanted, routed} if is_left else {wanted, *others}), routed, least)


def is_full(wanted: str, standing: Mapping[str, Standing]) -> bool:
    """Whether the wanted head answers with as many replicas as any other has."""
    here = standing.get(wanted)
    most = max((item.replicas for head, item in standing.items() if head != wanted and item.answers), default=0)
    return here is not None and here.answers and here.replicas >= most
