"""How fast this worker is, before the batch is shared: measured, never believed.

A whole micro-batch of a large model takes long on a small machine, so the model is timed with its first block alone and
with a few blocks; what a block adds, times the blocks, is the rest. All workers probe at the same time, as they will
compute at the same time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastserve.stages.train.corpus import Rectangle
from fastserve.stages.train.group import Group
from fastserve.stages.train.meter import Pace
from fastserve.stages.train.network import Network
from fastserve.stages.train.standin import StandIn, shortened

SIZES = (32, 256, 512, 1024, 2048)
"""Tokens of the micro-batches that are tried where there is no accelerator; the first one shows what any of them
costs."""

ACCELERATOR_SIZES = (256, 1024, 4096, 16_384)
MOST_SECONDS = 2.5
"""A larger micro-batch is not tried when it would end after so long."""

FEW_BLOCKS = 3
SLOWER = 0.05
"""The largest micro-batch is taken that is slower than the best by no more than this share: of fewer, less is lost to
filling and to what each of them costs."""

_LINK_NUMBERS = 1 << 18
"""fp32 numbers that each worker sends to try its network: 1 MiB."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What was measured."""

    tokens_per_s: float
    """Forward and backward, at the best size."""

    most_tokens: int
    """Tokens of the largest micro-batch that was found to be as fast as any."""

    pace: Pace
    """Seconds of a micro-batch and of each of its tokens: the line through what was measured."""


def probe(
    network: Network,
    candidates: Sequence[tuple[int, Rectangle]],
    dtype: torch.dtype,
    device: torch.device,
    most_seconds: float = MOST_SECONDS,
) -> Probe:
    """Time micro-batches of growing size.

    candidates: (tokens, samples) of each, smallest first, at least one. The model's weights and gradients are as they
    were afterwards.
    """
    began_at = time.monotonic()
    _seconds(network, candidates[0][1], 1, dtype, device)  # first calls choose kernels and claim memory
    found: list[tuple[int, float]] = []
    before = 0.0
    for tokens, rectangle in candidates:
        spent = time.monotonic() - began_at
        if before and spent + before * 2 > most_seconds:
            break
        seconds = _whole_seconds(network, rectangle, dtype, device)
        before = time.monotonic() - began_at - spent
        found.append((tokens, seconds))
    best = max(tokens / seconds for tokens, seconds in found)
    most = max(tokens for tokens, seconds in found if tokens / seconds >= best * (1 - SLOWER))
    return Probe(best, most, _line(found))


def _line(found: Sequence[tuple[int, float]]) -> Pace:
    """Through the smallest and the largest micro-batch; what a micro-batch costs is never more than most of it."""
    (few, short), (many, long) = found[0], found[-1]
    if many == few:
        return Pace(long / many)
    each = max(long - short, 0.0) / (many - few)
    fixed = min(max(short - each * few, 0.0), 0.9 * short, 0.5 * long)
    return Pace((long - fixed) / many, fixed)


def link_seconds(group: Group) -> list[float]:
    """Seconds that a mebibyte takes between each worker and the others, by rank, the same on all. Collective.

    Each worker sends in its turn and all time it; a worker whose network is slow is slow as sender and as receiver.
    """
    if group.size == 1:
        return [0.0]
    numbers = torch.zeros(_LINK_NUMBERS, dtype=torch.float32, device=group.device)
    mine = []
    for rank in range(group.size):
        group.number_from_first(rank)  # all begin together
        began_at = time.monotonic()
        group.from_rank(rank, numbers)
        if group.device.type == "cuda":
            torch.cuda.synchronize(group.device)
        mine.append(time.monotonic() - began_at)
    seen = group.gather_numbers(mine)
    everyone = range(group.size)
    return [
        sum(seen[other][rank] + seen[rank][other] for other in everyone if other != rank) / (2 * (group.size - 1))
        for rank in everyone
    ]


def _whole_seconds(network: Network, rectangle: Rectangle, dtype: torch.dtype, device: torch.device) -> float:
    blocks = len(network.blocks)
    few = min(FEW_BLOCKS, blocks)
    if few < 2:
        return _seconds(network, rectangle, few, dtype, device)
    one = _seconds(network, rectangle, 1, dtype, device)
    more = _seconds(network, rectangle, few, dtype, device)
    each = max(more - one, 0.0) / (few - 1)
    return one + (blocks - 1) * each


def _seconds(network: Network, rectangle: Rectangle, blocks: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of forward and backward through the first `blocks` blocks and all that is no block."""
    with shortened(network, blocks):
        stand_in = StandIn(network, dtype, device)
        best = float("inf")
        for _ in range(2):
            _settle(device)
            began_at = time.perf_counter()
            stand_in.loss(rectangle).backward()
            _settle(device)
            best = min(best, time.perf_counter() - began_at)
            for leaf in stand_in.trained.values():
                leaf.grad = None
    return best


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
