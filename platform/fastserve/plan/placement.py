"""Which hardware profile gets how many replicas of a revision.

Preference decides: the first of `serve.profiles` that has a machine gets the replicas, and the next one only what that
cannot have. Three things make the next one open: there is no machine in front of it, a replica has waited too long for
one, or everything in front of it is as large as it may be and full. It is closed again when it has had nothing to do,
and a profile in front comes back as soon as it can be had: one replica first, and what serves stays until that one is
ready. So for that moment there may be one replica more than `replicas.max`.

Nothing is remembered between two looks. What keeps the answer from going back and forth is in what is looked at: who
runs already, and how busy the last minute was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

PENDING_SECONDS = 30.0
"""How long a replica may wait for a machine before the next profile gets it."""

FULL = 0.9
"""Part of its slots in use from which a profile that may not grow is full."""

QUIET = 0.5
"""Largest part of its slots that a profile had in use in the last minute, below which it needs no help."""

_UNKNOWN = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One profile of `serve.profiles`, as it stands for one revision."""

    profile: str
    room: int
    """Replicas that its machines hold at most, those that run included; 0: there is no machine."""

    ready: int = 0
    """Replicas that answer."""

    wanted: int = 0
    """Replicas there shall be, as its policy decided."""

    waiting_since: float | None = None
    """Unix seconds since when one of them has no machine; None: all have."""

    failed: bool = False
    """Whether the engine did not come up there."""

    busy: float = 0.0
    """Requests, in parts of all slots of the replicas that run."""

    busy_peak: float = 0.0
    """The most of it in the last minute."""

    kind: str = ""
    """What the machine is. Neighbours of one kind in `serve.profiles` are equals, and the cheaper one goes first."""

    spot: bool = False
    price_per_hour: float | None = None
    tokens_per_s: float = 0.0
    """Measured, of one replica; 0: not yet."""

    @property
    def price_per_token(self) -> float:
        """Price of one measured token, in the currency of pricePerHour; infinite while it is not known."""
        if self.price_per_hour is None:
            return _UNKNOWN
        return self.price_per_hour / 3600 / self.tokens_per_s if self.tokens_per_s > 0 else _UNKNOWN


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many replicas a profile may have."""

    profile: str
    least: int
    most: int
    """0: the profile is not used now."""

    because: str
    spilled: bool = False
    """Whether it only helps out: it is left as soon as it has nothing to do."""


@dataclass(slots=True)
class _Slot:
    """A place while its bounds are being found."""

    place: Place
    capacity: int
    """Replicas that it can have now."""

    stuck: bool
    least: int = 0
    most: int = 0
    because: str = ""
    spilled: bool = False

    @property
    def open(self) -> bool:
        return self.most > 0 and (self.least > 0 or self.place.ready > 0 or self.place.wanted > 0)

    @property
    def full(self) -> bool:
        return self.stuck or (self.place.wanted >= self.most and self.place.busy >= FULL)


def ordered(places: Sequence[Place]) -> list[Place]:
    """By preference; neighbours of equal hardware by price of a measured token, or by price of an hour before that."""
    found: list[Place] = []
    for kind, run in groupby(places, key=lambda place: place.kind):
        equals = list(run)
        known = [place.price_per_token for place in equals]
        if kind and _UNKNOWN not in known:
            equals.sort(key=lambda place: place.price_per_token)
        elif kind:
            equals.sort(key=lambda place: _UNKNOWN if place.price_per_hour is None else place.price_per_hour)
        found += equals
    return found


def place(places: Sequence[Place], least: int, most: int, now: float) -> tuple[Bounds, ...]:
    """The bounds of each profile, in the order in which they are used.

    places: the profiles of `serve.profiles`, in its order. least, most: bounds of the revision over all of them.
    now: Unix seconds. The sum of the largest numbers is at most `most`, or one more while a profile comes back.
    """
    slots = [_slot(item, now) for item in ordered(places)]
    usable = [slot for slot in slots if not slot.place.failed]
    if usable:
        _keep_least(usable, least)
        _share_most(usable, most)
        _hold_least(usable, least)
        _open(usable)
    return tuple(_told(slot, slots) for slot in slots)


def _slot(item: Place, now: float) -> _Slot:
    stuck = item.waiting_since is not None and now - item.waiting_since > PENDING_SECONDS and item.ready < item.room
    capacity = min(item.room, item.ready) if stuck else item.room
    return _Slot(item, 0 if item.failed else capacity, stuck)


def _keep_least(slots: Sequence[_Slot], least: int) -> None:
    """Give `least` to machines that are not taken away at short notice, as far as there are such."""
    left = least
    for slot in sorted(slots, key=lambda slot: slot.place.spot):  # the order of preference within each of both
        slot.least = min(slot.capacity, left)
        left -= slot.least
    if left:
        first = next((slot for slot in slots if slot.place.room > slot.capacity), slots[0])
        first.least += left


def _share_most(slots: Sequence[_Slot], most: int) -> None:
    """Give every place what it may have at most, the preferred ones first. What runs keeps running until those are
    ready that go before it; the first that could have more gets one beyond what is left."""
    left, front = most, 0
    comes_back = False
    for at, slot in enumerate(slots):
        behind, ready = slots[at + 1 :], slot.place.ready
        kept = sum(max(other.least, other.place.ready) for other in behind)
        promised = sum(min(other.least, other.place.ready) for other in behind)
        slot.most = min(slot.capacity, max(0, left - kept))
        more = slot.place.room > ready and front + ready < most
        if not comes_back and more and (slot.stuck or any(other.place.ready > other.least for other in behind)):
            comes_back = True
            slot.most = max(slot.most, ready + 1)
        slot.most = max(slot.most, slot.least, min(ready, max(0, most - front - promised)))
        left = max(0, left - slot.most)
        front += ready
    if not any(slot.most for slot in slots):
        slots[0].most = most  # no machine anywhere: the preferred profile waits for one
    _trim(slots, most + 1)


def _trim(slots: Sequence[_Slot], limit: int) -> None:
    """Take from the last places until the sum is within `limit`: first what does not run yet."""
    for floor in (True, False):
        for slot in reversed(slots):
            excess = sum(other.most for other in slots) - limit
            slot.most -= max(0, min(excess, slot.most - (slot.place.ready if floor else 0)))


def _hold_least(slots: Sequence[_Slot], least: int) -> None:
    """Keep what serves until the places in front of it hold `least`, and try again where nothing has come up yet."""
    front = 0
    for slot in slots:
        slot.least = min(slot.most, max(slot.least, min(slot.place.ready, least - front)))
        if slot.stuck and slot.place.ready == 0:
            slot.least = min(slot.most, max(slot.least, 1))
        front += slot.place.ready


def _open(slots: Sequence[_Slot]) -> None:
    """Decide which places are used; the others get nothing."""
    for at, slot in enumerate(slots):
        behind = [other for other in slots[at + 1 :] if other.place.ready > other.least]
        if behind and slot.most > 0 and not slot.open:
            slot.least, slot.because = 1, f"it is preferred to {behind[0].place.profile} and can be had again"
    for at, slot in enumerate(slots):
        helped = [other for other in slots[:at] if other.open]
        if slot.open and slot.least == 0 and helped:
            slot.spilled = True
            if max(other.place.busy_peak for other in helped) >= QUIET:
                slot.least, slot.because = 1, f"{helped[-1].place.profile} was busy in the last minute"
    closed = [slot for slot in slots if slot.most > 0 and not slot.open]
    used = [slot for slot in slots if slot.open]
    if closed and not used:
        used = [closed.pop(0)]
    elif closed and all(slot.full for slot in used):
        slot = closed.pop(0)
        slot.least, slot.spilled, slot.because = 1, True, _why_more(used[-1])
    for slot in closed:
        slot.most = 0


def _why_more(last: _Slot) -> str:
    if last.stuck:
        return f"a replica on {last.place.profile} has waited {PENDING_SECONDS:.0f}s for a machine"
    return f"{last.place.profile} may have {last.most} at most, and is full"


def _told(slot: _Slot, slots: Sequence[_Slot]) -> Bounds:
    """The bounds with their reason as a sentence."""
    name, item = slot.place.profile, slot.place
    if item.failed:
        return Bounds(name, 0, 0, f"The engine did not come up on {name}.")
    if slot.most == 0:
        why = "there is no machine of it" if item.room == 0 else "those in front of it suffice"
        return Bounds(name, 0, 0, f"Profile {name} is not used: {why}.")
    why = slot.because or _why(slot, slots)
    return Bounds(name, slot.least, slot.most, f"Profile {name} has {slot.least} to {slot.most}: {why}.", slot.spilled)


def _why(slot: _Slot, slots: Sequence[_Slot]) -> str:
    item = slot.place
    if item.room == 0:
        return "no machine is there, and it waits for one"
    if slot.stuck:
        return f"a replica has waited {PENDING_SECONDS:.0f}s for a machine, and still does"
    front = slots[: slots.index(slot)]
    if not front:
        return "it is preferred"
    if slot.least and not item.spot and any(other.place.spot for other in front):
        return "the least that is kept is on machines that are not spot"
    missing = [other.place.profile for other in front if other.capacity == 0]
    return f"{missing[0]} cannot be had" if missing else "it serves until those in front of it do"
