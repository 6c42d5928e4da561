"""How fast unequal workers train together, against what they do alone and against FSDP2, in one interleaved run.

All engines and splits live in the same processes under the same quotas, and take turns round by round; a figure is the
median of the rounds' ratios. Wall seconds of this machine mean little beside other work, ratios inside a round do.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ranks import run_ranks
from tests.bench.cgroup import Quotas
from torch import nn

from fastserve.stages.train.corpus import Corpus
from fastserve.stages.train.fsdp2 import Fsdp2
from fastserve.stages.train.group import Group
from fastserve.stages.train.loop import loss_sum
from fastserve.stages.train.network import Network
from fastserve.stages.train.shard import Sharded

TOKENS = 32
"""Tokens of a sample."""

SAMPLES = 56
"""Samples of a step; 1,792 tokens."""

WARM_ROUNDS = 2
"""Before anything counts."""

NEWEST = 0.6
"""Weight of the newest round in what a rank needs for a sample, as in a run; a batch shared by speed is cut by that."""

VOCABULARY = 4096
LEARNING_RATE = 1e-3
SOLO_SECONDS = 1.5


@dataclass(frozen=True, slots=True)
class Contest:
    """What takes turns."""

    cores: tuple[float, ...]
    """Quota of each rank, in cores."""

    entries: tuple[tuple[str, str, str], ...]
    """(engine, how the batch is shared, how the state is shared).

    Engines: `sharded`, `sharded, sent` (without shared memory, as between machines), `fsdp2`. Shares: even or speed.
    """

    rounds: int = 4
    steps: int = 3


@dataclass(frozen=True, slots=True)
class Rounds:
    """What came of it; one entry a round."""

    solo: list[list[float]]
    """Samples/s of each rank computing alone, shape [rounds][ranks]."""

    seconds: dict[tuple[str, str, str], list[float]]
    """Seconds of a step, by entry."""

    busy: dict[tuple[str, str, str], list[list[float]]]
    """Seconds of a step outside collectives, by entry, shape [rounds][ranks]."""

    def of_ideal(self, entry: tuple[str, str, str]) -> float:
        """Median share of the ideal, which is the sum of what all ranks do alone in the same round."""
        return statistics.median(
            SAMPLES / seconds / sum(solo) for seconds, solo in zip(self.seconds[entry], self.solo, strict=True)
        )

    def against(self, entry: tuple[str, str, str], other: tuple[str, str, str]) -> float:
        """Median of how many times as fast as `other` the entry is."""
        pairs = zip(self.seconds[entry], self.seconds[other], strict=True)
        return statistics.median(theirs / ours for ours, theirs in pairs)

    def tokens_per_s(self, entry: tuple[str, str, str]) -> float:
        """Median over the rounds."""
        return SAMPLES * TOKENS / statistics.median(self.seconds[entry])


def contest(plan: Contest) -> Rounds:
    """Run `plan`; raises NoQuotas where this machine lets nobody set CPU quotas."""
    with Quotas() as quotas:
        for rank, cores in enumerate(plan.cores):
            quotas.limit(f"rank{rank}", cores)
        found: list[Rounds] = run_ranks(_turns, len(plan.cores), quotas, plan, timeout=420.0)
    return found[0]


def network(hidden: int = 256, layers: int = 4, vocabulary: int = VOCABULARY, tied: bool = False) -> Network:
    """A Llama of 5.2 million numbers (as sized by default), the same on every rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=int(hidden * 8 / 3) // 64 * 64,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64 or 1,
            num_key_value_heads=hidden // 64 or 1,
            max_position_embeddings=512,
            tie_word_embeddings=tied,
            attn_implementation="sdpa",
        )
    )
    model.train()
    blocks = [f"model.layers.{number}" for number in range(layers)]
    return Network(model, dict(model.named_parameters()), {"method": "full"}, blocks)


def corpus(samples: int, tokens: int = TOKENS, vocabulary: int = VOCABULARY, seed: int = 0) -> Corpus:
    """Random samples of equal length, every token trained."""
    ids = np.random.default_rng(seed).integers(0, vocabulary, samples * tokens).astype(np.int32)
    return Corpus(ids=ids, trained=np.ones(len(ids), np.bool_), starts=np.arange(samples + 1, dtype=np.int64) * tokens)


