"""How the samples of one step are shared among unequal workers, and which go through the model together.

All workers compute the same division from the same numbers, so nobody has to be told. Sharded weights are gathered by
all workers together, once a micro-batch: every worker therefore has the same number of them, and waits in each for the
slowest. So a division is judged by the sum, over its rounds, of the time of the slowest worker.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

ROUND_COST = 0.05
"""What one more micro-batch costs, as a share of the step's shortest time: all weights are gathered once more."""

ROUND_COST_ALONE = 0.01
"""The same for a worker alone, which gathers nothing."""

MORE_ROUNDS = (1, 2, 3, 5, 8, 13)
"""Micro-batches that are tried beyond the fewest that memory allows."""

ATTENTION_TOKENS = 4096
"""Width of a row at which attention costs as much as everything else, as in a model of some hundred million numbers."""

Rounds = list[list[list[int]]]
"""[rank][micro-batch][samples]."""

Lengths = Sequence[int] | npt.NDArray[np.signedinteger[Any]]


class SamplesOfAStep(Protocol):
    """An `order.Batch`, or whatever else has samples."""

    @property
    def samples(self) -> tuple[int, ...]:
        """Indices into the sample set."""
        ...


@dataclass(frozen=True, slots=True)
class _Mine:
    """One worker's samples, longest first."""

    samples: list[int]
    lengths: list[int]
    share: float
    most: int
    """Tokens of a micro-batch."""


def divide(
    batch: SamplesOfAStep,
    lengths: Lengths,
    shares: Sequence[float],
    micro_tokens: Sequence[int],
    *,
    packed: bool = False,
    round_cost: float | None = None,
) -> Rounds:
    """The samples of `batch` as [rank][micro-batch][samples]; each stands in exactly one place.

    lengths: tokens of each sample of the whole set.
    shares: of the batch, shape [ranks]; only their ratios count. A rank with share 0 gets nothing.
    micro_tokens: most tokens of a micro-batch, shape [ranks]: of its rectangle with filling, of its `packed_rows` when
        `packed`. A sample that is longer goes alone.
    round_cost: of one more micro-batch, as a share of the step's shortest time; absent: ROUND_COST, or for one rank
        ROUND_COST_ALONE. With a large one, micro-batches are as few and large as `micro_tokens` allows.

    Every rank has the same number of micro-batches; some may be empty. Ranks get tokens in proportion to their shares,
    in one of two ways: longest sample first, each to the rank that would finish first, which on related machines ends
    within twice the best (Gonzalez, Ibarra and Sahni, 1977), or neighbours in length, which need less filling. Of both,
    and of the numbers of micro-batches from the fewest that fit, the division with the shortest step is taken.

    Raises ValueError for shares or limits that are not one per rank, and when no share is above zero.
    """
    if len(shares) != len(micro_tokens) or not any(share > 0 for share in shares) or min(shares) < 0:
        raise ValueError(f"{len(shares)} shares and {len(micro_tokens)} limits; give one of each per rank, one above 0")
    samples = np.array(batch.samples, np.int64)
    sizes = np.asarray(lengths)[samples].astype(np.int64)
    longest_first = np.lexsort((samples, -sizes))
    samples, sizes = samples[longest_first], sizes[longest_first]
    weights = np.array(shares, np.float64)
    ideal = float(sizes.sum()) / float(weights.sum())
    if round_cost is None:
        round_cost = ROUND_COST if len(shares) > 1 else ROUND_COST_ALONE
    found: list[tuple[float, Rounds]] = []
    for ranks in (_finishing_first(sizes, weights), *([] if packed else [_like_lengths(sizes, weights)])):
        mine = [
            _Mine(samples[ranks == rank].tolist(), sizes[ranks == rank].tolist(), share, int(most))
            for rank, (share, most) in enumerate(zip(shares, micro_tokens, strict=True))
        ]
        found.append(_best(mine, round_cost * ideal, packed))
    return min(found, key=lambda timed: timed[0])[1]


