"""What the first worker tells of a run: progress with its figures, and the curve while it grows."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from fastserve.artifacts import attempts
from fastserve.artifacts.store import Store
from fastserve.errors import StoreFailed
from fastserve.plan.shares import SharePlan
from fastserve.stages.train import news
from fastserve.stages.train.group import Group
from fastserve.stages.train.meter import Meter
from fastserve.stages.train.start import Started
from fastserve.stages.train.state import RunState
from fastserve.stages.train.task import Task
from fastserve.telemetry import curve
from fastserve.telemetry.progress import Reporter

CURVE_EVERY_SECONDS = 5.0
_LOG = logging.getLogger(__name__)


class Reports:
    """On the first worker; on the others nothing happens."""

    def __init__(self, store: Store, task: Task, group: Group, started: Started) -> None:
        self._store, self._task, self._started = store, task, started
        if group.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(group.device)  # what the probe and the proof took is no part of a step
        self._reporter = Reporter(partial(news.tell, store, task.request)) if group.rank == 0 else None
        self.memory: list[int] = []
        """Bytes that each rank uses."""

        self.replans = 0
        self._kept = group.gather_numbers([started.engine.kept_bytes])
        self._tokens = 0
        self._began_at = time.monotonic()
        self._curve_at = 0.0
        self._fixed: dict[str, Any] = {}

    def begun(self, run: RunState) -> None:
        """The first step is about to be taken; a group before this one may have got further."""
        if self._reporter is None:
            return
        before = news.last(self._store, self._task.request)
        restarts, lost = 0, 0
        if before is not None:
            restarts = int(before.metrics.get("restarts", 0)) + 1
            lost = int(before.metrics.get("lostSteps", 0)) + max(0, int(before.done) - run.step)
        self._fixed = {"restarts": restarts, "lostSteps": lost}
        if self._started.proof is not None:
            self._fixed["proof"] = self._started.proof.to_json()
        elif before is not None and "proof" in before.metrics:
            self._fixed["proof"] = before.metrics["proof"]
        self._began_at = time.monotonic()
        self._update(run, {**self._fixed, "plan": self._planned(self._started.plan, None)})
        self._write_curve(run)

    def step(self, run: RunState, row: Mapping[str, Any], plan: SharePlan, meter: Meter) -> None:
        """A step was taken."""
        if self._reporter is None:
            return
        self._tokens += row["tokens"]
        slow = meter.slow()
        told: dict[str, Any] = {
            **self._fixed,
            "loss": row["loss"],
            "learningRate": row["learningRate"],
            "tokensPerSecond": self._tokens / (time.monotonic() - self._began_at),
            "plan": self._planned(plan, meter),
            "workers": self._workers(plan, meter),
            "slow": None if slow is None else slow.to_json(),
            "replans": self.replans,
        }
        if "validationLoss" in row:
            told["validationLoss"] = row["validationLoss"]
        self._update(run, told)
        if time.monotonic() - self._curve_at > CURVE_EVERY_SECONDS:
            self._write_curve(run)

    def close(self, run: RunState) -> None:
        """The last step was taken."""
        if self._reporter is not None:
            self._reporter.close()
            self._write_curve(run)

    def _update(self, run: RunState, metrics: Mapping[str, Any]) -> None:
        if self._reporter is not None:
            self._reporter.update(run.step, self._task.total_steps, "steps", "training", **metrics)

    def _planned(self, plan: SharePlan, meter: Meter | None) -> dict[str, Any]:
        """Predicted against measured. A plan from speeds that are only relative predicts nothing."""
        measured = meter.step_seconds if meter is not None else float("nan")
        predicted = plan.step_seconds if self._started.measured or self.replans else None
        found: dict[str, Any] = {"stepSeconds": predicted, "microBatches": plan.micro_batches, "because": plan.because}
        if measured == measured:
            found["measuredSeconds"] = measured
            if predicted is not None:
                found["error"] = predicted / measured - 1
        return found

    def _workers(self, plan: SharePlan, meter: Meter) -> list[dict[str, Any]]:
        seconds, idle = meter.seconds_per_token, meter.idle_shares()
        return [
            {
                "rank": rank,
                "profile": worker.profile,
                "batchShare": plan.batch[rank],
                "stateShare": plan.state[rank],
                "tokensPerSecond": 1 / seconds[rank] if seconds[rank] > 0 else None,
                "memoryBytes": self.memory[rank] if self.memory else None,
                "plannedBytes": plan.peak_bytes[rank],
                "keptBytes": int(self._kept[rank][0]),
                "plannedKeptBytes": plan.kept_bytes[rank],
                "idleShare": idle[rank],
            }
            for rank, worker in enumerate(plan.workers)
        ]

    def _write_curve(self, run: RunState) -> None:
        self._curve_at = time.monotonic()
        try:
            attempts.write_curve(self._store, self._task.request, curve.dumped(curve.thinned(run.curve)))
        except StoreFailed as error:
            _LOG.warning("the curve was not written: %s", error)
