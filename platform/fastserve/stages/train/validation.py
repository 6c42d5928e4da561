"""The loss on held-out rows, over all workers: when it no longer falls, more steps only learn the rows by heart."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastserve.plan.shares import SharePlan
from fastserve.stages.train.corpus import Corpus
from fastserve.stages.train.division import divide
from fastserve.stages.train.engine import Engine
from fastserve.stages.train.group import Group
from fastserve.stages.train.loop import loss_sum
from fastserve.stages.train.order import Batch
from fastserve.stages.train.standin import without_dropout
from fastserve.stages.train.start import rectangle
from fastserve.stages.train.state import RunState

_BATCH_TOKENS = 1 << 16
"""Tokens that are divided at once, so that memory does not grow with the rows."""


def validation_loss(
    engine: Engine, corpus: Corpus, group: Group, plan: SharePlan, micro_tokens: list[int], packed: bool
) -> float:
    """Sum of the token losses of all samples, divided by their trained tokens, in nats. Collective."""
    total, trained = 0.0, 0
    with without_dropout(engine.model), torch.no_grad():
        for samples in _pieces(corpus):
            trained += corpus.trained_tokens(samples)
            division = divide(Batch(0, tuple(samples)), corpus.lengths, plan.batch, micro_tokens, packed=packed)
            for mine in division[group.rank]:
                if mine:
                    total += float(loss_sum(engine.model, rectangle(corpus, mine, packed, group.device)))
                else:
                    engine.idle(backward=False)
    return sum(row[0] for row in group.gather_numbers([total])) / max(1, trained)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a validation loss says of the run."""

    best: bool
    """Whether it is the lowest so far."""

    stop: bool


def judge(run: RunState, loss: float, patience: int | None) -> Verdict:
    """Take the loss after `run.step` steps into `run`; stop after `patience` losses in a row without a new lowest."""
    if loss == loss and (run.best_loss is None or loss < run.best_loss):
        run.best_loss, run.best_step = loss, run.step
        run.extra["withoutProgress"] = 0
        return Verdict(True, False)
    worse = int(run.extra.get("withoutProgress", 0)) + 1
    run.extra["withoutProgress"] = worse
    return Verdict(False, patience is not None and worse >= patience)


def _pieces(corpus: Corpus) -> list[list[int]]:
    pieces: list[list[int]] = [[]]
    tokens = 0
    for sample, length in enumerate(corpus.lengths):
        if pieces[-1] and tokens + int(length) > _BATCH_TOKENS:
            pieces.append([])
            tokens = 0
        pieces[-1].append(sample)
        tokens += int(length)
    return pieces
