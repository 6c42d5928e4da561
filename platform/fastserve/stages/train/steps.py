"""The steps of a run, from wherever it stands to its last one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from fastserve.artifacts.store import Store
from fastserve.plan.shares import SharePlan, replan
from fastserve.stages.train.corpus import Corpus
from fastserve.stages.train.division import ROUND_COST, divide
from fastserve.stages.train.group import Group
from fastserve.stages.train.loop import loss_sum
from fastserve.stages.train.meter import Meter, Times, Watch
from fastserve.stages.train.order import Batch, Order
from fastserve.stages.train.pause import PAUSED
from fastserve.stages.train.place import used_bytes
from fastserve.stages.train.probe import link_seconds
from fastserve.stages.train.reports import Reports
from fastserve.stages.train.saving import Saver
from fastserve.stages.train.scaler import LossScale
from fastserve.stages.train.schedule import learning_rate
from fastserve.stages.train.start import Started, rectangle
from fastserve.stages.train.task import Ended, NotFinite, Task
from fastserve.stages.train.validation import judge, validation_loss

GAIN = 0.05
"""Least part of a step's computation that new shares have to save."""

IN_A_ROW = 2
"""Steps one after the other that have to say so."""

LEAST_ROUND_COST = 0.01
"""Less than this is nothing that was measured."""

NOTICE_EVERY_SECONDS = 5.0
"""How often the workers ask Ray together whether a machine is about to be taken away."""

_LOSS, _GRADIENT, _WALL, _DATA, _COLLECTIVE, _TOKENS, _PIECES, _OPTIMIZER, _MEMORY, _FAULT, _ASK, _PAUSE = range(12)


