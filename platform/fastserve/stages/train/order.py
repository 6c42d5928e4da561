"""Which samples each optimizer step sees: a pure function of the seed, never of the workers.

A step is found again from its number alone, so a checkpoint needs no sampler state, and a run that goes on with another
number of workers takes up the very next samples. Every sample is seen once an epoch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MICRO_TOKENS = 2048
"""Most tokens, with filling, that go through the model at once on a worker; a longer sample goes alone."""

MOST_FILLING = 0.2
"""Share by which the shortest sample of a group may fall behind its longest."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The samples of one optimizer step."""

    epoch: int
    samples: tuple[int, ...]
    """Indices into the sample set, shape [samples]."""


def epoch_batches(lengths: Sequence[int], batch_tokens: int, seed: int, epoch: int) -> list[Batch]:
    """One epoch in its own order, cut into batches of nearly equal size.

    lengths: tokens of each sample, shape [samples].
    batch_tokens: tokens of one batch; an epoch is cut into as many batches as this needs, each as large as the others,
        since a small last batch would weigh as much as a full one.
    """
    shuffled = list(range(len(lengths)))
    random.Random(f"{seed}/{epoch}").shuffle(shuffled)
    total = sum(lengths)
    count = max(1, math.ceil(total / batch_tokens))
    batches: list[Batch] = []
    current: list[int] = []
    seen = 0
    for sample in shuffled:
        current.append(sample)
        seen += lengths[sample]
        # A batch ends where its share of the epoch ends; rounding must not leave the last sample over.
        if seen * count >= total * (len(batches) + 1):
            batches.append(Batch(epoch, tuple(current)))
            current = []
    if current:
        batches.append(Batch(epoch, tuple(current)))
    return batches


@dataclass(frozen=True, slots=True)
class Order:
    """All batches of a run, by step."""

    lengths: Sequence[int]
    batch_tokens: int
    seed: int

    def steps_of(self, epochs: float | None, steps: int | None) -> int:
        """Optimizer steps of a run of `steps`, or else of `epochs` passes; at least 1."""
        if steps is not None:
            return steps
        wanted = 1.0 if epochs is None else epochs
        whole, part = int(wanted), wanted - int(wanted)
        total = sum(len(self._epoch(epoch)) for epoch in range(whole))
        if part:
            total += round(part * len(self._epoch(whole)))
        return max(1, total)

    def since(self, step: int) -> Iterator[Batch]:
        """Batches from `step` on (counted from 0), without end."""
        epoch = 0
        while True:
            batches = self._epoch(epoch)
            yield from batches[step:]
            step = max(0, step - len(batches))
            epoch += 1

    def _epoch(self, epoch: int) -> list[Batch]:
        return epoch_batches(self.lengths, self.batch_tokens, self.seed, epoch)


def share(batch: Batch, lengths: Sequence[int], workers: int, rank: int) -> list[int]:
    """The samples of `batch` that the worker `rank` computes; over all ranks they are the batch.

    Longest first, each to the worker with the fewest tokens so far (Graham, 1969), so that all end together.
    """
    loads = [0] * workers
    mine: list[int] = []
    for sample in sorted(batch.samples, key=lambda sample: (-lengths[sample], sample)):
        worker = loads.index(min(loads))
        loads[worker] += lengths[sample]
        if worker == rank:
            mine.append(sample)
    return mine


def micro_batches(samples: Sequence[int], lengths: Sequence[int], limit: int = MICRO_TOKENS) -> list[list[int]]:
    """`samples`, longest first, in groups of like length that go through the model at once.

    A group is a rectangle as wide as its longest sample; it holds at most `limit` places.
    """
    groups: list[list[int]] = []
    for sample in samples:
        if groups:
            width = lengths[groups[-1][0]]
            if lengths[sample] >= width * (1 - MOST_FILLING) and width * (len(groups[-1]) + 1) <= limit:
                groups[-1].append(sample)
                continue
        groups.append([sample])
    return groups