def _finishing_first(sizes: npt.NDArray[np.int64], shares: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Rank of each sample, shape [samples]; sizes: longest first."""
    # Heavier ranks first: argmin takes the first of equals. A share of 0 is left out.
    order = np.lexsort((np.arange(len(shares)), -shares))[: int((shares > 0).sum())]
    slowness = 1.0 / shares[order]
    loads = np.zeros(len(order))
    ends = np.empty(len(order))
    chosen = np.empty(len(sizes), np.int64)
    for index, size in enumerate(sizes.tolist()):
        np.add(loads, size, out=ends)
        ends *= slowness
        rank = int(ends.argmin())
        loads[rank] += size
        chosen[index] = rank
    ranks: npt.NDArray[np.int64] = order[chosen]
    return ranks


def _like_lengths(sizes: npt.NDArray[np.int64], shares: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Rank of each sample, shape [samples], so that those of a rank are of like length; sizes: longest first.

    Heavier ranks get the longer samples, so that what is over or lacking at a border weighs least.
    """
    order = np.argsort(-shares, kind="stable")
    borders = np.cumsum(shares[order]) / shares.sum() * sizes.sum()
    middles = np.cumsum(sizes) - sizes / 2
    places = np.minimum(np.searchsorted(borders, middles, side="right"), int((shares > 0).sum()) - 1)
    ranks: npt.NDArray[np.int64] = order[places]
    return ranks


def _best(mine: Sequence[_Mine], round_seconds: float, packed: bool) -> tuple[float, Rounds]:
    """The division with the shortest step among those with the fewest micro-batches and a few more, and its time."""
    fewest = max(1, *(_fewest(part, packed) for part in mine))
    most = max(len(part.samples) for part in mine)
    best_seconds, best = _divided(mine, fewest, packed)
    least = sum(sum(part.lengths) for part in mine) / sum(part.share for part in mine)
    best_seconds += round_seconds * (fewest - 1)
    for more in MORE_ROUNDS:
        longer = round_seconds * (fewest + more - 1)
        if packed or fewest + more > most or least + longer >= best_seconds:
            break  # hardly anything is filled up when packed, and even a perfect fit could no longer win
        seconds, divided = _divided(mine, fewest + more, packed)
        if seconds + longer < best_seconds:
            best_seconds, best = seconds + longer, divided
    return best_seconds, best


def _divided(mine: Sequence[_Mine], count: int, packed: bool) -> tuple[float, Rounds]:
    """Each worker's samples in `count` micro-batches, and the time of the step: in each, that of the slowest worker."""
    divided, seconds = [], np.zeros(count)
    for part in mine:
        groups = _spread(part.lengths, count) if packed else _rectangles(part, count)
        costs = np.array([_cost(part, group, packed) for group in groups] + [0] * (count - len(groups)), np.float64)
        # Large ones with large ones, so that nobody waits in a round that is small for itself.
        by_cost = np.argsort(-costs, kind="stable")
        if part.samples:
            np.maximum(seconds, costs[by_cost] / part.share, out=seconds)
        groups += [[] for _ in range(count - len(groups))]
        divided.append([[part.samples[place] for place in groups[index]] for index in by_cost.tolist()])
    used = max(1, int(np.count_nonzero(seconds)))  # neighbours may fill fewer rounds than they were given
    return float(seconds.sum()), [rank[:used] for rank in divided]


def _cost(part: _Mine, group: Sequence[int], packed: bool) -> int:
    """Tokens that go through the model, filling included."""
    if not packed:
        return part.lengths[group[0]] * len(group)
    lengths = [part.lengths[place] for place in group]
    rows = packed_rows(lengths)
    return len(rows) * max(sum(lengths[place] for place in row) for row in rows)


def _fewest(part: _Mine, packed: bool) -> int:
    """Micro-batches that the limit asks for."""
    if not part.samples:
        return 0
    if not packed:
        return len(_within(part.lengths, part.most))
    alone = sum(length > part.most for length in part.lengths)
    count = max(1, alone - (-sum(part.lengths[alone:]) // part.most))
    while any(len(row) > 1 and _cost(part, row, True) > part.most for row in _spread(part.lengths, count)):
        count += 1
    return count


def _within(lengths: Sequence[int], most: int) -> list[int]:
    """Where each of the fewest neighbouring groups of `lengths` (longest first) begins whose rectangles hold `most`."""
    begins, begin = [], 0
    while begin < len(lengths):
        begins.append(begin)
        begin += max(1, most // lengths[begin])
    return begins


def _rectangles(part: _Mine, count: int) -> list[list[int]]:
    """At most `count` groups of neighbours, the largest rectangle about as small as it can be."""
    low, high = 0, part.most
    best = _within(part.lengths, high)
    while high - low > max(1, high // 64):
        middle = (low + high) // 2
        begins = _within(part.lengths, middle)
        if len(begins) <= count:
            best, high = begins, middle
        else:
            low = middle
    ends = [*best[1:], len(part.lengths)]
    return [list(range(begin, end)) for begin, end in zip(best, ends, strict=True)] if best else []


def packed_rows(lengths: Sequence[int]) -> list[list[int]]:
    """Places of `lengths` in rows of about equal tokens, samples behind one another, filled up to the longest row.

    One long row would have no filling, but attention looks at all pairs of a row's tokens, masked or not. So rows are
    about as wide as the longest sample, or as few times that as makes the filling small.
    """
    longest_first = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    ordered = [lengths[place] for place in longest_first]
    most = max(1, sum(ordered) // ordered[0])
    found: list[tuple[float, list[list[int]]]] = []
    for count in sorted({most, max(1, most - 1), -(-3 * most // 4), -(-most // 2), -(-most // 4), 1}, reverse=True):
        rows = _spread(ordered, count)
        width = max(sum(ordered[place] for place in row) for row in rows)
        found.append((len(rows) * width * (1 + width / ATTENTION_TOKENS), rows))
    best = min(found, key=lambda tried: tried[0])[1]
    return [[longest_first[place] for place in row] for row in best]


def _spread(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Places of `lengths` (longest first) in at most `count` rows, each in the emptiest so far (Graham, 1969)."""
    loads = [(0, row) for row in range(count)]
    rows: list[list[int]] = [[] for _ in range(count)]
    for place, length in enumerate(lengths):
        load, row = loads[0]
        rows[row].append(place)
        heapq.heapreplace(loads, (load + length, row))
    return [row for row in rows if row]