class Run:
    """One worker's steps. Every method is called by all workers alike."""

    def __init__(
        self,
        store: Store,
        task: Task,
        corpus: Corpus,
        held_out: Corpus | None,
        group: Group,
        started: Started,
        saver: Saver,
        notice: Callable[[], bool] | None = None,
        paused: Callable[[], bool] = lambda: False,
    ) -> None:
        """held_out: samples of train.validation. notice: whether this run's machines are about to be taken away;
        collective. paused: whether this worker knows that all shall stop after the step."""
        self.task, self.corpus, self.held_out, self.group, self.saver = task, corpus, held_out, group, saver
        self.engine, self.run = started.engine, started.run
        self.plan: SharePlan = started.plan
        self.scale = LossScale.of(task.train.precision, self.run.loss_scale, self.run.extra)
        self.meter = Meter(started.paces, trusted=started.measured)
        self.reports = Reports(store, task, group, started)
        self._notice, self._paused = notice, paused
        self._noticed = False
        self._asked_at = time.monotonic()
        self._optimizer_seconds = 0.0
        self._worth_it = 0
        self._round_cost = round_cost(started)

    def to_end(self, on_step: Callable[[Mapping[str, Any]], None]) -> Ended:
        """Steps until the last, or until validation no longer improves.

        Raises NotFinite, and what Saver raises.
        """
        total = self.task.total_steps
        if "ended" in self.run.extra:
            return Ended(self.run.step, early=True)
        order = Order(self.corpus.lengths, self.task.train.batch_tokens, self.task.train.seed)
        self.reports.begun(self.run)
        for batch in order.since(self.run.step):
            if self.run.step >= total:
                break
            row = self._step(batch)
            stop = self._validate(row)
            self.run.curve.append(row)
            self.reports.step(self.run, row, self.plan, self.meter)
            on_step(row)
            if stop:
                self.run.extra["ended"] = f"validation has not improved since step {self.run.best_step}"
            self._save_when_due(stop or self._stopping)
            if stop or self._stopping:
                break
        self.saver.wait()
        self.reports.close(self.run)
        early = "ended" in self.run.extra
        return Ended(
            self.run.step, PAUSED if self._stopping and not early and self.run.step < total else "", early=early
        )

    # -- one step ------------------------------------------------------------------------------------------------

    def _step(self, batch: Batch) -> dict[str, Any]:
        train, step = self.task.train, self.run.step
        while True:
            # Drawn anew each step, so that dropout after a restart is what it would have been.
            torch.manual_seed(hash((train.seed, step, self.group.rank)) % 2**63)
            told = self._accumulate(batch)
            overflow = self._overflowed(told)
            self._look_at_times(told)
            if not overflow:
                break
        began_at = time.perf_counter()
        trained_tokens = self.corpus.trained_tokens(batch.samples)
        self.engine.scale(1.0 / (trained_tokens * self.scale.factor))
        rate = learning_rate(step, self.task.total_steps, train.learning_rate, train.schedule, train.warmup_steps)
        self.engine.step(rate, train.clip_norm)
        self._optimizer_seconds = time.perf_counter() - began_at
        self.scale.stepped()
        self.run.step += 1
        self.run.loss_scale, self.run.extra["goodSteps"] = self.scale.factor, self.scale.good_steps
        return {
            "step": self.run.step,
            "loss": sum(row[_LOSS] for row in told) / trained_tokens,
            "tokens": self.corpus.tokens(batch.samples),
            "trainedTokens": trained_tokens,
            "learningRate": rate,
        }

    def _accumulate(self, batch: Batch) -> list[list[float]]:
        """Forward and backward of this rank's part; what every rank has to say of it, by rank."""
        watch = Watch(self.group.device)
        self.engine.clear()
        packed = self.task.train.packing
        division = divide(
            batch,
            self.corpus.lengths,
            self.plan.batch,
            self._micro_tokens(),
            packed=packed,
            round_cost=self._round_cost,
        )
        loss = 0.0
        for samples in division[self.group.rank]:
            if not samples:
                self.engine.idle()
                continue
            with watch.fetching():
                piece = rectangle(self.corpus, samples, packed, self.group.device)
            total = loss_sum(self.engine.model, piece)
            self.engine.backward(total * self.scale.factor)
            loss += total.item()
        finite = self.engine.finite()
        tokens = sum(self.corpus.tokens(samples) for samples in division[self.group.rank] if samples)
        ask = self._notice is not None and time.monotonic() - self._asked_at > NOTICE_EVERY_SECONDS
        mine = {
            _LOSS: loss,
            _GRADIENT: float(finite),
            _WALL: watch.seconds(),
            _DATA: watch.data,
            _COLLECTIVE: self.engine.collective_seconds,
            _TOKENS: tokens,
            _PIECES: sum(1 for samples in division[self.group.rank] if samples),
            _OPTIMIZER: self._optimizer_seconds,
            _MEMORY: used_bytes(self.group),
            _FAULT: self.saver.fault_code,
            _ASK: float(ask),
            _PAUSE: float(self._paused()),
        }
        self._optimizer_seconds = 0.0
        return self.group.gather_numbers([mine[place] for place in sorted(mine)])

    def _micro_tokens(self) -> list[int]:
        return [
            max(1, min(most, worker.most_tokens or most))
            for most, worker in zip(self.plan.micro_tokens, self.plan.workers, strict=True)
        ]

    def _overflowed(self, told: list[list[float]]) -> bool:
        """Whether the batch is to be computed again with a smaller scale. Raises NotFinite for all else that is not a
        number."""
        step = self.run.step + 1
        losses = [rank for rank, row in enumerate(told) if not math.isfinite(row[_LOSS])]
        gradients = [rank for rank, row in enumerate(told) if not row[_GRADIENT]]
        if losses:
            raise NotFinite(step, f"the loss is not a finite number at step {step} on rank {_listed(losses)}")
        if gradients and not self.scale.overflowed():
            # The losses are fine, so nobody knows whose part of the sum it was.
            seen = f"seen in the slice of rank {_listed(gradients)}"
            raise NotFinite(step, f"the gradient is not a finite number at step {step}, {seen}")
        return bool(gradients)

    def _look_at_times(self, told: list[list[float]]) -> None:
        """Take what all workers say of the step: new shares where they pay, a checkpoint's fault, a notice."""
        measured = (_WALL, _DATA, _COLLECTIVE, _TOKENS, _PIECES, _OPTIMIZER)
        times = [Times(*(row[place] for place in measured)) for row in told]
        self.meter.take(times)
        self.reports.memory = [int(row[_MEMORY]) for row in told]
        if self.meter.wants_a_look_at_the_network():
            self.meter.take_links(link_seconds(self.group))
        self._replan()
        self._stopping = any(row[_PAUSE] for row in told)
        if any(row[_FAULT] for row in told):
            self.saver.check()
        if self._notice is not None and any(row[_ASK] for row in told):
            self._asked_at = time.monotonic()
            noticed = self._notice()
            self._leaving, self._noticed = noticed and not self._noticed, noticed

    def _replan(self) -> None:
        """New shares of the batch where they pay, from the next step on."""
        seconds = self.meter.seconds_per_token
        if not any(value == value for value in seconds):
            return
        each = self.meter.exchange_seconds / max(1, self.plan.micro_batches)
        measured = replace(self.plan, exchange_seconds=each)
        anew = replan(measured, seconds, GAIN)
        # One step may have been disturbed; two in a row are worth a change.
        self._worth_it = self._worth_it + 1 if anew is not measured else 0
        if self._worth_it >= IN_A_ROW:
            self.plan, self._worth_it = anew, 0
            self.reports.replans += 1

    _leaving = False
    """Whether a notice came that no checkpoint has answered yet."""

    _stopping = False
    """Whether all stop after this step."""

    # -- between steps -------------------------------------------------------------------------------------------

    def _validate(self, row: dict[str, Any]) -> bool:
        """Measure where it is due, into `row`; whether the run should end."""
        wanted = self.task.train.validation
        last = self.run.step == self.task.total_steps
        if wanted is None or self.held_out is None or not (last or self.run.step % wanted.every_steps == 0):
            return False
        packed = self.task.train.packing
        loss = validation_loss(self.engine, self.held_out, self.group, self.plan, self._micro_tokens(), packed)
        row["validationLoss"] = loss
        verdict = judge(self.run, loss, wanted.patience)
        return verdict.stop and not last

    def _save_when_due(self, stop: bool) -> None:
        run, every = self.run, self.task.train.checkpoint.every_steps
        due = run.step % every == 0 or run.step == self.task.total_steps or stop
        if due or run.best_step == run.step or self._leaving:
            self._leaving = False
            self.saver.save(self.engine.state(), run)


def round_cost(started: Started) -> float:
    """What one more micro-batch costs, as a share of a step: its exchange, and what any of them takes of a rank."""
    plan = started.plan
    if not started.measured or not plan.step_seconds:
        return ROUND_COST
    seconds = plan.exchange_seconds + max(pace.micro_batch_seconds for pace in started.paces)
    return min(1.0, max(LEAST_ROUND_COST, seconds / plan.step_seconds))


def _listed(ranks: list[int]) -> str:
    return ", ".join(str(rank) for rank in ranks)