def whole_counts(total: int, shares: Sequence[float]) -> list[int]:
    """`total` samples by shares, largest remainders first; shape [ranks], sums to `total`."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(number) for number in exact]
    by_rest = sorted(range(len(shares)), key=lambda rank: exact[rank] - counts[rank], reverse=True)
    for rank in by_rest[: total - sum(counts)]:
        counts[rank] += 1
    return counts


def one_step(engine: Any, texts: Corpus, samples: Sequence[int], trained_tokens: int) -> float:
    """One optimizer step of this rank's `samples`; returns the summed loss of this rank in nats."""
    engine.clear()
    loss = 0.0
    if samples:
        total = loss_sum(engine.model, texts.rectangle(samples))
        engine.backward(total)
        loss = total.item()
    else:
        engine.idle()
    engine.scale(1.0 / trained_tokens)
    engine.step(LEARNING_RATE, 1.0)
    return loss


def _turns(quotas: Quotas, plan: Contest) -> Rounds:
    group = Group.current()
    gc.disable()
    gc.freeze()
    texts = corpus(SAMPLES)
    alone = network().model
    quotas.join(f"rank{group.rank}")
    solo = _solo(alone, texts, group)
    engines = {entry: _engine(entry, solo, group) for entry in plan.entries}
    rounds = Rounds([], {entry: [] for entry in plan.entries}, {entry: [] for entry in plan.entries})
    needs = {entry: [1.0 / speed for speed in solo] for entry in plan.entries}
    for number in range(-WARM_ROUNDS, plan.rounds):
        solo = _solo(alone, texts, group)
        if number >= 0:
            rounds.solo.append(solo)
        # Every other round the other way round: what comes after what must favour nobody.
        for entry in plan.entries if number % 2 else reversed(plan.entries):
            counts = _counts(entry, needs[entry])
            seconds, busy = _turn(engines[entry], texts, counts, group, plan.steps)
            fresh = [taken / count for taken, count in zip(busy, counts, strict=True)]
            weight = 1.0 if number == -WARM_ROUNDS else NEWEST
            needs[entry] = [weight * new + (1 - weight) * old for new, old in zip(fresh, needs[entry], strict=True)]
            if number >= 0:
                rounds.seconds[entry].append(seconds)
                rounds.busy[entry].append(busy)
            gc.collect()
    quotas.leave()
    return rounds


def _counts(entry: tuple[str, str, str], needs: Sequence[float]) -> list[int]:
    """needs: seconds of a sample, by rank."""
    return whole_counts(SAMPLES, [1.0 / need if entry[1] == "speed" else 1.0 for need in needs])


def _engine(entry: tuple[str, str, str], solo: Sequence[float], group: Group) -> Any:
    name, _, state = entry
    if name == "fsdp2":
        return Fsdp2(network(), [1.0 / group.size] * group.size, group)
    shares = [speed / sum(solo) for speed in solo] if state == "speed" else [1.0 / group.size] * group.size
    return Sharded(network(), shares, group, neighbours=name == "sharded")


def _turn(engine: Any, texts: Corpus, counts: Sequence[int], group: Group, steps: int) -> tuple[float, list[float]]:
    """Seconds of a step, the slowest rank's; and each rank's seconds outside collectives."""
    first = sum(counts[: group.rank])
    mine = list(range(first, first + counts[group.rank]))
    trained = texts.trained_tokens(range(SAMPLES)) - SAMPLES
    dist.barrier()
    began, inside = time.perf_counter(), 0.0
    for _ in range(steps):
        one_step(engine, texts, mine, trained)
        inside += engine.collective_seconds
    own = time.perf_counter() - began
    dist.barrier()
    return (time.perf_counter() - began) / steps, _each((own - inside) / steps, group)


def _solo(model: nn.Module, texts: Corpus, group: Group) -> list[float]:
    """Samples/s of each rank that computes forward and backward alone, without optimizer and exchange."""
    dist.barrier()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < SOLO_SECONDS or not done:
        loss_sum(model, texts.rectangle(range(8))).backward()
        done += 8
    own = done / (time.perf_counter() - began)
    model.zero_grad()
    dist.barrier()
    return _each(own, group)


def _each(number: float, group: Group) -> list[float]:
    numbers = [torch.zeros(1, dtype=torch.float64) for _ in range(group.size)]
    dist.all_gather(numbers, torch.tensor([number], dtype=torch.float64))
    return [float(found) for found in numbers]
