"""The memory of a shared training run: what a worker needs whatever its share, and the room left for the state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import ceil
from typing import NoReturn

from fastserve.errors import InsufficientMemory
from fastserve.plan.facts import LOCAL, TrainingFacts, WorkerFacts
from fastserve.plan.footprint import footprint
from fastserve.plan.split import split_state
from fastserve.units import show_bytes

_MOST_DETOUR = 2
"""State by speed may cost at most so many times the fewest micro-batches: each of them gathers every unit anew."""


class Layout:
    """The memory of a plan, with frozen weights whole or cut, as the number of micro-batches varies."""

    def __init__(
        self,
        workers: Sequence[WorkerFacts],
        facts: TrainingFacts,
        batch_tokens: int,
        batch: Sequence[float],
        speeds: Sequence[float],
        even: bool,
        whole: bool,
    ) -> None:
        self.workers, self.facts, self.speeds, self.even, self.whole = workers, facts, speeds, even, whole
        self.tokens = [share * batch_tokens for share in batch]
        self.footprint = footprint(facts, len(workers), whole)
        # A micro-batch is never smaller than the longest sample, so more parts than these save nothing.
        self.most_parts = max(1, max(ceil(tokens / facts.longest_tokens) for tokens in self.tokens))
        self._least_parts = max(
            ceil(tokens / max(worker.most_tokens, facts.longest_tokens)) if worker.most_tokens else 1
            for worker, tokens in zip(workers, self.tokens, strict=True)
        )

    def base_bytes(self, parts: int) -> list[int]:
        """Bytes of each worker with no share of the state."""
        longest, each = self.facts.longest_tokens, self.facts.activation_bytes_per_token
        return [self.footprint.peak(0, each * max(longest, ceil(tokens / parts))) for tokens in self.tokens]

    def room(self, parts: int) -> list[int]:
        """Bytes of the state for which each worker has room; negative where not even no share fits."""
        needs, longest, each = self.footprint, self.facts.longest_tokens, self.facts.activation_bytes_per_token
        one, start = needs.by_share / needs.cut, needs.process + needs.loaded
        found = []
        for worker, tokens in zip(self.workers, self.tokens, strict=True):
            in_step = worker.memory_bytes - needs.fixed - ceil(each * max(longest, ceil(tokens / parts)))
            at_start = worker.memory_bytes - start
            least = min(in_step, at_start)
            found.append(least if least < 0 else min(int(in_step / one), at_start))
        return found

    def fits(self, parts: int) -> bool:
        """Whether `parts` micro-batches leave room for the state."""
        room = self.room(parts)
        if self.even:
            return min(room) >= self._even_share()
        return min(room) >= 0 and sum(room) >= self.footprint.cut

    def parts(self) -> int:
        """The fewest micro-batches that fit; more of them, within reason, where the state then goes by speed."""
        least = _first(self.fits, self._least_parts, self.most_parts)
        most = min(self.most_parts, least * _MOST_DETOUR)
        if self.even or self.by_speed(least) or not self.by_speed(most):
            return least
        return _first(self.by_speed, least, most)

    def by_speed(self, parts: int) -> bool:
        """Whether no worker's part of the state by speed is above its room."""
        each = self.footprint.cut / sum(self.speeds)
        return all(room >= each * speed for room, speed in zip(self.room(parts), self.speeds, strict=True))

    def kept(self, parts: int) -> tuple[int, ...]:
        """Bytes of the state that each worker keeps."""
        room = [self._even_share()] * len(self.workers) if self.even else self.room(parts)
        return split_state(self.footprint.cut, room, self.speeds)

    def micro_tokens(self, state: Sequence[float], parts: int) -> tuple[int, ...]:
        """Tokens that each worker has room for at once beside its share of the state."""
        facts, most = self.facts, max(ceil(sum(self.tokens)), self.facts.longest_tokens)
        found = []
        for worker, share, tokens in zip(self.workers, state, self.tokens, strict=True):
            left = worker.memory_bytes - self.footprint.fixed - share * self.footprint.by_share
            room = int(left / facts.activation_bytes_per_token) if facts.activation_bytes_per_token else most
            wanted = max(worker.most_tokens or most, facts.longest_tokens)
            # Rounding of the shares may take a token from what the plan was made for.
            found.append(max(min(room, wanted, most), facts.longest_tokens, ceil(tokens / parts)))
        return tuple(found)

    def _even_share(self) -> int:
        return -(-self.footprint.cut // len(self.workers))


def _first(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The least number from `low` to `high` that fits; what fits a number fits every larger one, and `high` fits."""
    high = max(low, high)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


def refuse(layout: Layout) -> NoReturn:
    """Raise InsufficientMemory: the table of all kinds of worker, the shortfall, and what to change."""
    parts = layout.most_parts
    base, room = layout.base_bytes(parts), layout.room(parts)
    kinds = Counter(
        (worker.profile, worker.memory_bytes, needs, left)
        for worker, needs, left in zip(layout.workers, base, room, strict=True)
    )
    rows = [("workers", "memory", "used without state", "room for state")]
    rows += [
        (f"{count} x {profile}", show_bytes(memory), show_bytes(needs), show_bytes(max(0, left)))
        for (profile, memory, needs, left), count in kinds.items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    table = "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
    raise InsufficientMemory(f"Memory of the training workers\n{table}\n{_shortfall(layout, base, room)}")


def _shortfall(layout: Layout, base: Sequence[int], room: Sequence[int]) -> str:
    """What is missing, where, and what to change."""
    what = "state" if layout.whole else "state and frozen weights"
    cut, ways = layout.footprint.cut, layout.facts.ways
    profiles = sorted({worker.profile for worker in layout.workers})
    # Workers on one machine share its memory: more of them have less each.
    on_one_machine = profiles == [LOCAL]
    more = [] if on_one_machine else ["add train.workers"]
    if min(room) < 0:
        index = min(range(len(room)), key=lambda worker: room[worker])
        worker = layout.workers[index]
        first = (
            "take a profile with more memory" if len(profiles) == 1 else f"leave {worker.profile} out of train.workers"
        )
        if on_one_machine:
            first = "use fewer train.workers"
        return (
            f"A worker of profile {worker.profile} uses {show_bytes(base[index])} even with no share of the {what}, "
            f"and has {show_bytes(worker.memory_bytes)}: {show_bytes(-room[index])} are missing. "
            + _sentence([first] if len(room) > 1 or not on_one_machine else [], ways)
        )
    if layout.even:
        each = -(-cut // len(room))
        return (
            f"An even share of the {what} is {show_bytes(each)}, and the smallest room is {show_bytes(min(room))}: "
            f"{show_bytes(each - min(room))} are missing. "
            + _sentence(["write train.engine: sharded, which shares by memory", *more], ways)
        )
    missing = cut - sum(room)
    return (
        f"There are {show_bytes(cut)} of {what} to share, and room for {show_bytes(sum(room))}: {show_bytes(missing)} "
        "are missing. " + _sentence(more, ways)
    )


def _sentence(first: Sequence[str], ways: Sequence[str]) -> str:
    listed = [*first, *ways]
    text = ", ".join(listed[:-1]) + f", or {listed[-1]}." if len(listed) > 1 else f"{listed[0]}."
    return text[0].upper() + text[1:]
