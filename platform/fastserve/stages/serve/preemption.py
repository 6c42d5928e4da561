"""Who has to give way so that requests of a better class run in the next step. A pure decision over plain values.

What an engine step runs out of is slots, KV blocks and tokens. A request is preempted only when that lets another one
in: half the room that somebody needs helps nobody and costs the victim its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Rank = tuple[int, float, str]
"""Class, arrival, name; the smallest goes first. The engine sorts its waiting queue in the same way."""


@dataclass(frozen=True, slots=True)
class Running:
    """A request in the batch, and what its next step takes."""

    rank: Rank
    tokens: int
    """Its share of the step's tokens: 1, or more in the middle of a prompt."""

    blocks: int
    """New KV blocks."""

    movable: bool = True
    """Whether preempting it now gives its blocks back at once."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that could be let in, and what that takes."""

    rank: Rank
    tokens: int
    blocks: int
    least: int = 1
    """Tokens that it needs in its first step: one where prompts may be cut, otherwise all."""


@dataclass(frozen=True, slots=True)
class Room:
    """What is free in the next step, the running requests' own needs already taken off; blocks may be below zero."""

    slots: int
    blocks: int
    tokens: int

    def holds(self, one: Waiting) -> bool:
        """Whether `one` can be let in."""
        return self.slots >= 1 and self.tokens >= one.least and self.blocks >= one.blocks

    def without(self, one: Waiting) -> Room:
        """After `one` was let in."""
        return Room(self.slots - 1, self.blocks - one.blocks, self.tokens - min(one.tokens, self.tokens))

    def after(self, victim: Running, held: int) -> Room:
        """After `victim`, which holds `held` blocks of its own, was preempted."""
        return Room(self.slots + 1, self.blocks + held + victim.blocks, self.tokens + victim.tokens)


def victims(
    room: Room, running: Sequence[Running], waiting: Iterable[Waiting], held: Callable[[Running], int]
) -> list[Running]:
    """Who is preempted before the next step, in this order.

    waiting: in the order of their ranks; it is read only as far as needed. The first who cannot be let in ends it, as
    it ends the engine's own pass: nobody overtakes by being small.
    held: blocks that nobody else uses of a running request; asked for those alone that may have to go.

    A victim's class is always worse than that of the request it makes room for: equals never preempt each other.
    """
    chosen: list[Running] = []
    left = sorted((one for one in running if one.movable), key=lambda one: one.rank)
    for one in waiting:
        gone, after = _make_room(room, one, left, held)
        if not after.holds(one):
            break
        room = after.without(one)
        chosen.extend(gone)
        left = [other for other in left if other not in gone]
    return chosen


def _make_room(
    room: Room, one: Waiting, left: Sequence[Running], held: Callable[[Running], int]
) -> tuple[list[Running], Room]:
    """Who of `left`, the last first, gives way until `one` fits, and the room then; it may still be too little."""
    gone: list[Running] = []
    for victim in reversed(left):
        if room.holds(one) or victim.rank[0] <= one.rank[0]:
            break
        if room.slots >= 1 and room.blocks >= one.blocks and victim.tokens <= 1:
            continue  # only tokens are short, and this one has none to give
        gone.append(victim)
        room = room.after(victim, held(victim))
    return gone, room
