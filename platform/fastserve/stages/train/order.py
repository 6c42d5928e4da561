"""Which samples each optimizer step sees: a pure function of the seed, never of the workers.

A step is found again from its number alone, so a checkpoint needs no sampler state, and a run that goes on with another
number of workers takes up the very next samples. Every sample is seen once an epoch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastserve.stages.train.division import divide

__all__ = ["Batch", "Order", "divide", "epoch_batches"]

_BLOCK = 1 << 20
"""Samples that are worked on at once, so that intermediate arrays stay small beside those that are kept."""

Integers = npt.NDArray[np.signedinteger[Any]]


@dataclass(frozen=True, slots=True)
class Batch:
    """The samples of one optimizer step."""

    epoch: int
    samples: tuple[int, ...]
    """Indices into the sample set, shape [samples]."""


class Order:
    """All batches of a run, by step. Keeps four bytes a sample, and 16 while an epoch is shuffled.

    lengths: tokens of each sample, shape [samples].
    batch_tokens: tokens of one batch; an epoch is cut into as many batches as this needs, each nearly as large as the
        others, since a small last batch would weigh as much as a full one.
    """

    def __init__(self, lengths: Sequence[int] | Integers, batch_tokens: int, seed: int) -> None:
        self.lengths: npt.NDArray[np.int32] = np.ascontiguousarray(lengths, dtype=np.int32)
        self.batch_tokens, self.seed = batch_tokens, seed
        self._tokens = int(self.lengths.sum(dtype=np.int64))
        self._cached: tuple[int, Integers, npt.NDArray[np.int64]] | None = None

    @property
    def batches_an_epoch(self) -> int:
        """The same in every epoch."""
        return max(1, min(len(self.lengths), math.ceil(self._tokens / self.batch_tokens)))

    def steps_of(self, epochs: float | None, steps: int | None) -> int:
        """Optimizer steps of a run of `steps`, or else of `epochs` passes; at least 1."""
        if steps is not None:
            return steps
        wanted = 1.0 if epochs is None else epochs
        whole, part = int(wanted), wanted - int(wanted)
        return max(1, whole * self.batches_an_epoch + round(part * self.batches_an_epoch))

    def at(self, step: int) -> Batch:
        """The batch of `step`, counted from 0."""
        epoch, index = divmod(step, self.batches_an_epoch)
        if self._cached is None or self._cached[0] != epoch:
            self._cached = None  # its memory, before that of the next
            shuffled = _shuffled(len(self.lengths), self.seed, epoch)
            self._cached = (epoch, shuffled, _ends(self.lengths, shuffled, self._tokens, self.batches_an_epoch))
        _, shuffled, ends = self._cached
        begin = int(ends[index - 1]) if index else 0
        return Batch(epoch, tuple(shuffled[begin : int(ends[index])].tolist()))

    def since(self, step: int) -> Iterator[Batch]:
        """Batches from `step` on (counted from 0), without end."""
        while True:
            yield self.at(step)
            step += 1


def epoch_batches(lengths: Sequence[int] | Integers, batch_tokens: int, seed: int, epoch: int) -> list[Batch]:
    """All batches of one epoch; arguments as for `Order`."""
    order = Order(lengths, batch_tokens, seed)
    return [order.at(epoch * order.batches_an_epoch + index) for index in range(order.batches_an_epoch)]


def _shuffled(count: int, seed: int, epoch: int) -> Integers:
    """The numbers below `count` in an order of their own for each seed and epoch, shape [count].

    Each number gets a key from SplitMix64 (Steele, Lea and Flood, 2014), and the keys are sorted. Unlike a generator of
    some library, that stays the same in every version, so an old checkpoint goes on with the right samples.
    """
    start = np.uint64(int.from_bytes(hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:8], "little"))
    low_bits = np.uint64(max(1, (count - 1).bit_length()))
    keys = np.empty(count, np.uint64)
    for begin in range(0, count, _BLOCK):
        numbers = np.arange(begin, min(begin + _BLOCK, count), dtype=np.uint64)
        # The number itself stands in the low bits: no two keys are equal, and sorting in place is all there is to do.
        keys[begin : begin + _BLOCK] = (_mixed(numbers, start) >> low_bits << low_bits) | numbers
    keys.sort()
    shuffled: Integers = np.empty(count, np.dtype(np.int32 if count < 2**31 else np.int64))
    mask = (np.uint64(1) << low_bits) - np.uint64(1)
    for begin in range(0, count, _BLOCK):
        shuffled[begin : begin + _BLOCK] = keys[begin : begin + _BLOCK] & mask
    return shuffled


def _mixed(numbers: npt.NDArray[np.uint64], start: np.uint64) -> npt.NDArray[np.uint64]:
    mixed = numbers * np.uint64(0x9E3779B97F4A7C15) + start
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _ends(lengths: Integers, shuffled: Integers, tokens: int, count: int) -> npt.NDArray[np.int64]:
    """Where each of `count` batches of an epoch ends in its order, shape [count]; none is empty.

    A batch ends with the sample that reaches its share of the epoch's tokens.
    """
    number = np.arange(1, count + 1, dtype=np.int64)
    # tokens * number / count, rounded up, in whole numbers that do not overflow.
    reached = number * (tokens // count) - (-number * (tokens % count)) // count
    ends = np.empty(count, np.int64)
    seen, done = 0, 0
    for begin in range(0, len(shuffled), _BLOCK):
        sums = np.cumsum(lengths[shuffled[begin : begin + _BLOCK]], dtype=np.int64)
        sums += seen
        seen = int(sums[-1])
        upto = int(np.searchsorted(reached, seen, side="right"))
        ends[done:upto] = begin + np.searchsorted(sums, reached[done:upto], side="left") + 1
        done = upto
    # A sample longer than a batch would leave the next one empty.
    ends = np.maximum.accumulate(ends - number) + number
    return np.minimum(ends, len(shuffled) - count + number)
