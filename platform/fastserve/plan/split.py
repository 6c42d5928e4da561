"""Cutting a whole into unequal parts, exactly: the batch by speed, the state by speed and room."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from fastserve.errors import InsufficientMemory
from fastserve.units import show_bytes

WHOLE = 1 << 40
"""Shares are whole multiples of 1 / WHOLE: floats that hold them are exact, and so is their sum in any order."""


def split_batch(total: int, speeds: Sequence[float], most: Sequence[int] | None = None) -> tuple[int, ...]:
    """Share `total` equal pieces so that the slowest worker finishes as early as it can.

    speeds: pieces a second, above 0, shape [workers]. most: pieces that a worker takes at most, shape [workers]; None:
    any number. Returns pieces, shape [workers]; they sum to `total` exactly.

    Each piece goes to the worker that would finish it first, which is optimal for equal pieces. The pieces that are
    finished before the continuous optimum are given out at once, so the cost does not grow with `total`.

    Raises ValueError when all together may not take `total`.
    """
    caps = [total] * len(speeds) if most is None else list(most)
    if sum(caps) < total:
        raise ValueError(f"{total} pieces, but the workers take at most {sum(caps)}")
    seconds = _seconds_below(total, speeds, caps)
    given = [min(cap, int(seconds * speed)) for speed, cap in zip(speeds, caps, strict=True)]
    queue = [
        ((count + 1) / speed, index)
        for index, (count, speed, cap) in enumerate(zip(given, speeds, caps, strict=True))
        if count < cap
    ]
    heapq.heapify(queue)
    for _ in range(total - sum(given)):
        _, index = heapq.heappop(queue)
        given[index] += 1
        if given[index] < caps[index]:
            heapq.heappush(queue, ((given[index] + 1) / speeds[index], index))
    return tuple(given)


def _seconds_below(total: int, speeds: Sequence[float], caps: Sequence[int]) -> float:
    """A time by which at most `total` whole pieces are done, and only about one a worker fewer."""
    low, high = 0.0, total / sum(speeds)
    pairs = list(zip(speeds, caps, strict=True))

    def done(seconds: float) -> int:
        return sum(min(cap, int(seconds * speed)) for speed, cap in pairs)

    if done(high) <= total:
        low = high
        # Workers that are full leave more to the others.
        while total - done(low) > len(pairs) and done(2 * high) <= total:
            low = high = 2 * high
        high = 2 * high
    for _ in range(64):
        if total - done(low) <= len(pairs):
            break
        middle = (low + high) / 2
        low, high = (middle, high) if done(middle) <= total else (low, middle)
    return low


def split_state(total_bytes: int, room_bytes: Sequence[int], speeds: Sequence[float]) -> tuple[int, ...]:
    """Share the state by speed, as far as each worker's room goes; what is left fills the others, again by speed.

    By speed, since the optimizer's step and the copies of a worker grow with its share: all then take equally long.
    With equal speeds it is as even as the rooms allow (level filling). room_bytes, speeds: shape [workers].
    Returns bytes, shape [workers]; they sum to `total_bytes` exactly.

    Raises InsufficientMemory with the shortfall when all rooms together are smaller.
    """
    short = total_bytes - sum(room_bytes)
    if short > 0:
        raise InsufficientMemory(
            f"The state has {show_bytes(total_bytes)} and the workers have room for {show_bytes(sum(room_bytes))} of "
            f"it, so {show_bytes(short)} are missing. Add train.workers."
        )
    return split_batch(total_bytes, speeds, room_bytes)


def shares_of(parts: Sequence[int], total: int) -> tuple[float, ...]:
    """Parts as shares that sum to 1 exactly; what rounding leaves goes to the largest remainders."""
    counts = [part * WHOLE // total for part in parts]
    order = sorted(range(len(parts)), key=lambda index: (-(parts[index] * WHOLE % total), index))
    for index in order[: WHOLE - sum(counts)]:
        counts[index] += 1
    return tuple(count / WHOLE for count in counts)
