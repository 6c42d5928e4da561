"""Who gets how much of a training run: the batch by speed, the state by speed and memory.

Machines differ, and an even split makes all of them wait for the slowest and hold what the smallest can. Here each
worker gets the part of the batch that lets all finish together, and the part of the state (parameters, gradients,
optimizer) that its memory allows. The two cuts are independent: a small, fast worker may compute much and keep nothing.

After Cephalo (Guo et al., 2025, arXiv 2411.01075), which cuts batch and state apart, Poplar (2025, arXiv 2408.12596),
which cuts the batch by measured speed, and ZeRO (Rajbhandari et al., 2020, arXiv 1910.02054), whose third stage is the
case of equal shares. Pure, and the same on every rank: equal numbers give equal plans, ties go to the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil, isfinite
from typing import Any, Self

from fastserve.plan.facts import TrainingFacts, WorkerFacts
from fastserve.plan.footprint import footprint
from fastserve.plan.layout import Layout, refuse
from fastserve.plan.split import WHOLE, shares_of, split_batch, split_state

__all__ = ["SharePlan", "TrainingFacts", "WorkerFacts", "plan_shares", "replan", "split_batch", "split_state"]


@dataclass(frozen=True, slots=True)
class SharePlan:
    """What each worker does and keeps. Every sequence has one item a worker, in the order of `workers`."""

    workers: tuple[WorkerFacts, ...]
    facts: TrainingFacts
    batch_tokens: int
    """Tokens in one optimizer step, over all workers."""

    batch: tuple[float, ...]
    """Shares of the batch; they sum to 1 exactly."""

    state: tuple[float, ...]
    """Shares of the state; they sum to 1 exactly. 0: the worker computes and keeps nothing."""

    micro_tokens: tuple[int, ...]
    """Most tokens that a worker computes at once."""

    micro_batches: int
    """Micro-batches in a step, the same for all workers; an estimate, since samples are not cut."""

    frozen_whole: bool
    """Whether every worker keeps all frozen weights; False: they are cut like the state."""

    step_seconds: float
    """Predicted: the slowest worker's computation, and the exchange."""

    peak_bytes: tuple[int, ...]
    """Predicted most memory of a worker within a step, its process included."""

    kept_bytes: tuple[int, ...]
    """State and frozen weights that a worker keeps between steps."""

    because: str
    exchange_seconds: float = 0.0
    """Seconds of communication in one micro-batch that no computation hides, as far as known."""

    even: bool = False
    """Whether everything is shared evenly, whatever the speeds."""

    def tokens_at_once(self) -> tuple[int, ...]:
        """Most tokens of each worker's micro-batches, as far as can be foreseen: samples do not divide evenly."""
        return tuple(
            min(most, ceil(share * self.batch_tokens / self.micro_batches) + self.facts.longest_tokens)
            for share, most in zip(self.batch, self.micro_tokens, strict=True)
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Back from plain values."""
        tuples = ("batch", "state", "micro_tokens", "peak_bytes", "kept_bytes")
        return cls(
            **{
                **value,
                **{name: tuple(value[name]) for name in tuples},
                "workers": tuple(WorkerFacts(**worker) for worker in value["workers"]),
                "facts": TrainingFacts(**{**value["facts"], "ways": tuple(value["facts"]["ways"])}),
            }
        )


def plan_shares(
    workers: Sequence[WorkerFacts],
    facts: TrainingFacts,
    batch_tokens: int,
    *,
    exchange_seconds: float = 0.0,
    even: bool = False,
) -> SharePlan:
    """Share a training run over `workers`.

    batch_tokens: in one optimizer step, over all. exchange_seconds: of one micro-batch's communication, where it is
    known; it is added to the predicted step. even: everything in equal shares (`train.engine: fsdp2`).

    The fewest micro-batches are taken that leave room for the state. Frozen weights are whole on every worker where
    all have the room. Raises InsufficientMemory with a table and the shortfall when nothing fits.
    """
    speeds = [1.0] * len(workers) if even else [worker.tokens_per_s for worker in workers]
    batch = shares_of(split_batch(WHOLE, speeds), WHOLE)
    layouts = [Layout(workers, facts, batch_tokens, batch, speeds, even, whole) for whole in (True, False)]
    layout = next((layout for layout in layouts if layout.fits(layout.most_parts)), None)
    if layout is None:
        refuse(layouts[1] if facts.frozen_bytes else layouts[0])
    parts = layout.parts()
    state = shares_of(layout.kept(parts), layout.footprint.cut)
    plan = SharePlan(
        workers=tuple(workers),
        facts=facts,
        batch_tokens=batch_tokens,
        batch=batch,
        state=state,
        micro_tokens=layout.micro_tokens(state, parts),
        micro_batches=parts,
        frozen_whole=layout.whole,
        step_seconds=0.0,
        peak_bytes=(),
        kept_bytes=tuple(layout.footprint.kept(share) for share in state),
        because=_because(layout, parts),
        exchange_seconds=exchange_seconds,
        even=even,
    )
    return _predicted(plan)


def replan(plan: SharePlan, seconds_per_token: Sequence[float], gain: float = 0.05) -> SharePlan:
    """The plan with the batch shared anew by measured speed; the state stays where it is.

    seconds_per_token: busy seconds of each worker for one token, shape [workers]; where it is not a number above 0 (a
    worker that had nothing to do) the planned speed holds. gain: the least part of the predicted step's computation
    that a new split has to save. Returns `plan` itself where it saves less, or where everything is shared evenly.
    """
    measured = tuple(
        replace(worker, tokens_per_s=1 / seconds) if isfinite(seconds) and seconds > 0 else worker
        for worker, seconds in zip(plan.workers, seconds_per_token, strict=True)
    )
    if plan.even:
        return plan
    batch = shares_of(split_batch(WHOLE, [worker.tokens_per_s for worker in measured]), WHOLE)
    before = _computation(measured, plan.batch, plan.batch_tokens)
    if _computation(measured, batch, plan.batch_tokens) >= before * (1 - gain):
        return plan
    parts = max(ceil(share * plan.batch_tokens / most) for share, most in zip(batch, plan.micro_tokens, strict=True))
    return _predicted(replace(plan, workers=measured, batch=batch, micro_batches=max(1, parts)))


def _predicted(plan: SharePlan) -> SharePlan:
    """The plan with the time and the memory of a step."""
    facts = plan.facts
    needs = footprint(facts, len(plan.workers), plan.frozen_whole)
    peak = tuple(
        needs.peak(share, facts.activation_bytes_per_token * tokens)
        for share, tokens in zip(plan.state, plan.tokens_at_once(), strict=True)
    )
    seconds = _computation(plan.workers, plan.batch, plan.batch_tokens) + plan.micro_batches * plan.exchange_seconds
    return replace(plan, peak_bytes=peak, step_seconds=seconds)


def _computation(workers: Sequence[WorkerFacts], batch: Sequence[float], tokens: int) -> float:
    return max(share * tokens / worker.tokens_per_s for worker, share in zip(workers, batch, strict=True))


def _because(layout: Layout, parts: int) -> str:
    if layout.even:
        how = "The batch and the state are shared evenly, as train.engine: fsdp2 does"
    elif len(layout.workers) == 1:
        how = "One worker does everything"
    elif len(set(layout.speeds)) == 1 and layout.by_speed(parts):
        how = "The batch and the state are shared evenly, since all workers are taken to be equally fast"
    elif layout.by_speed(parts):
        how = "The batch and the state are shared by speed"
    else:
        how = "The batch is shared by speed, the state by speed as far as each worker's memory goes"
    if layout.facts.frozen_bytes:
        frozen = "every worker keeps the frozen weights whole" if layout.whole else "the frozen weights are cut as well"
        how += f"; {frozen}"
    return how + "."
