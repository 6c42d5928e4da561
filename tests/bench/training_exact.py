"""Gradients, losses and memory of uneven splits against one process that has everything.

One process computes the whole batch with plain torch and torch's AdamW; the ranks compute it in pieces with the state
cut unevenly. Both in fp32. Memory is what the engine says it keeps, and what the process really grew by.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path

import engine_models as tiny
import torch
import torch.distributed as dist
from ranks import run_ranks
from tests.bench.figure import Figure

from fastserve.stages.train.group import Group
from fastserve.stages.train.shard import Sharded

SPLITS: dict[str, tuple[tuple[float, ...], tuple[tuple[int, ...], ...]]] = {
    "state 1:3:6, batch 3,7,14": ((1, 3, 6), ((3, 7, 14),)),
    "state 0:1:3, batch 3,7,14": ((0, 1, 3), ((3, 7, 14),)),
    "state 1:1:1, batch 8,8,8": ((1, 1, 1), ((8, 8, 8),)),
    "state 5:1:1, three micro-batches, some empty": ((5, 1, 1), ((1, 3, 5), (0, 4, 4), (2, 0, 5))),
}
"""Shares of the state, and samples by micro-batch and rank; 24 samples each."""

STEPS = 20
LEARNING_RATE = 1e-3
MODEL = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4}
MEMORY_SHARES = (1, 2, 7)


def rows() -> Iterator[Figure]:
    """Figures of all splits; about half a minute."""
    losses, gradients = _alone()
    for name, (shares, counts) in SPLITS.items():
        told = run_ranks(lambda shares=shares, counts=counts: _ranks(shares, counts), 3)
        summed = [sum(parts) for parts in zip(*(losses for losses, _ in told), strict=True)]
        error = tiny.difference(told[0][1], gradients)
        apart = max(abs(a - b) for a, b in zip(summed, losses, strict=True))
        yield Figure(f"gradient, {name}", error, "relative", "<= 1e-06", error <= 1e-6)
        yield Figure(f"{STEPS}-step loss, {name}", apart, "nats a token", "<= 2e-06", apart <= 2e-6)
    numbers = 0
    for rank, (numbers, kept, grown) in enumerate(run_ranks(_memory, 3)):
        planned = 16 * numbers * MEMORY_SHARES[rank] / sum(MEMORY_SHARES)
        off = max(abs(kept - planned), abs(grown - planned)) / planned
        yield Figure(
            f"memory kept, shares 1:2:7, rank {rank}: {grown / 1e6:.1f} MB of {planned / 1e6:.1f} planned",
            off,
            "share off",
            "<= 0.02",
            off <= 0.02,
        )


def _batches() -> list[torch.Tensor]:
    return [tiny.samples(24, length=24, seed=step) for step in range(STEPS)]


def _alone() -> tuple[list[float], dict[str, torch.Tensor]]:
    """Mean losses of all steps, and the first step's gradient by name."""
    network = tiny.full(**MODEL)
    optimizer = torch.optim.AdamW(network.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    losses: list[float] = []
    first: dict[str, torch.Tensor] = {}
    for ids in _batches():
        optimizer.zero_grad()
        loss = tiny.loss_of(network.model, ids) / tiny.trained_tokens(ids)
        loss.backward()
        losses.append(loss.item())
        first = first or {name: p.grad.clone() for name, p in network.model.named_parameters() if p.grad is not None}
        torch.nn.utils.clip_grad_norm_(network.model.parameters(), 1.0)
        optimizer.step()
    return losses, first


def _ranks(shares: Sequence[float], counts: Sequence[Sequence[int]]) -> tuple[list[float], dict[str, torch.Tensor]]:
    rank = dist.get_rank()
    engine = Sharded(tiny.full(**MODEL), shares, Group.current())
    losses: list[float] = []
    first: dict[str, torch.Tensor] = {}
    for ids in _batches():
        engine.clear()
        losses.append(tiny.accumulate(engine, tiny.micro_batches(ids, counts, rank)) / tiny.trained_tokens(ids))
        engine.scale(1 / tiny.trained_tokens(ids))
        first = first or engine.gathered("gradients")
        engine.step(LEARNING_RATE, 1.0)
    return losses, first if rank == 0 else {}


def _memory() -> tuple[int, int, int]:
    """Numbers of the model, bytes that the engine says it keeps, bytes that the process grew by."""
    began_at = numbers = kept = grown = 0
    for _ in range(2):  # the first leaves behind what a process has once: code, buffers of the network
        _trim()
        began_at = _resident_bytes()
        network = tiny.full(hidden_size=512, intermediate_size=1024, vocab_size=8192)
        numbers = sum(parameter.numel() for parameter in network.trained.values())
        # As on machines of their own: what neighbours share would be counted by each of them.
        engine = Sharded(network, MEMORY_SHARES, Group.current(), neighbours=False)
        for ids in _batches()[:2]:
            engine.clear()
            tiny.accumulate(engine, tiny.micro_batches(ids, [(3, 7, 14)], dist.get_rank()))
            engine.scale(1 / tiny.trained_tokens(ids))
            engine.step(LEARNING_RATE, 1.0)
        _trim()
        kept, grown = engine.kept_bytes, _resident_bytes() - began_at
        del network, engine
    return numbers, kept, grown


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _trim() -> None:
    """Have the C library give back what is free."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
