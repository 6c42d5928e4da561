"""What workers with unequal shares send each other: whole parameters out of slices, sums of gradients into slices.

On one machine nothing is sent at all (`neighbours`).

Torch's own all-gather and reduce-scatter want equal slices. `all_to_all_single` takes any sizes, also none, and runs on
NCCL and gloo alike. On the CPU a gather is one broadcast of every slice instead: gloo receives each straight into its
place, which costs a third of the all-to-all's processor time, and processor time is what a slow worker lacks. A sum is
taken by the owner of the slice in the order of the ranks, in fp32 whatever the precision on the wire: the same numbers
in every run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
import torch.distributed as dist

from fastserve.stages.train.group import Group
from fastserve.stages.train.neighbours import Neighbours

ALIGN = 16
"""Slices begin at multiples of so many numbers, as vector instructions like it."""


def cut(total: int, shares: Sequence[float]) -> list[int]:
    """Where to cut `total` numbers in proportion to `shares`; begins with 0, ends with `total`, shape [ranks + 1].

    A slice has its share to within `ALIGN` numbers; a share of zero has none. Pure: every rank finds the same.

    Raises ValueError when a share is negative or not finite, or all are zero.
    """
    sums = list(accumulate(float(share) for share in shares))
    if not sums or min(shares) < 0 or not 0 < sums[-1] < float("inf"):
        raise ValueError(f"shares must be finite, none negative and one positive: {list(shares)}")
    cuts = [min(total, round(total * (done / sums[-1]) / ALIGN) * ALIGN) for done in sums]
    # The rounding must not take the end from the last rank that has a share.
    last = max(rank for rank, share in enumerate(shares) if share > 0)
    return [0, *cuts[:last], *[total] * (len(sums) - last)]


class Work(Protocol):
    """What torch.distributed hands out for a collective under way."""

    def wait(self) -> Any:
        """Until it is done."""


class _Signal:
    """A gather of what lies in shared memory: there as soon as all have said so."""

    def __init__(self, neighbours: Neighbours | None, number: int) -> None:
        self._neighbours, self._number = neighbours, number

    def wait(self) -> None:
        if self._neighbours is not None:
            self._neighbours.ready.wait(self._number)


class Gather:
    """A gather under way."""

    def __init__(self, wire: Wire, works: Sequence[Work], keep: Any = None) -> None:
        self._wire, self._works, self._keep = wire, works, keep

    def wait(self) -> None:
        """Until the whole is there."""
        with self._wire.standing_still():
            for work in self._works:
                work.wait()
        self._works, self._keep = (), None


class Reduction:
    """A sum of gradients under way."""

    def __init__(self, wire: Wire, work: Work, received: torch.Tensor, sent: torch.Tensor) -> None:
        self._wire, self._work, self._received, self._sent = wire, work, received, sent

    def add_to(self, gradient: torch.Tensor) -> None:
        """Wait, then add every rank's part to this rank's fp32 slice, in rank order. Shape [own numbers]."""
        with self._wire.standing_still():
            self._work.wait()
            for part in self._received.split(gradient.numel()) if gradient.numel() else ():
                gradient.add_(part)


class SharedSum:
    """A sum of gradients that all ranks of this machine can read."""

    def __init__(self, wire: Wire, neighbours: Neighbours, buffers: Sequence[torch.Tensor], signal: int) -> None:
        self._wire, self._neighbours, self._buffers, self._signal = wire, neighbours, buffers, signal

    def add_to(self, gradient: torch.Tensor) -> None:
        """Wait, then add every rank's part to this rank's fp32 slice, in rank order. Shape [own numbers]."""
        with self._wire.standing_still():
            self._neighbours.ready.wait(self._signal)
        for part in self._buffers:
            gradient.add_(part)
        self._neighbours.read.signal()


class Wire:
    """The collectives of a run: issued in the same order by every rank, counted and timed."""

    neighbours: Neighbours | None = None
    """Shared memory with all ranks, if they all live on this machine."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.device: torch.device = group.device
        self.log: list[tuple[str, int]] = []
        """Kind and numbers of each collective since `clear`."""
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []
        self._published = 0

    def clear(self) -> None:
        """Begin to count and time anew."""
        self.log = []
        self._seconds = 0.0
        self._events = []

    @property
    def seconds(self) -> float:
        """Wall seconds since `clear` in which computing stood still for a collective."""
        if self._events:
            self._events[-1][1].synchronize()
        return self._seconds + float(sum(begin.elapsed_time(end) for begin, end in self._events)) / 1000

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Time what happens inside; on a GPU by events in the stream that computes, as the host does not wait."""
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            began_at = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began_at

    def gather(self, whole: torch.Tensor, bounds: Sequence[int], mine: torch.Tensor) -> Gather:
        """Begin to fill `whole`, shape [bounds[-1]], from every rank's slice.

        mine: this rank's slice, shape [own numbers]; it is sent in the precision of `whole`.
        """
        rank, size = self.group.rank, self.group.size
        self.log.append(("gather", whole.numel()))
        with self.standing_still():
            if self.device.type == "cpu":
                whole[bounds[rank] : bounds[rank + 1]].copy_(mine)
                slices = [(owner, whole[begin:end]) for owner, (begin, end) in enumerate(pairwise(bounds))]
                return Gather(self, [dist.broadcast(s, owner, async_op=True) for owner, s in slices if s.numel()])
            sent = mine.to(whole.dtype).repeat(size)
            work = dist.all_to_all_single(whole, sent, _sizes(bounds), [mine.numel()] * size, async_op=True)
        return Gather(self, [work], sent)

    def publish(self) -> None:
        """Say that this rank's slices of what is common hold new numbers."""
        if self.neighbours is not None:
            self._published = self.neighbours.ready.signal()

    def arrived(self, numel: int) -> Gather:
        """A gather of what is common: `wait` until all ranks have published."""
        self.log.append(("gather", numel))
        return Gather(self, [_Signal(self.neighbours, self._published)])

    def reduce(
        self, whole: torch.Tensor, bounds: Sequence[int], begin_bytes: int | None = None
    ) -> Reduction | SharedSum:
        """Begin to hand every rank its slice of `whole`, shape [bounds[-1]], from all ranks, to be added up there.

        begin_bytes: place of `whole` among this rank's shared buffers, where it lies in one.
        """
        rank, size = self.group.rank, self.group.size
        own = bounds[rank + 1] - bounds[rank]
        self.log.append(("reduce", whole.numel()))
        if begin_bytes is not None and self.neighbours is not None:
            with self.standing_still():
                signal = self.neighbours.begin_sum(begin_bytes)
            span = slice(bounds[rank], bounds[rank + 1])
            shape = (begin_bytes, whole.numel(), whole.dtype)
            buffers = [self.neighbours.buffer(each, *shape)[span] for each in range(size)]
            return SharedSum(self, self.neighbours, buffers, signal)
        with self.standing_still():
            received = whole.new_empty(own * size)
            work = dist.all_to_all_single(received, whole, [own] * size, _sizes(bounds), async_op=True)
        return Reduction(self, work, received, whole)

    def add_up(self, number: float) -> float:
        """Sum of `number` over all ranks, in fp64."""
        self.log.append(("sum", 1))
        if self.group.size == 1:
            return number
        with self.standing_still():
            if self.neighbours is not None:
                return self.neighbours.add_up(number)
            told = torch.tensor([number], dtype=torch.float64, device=self.device)
            dist.all_reduce(told)
            return float(told)


def _sizes(bounds: Sequence[int]) -> list[int]:
    return [end - begin for begin, end in pairwise(bounds)]
