"""What each worker of a run does: load, go to the newest checkpoint, step until done.

Workers tell what happened by returning, not by raising, whenever trying again cannot help: Ray Train restarts a group
whose worker raises, which is right for a killed machine and wrong for a loss that is not a number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastserve.artifacts import attempts
from fastserve.artifacts.store import Store, open_store
from fastserve.errors import AttemptFenced, NotExecutable, StageFailed, StoreFailed, StoreFull
from fastserve.plan.stages import StageRequest
from fastserve.spec.train import Train
from fastserve.stages.train import state
from fastserve.stages.train.corpus import Corpus
from fastserve.stages.train.flat import FlatParameters
from fastserve.stages.train.group import Group
from fastserve.stages.train.loop import accumulate, exchange
from fastserve.stages.train.network import Network, load_network
from fastserve.stages.train.news import tell
from fastserve.stages.train.order import Order, micro_batches, share
from fastserve.stages.train.schedule import learning_rate
from fastserve.telemetry.progress import Reporter

_SAVED, _FENCED, _FULL, _FAILED = range(4)
_VERDICTS: Mapping[int, type[StoreFailed]] = {_FENCED: AttemptFenced, _FULL: StoreFull, _FAILED: StoreFailed}


@dataclass(frozen=True, slots=True)
class Task:
    """All that a worker is told."""

    store_uri: str
    request: StageRequest
    train: Train
    total_steps: int
    threads: int
    """Threads that a worker computes with."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a worker's run ended."""

    step: int
    """Optimizer steps done; -1 when an error ended it."""

    reason: str = ""
    """Class of the error that ended it; empty when all steps were done."""

    message: str = ""


def run_worker(config: Mapping[str, Any]) -> dict[str, Any]:
    """Entry of a Ray Train worker. config: `task` (a Task) and `corpus` (a reference to the Corpus in Ray's store)."""
    import ray

    task: Task = config["task"]
    torch.set_num_threads(task.threads)
    corpus: Corpus = ray.get(config["corpus"])
    store = open_store(task.store_uri)
    record = attempts.find(store, task.request.input_stages["model"], task.request.inputs["model"])
    if record is None:
        ended = Ended(0, "ArtifactNotFound", "the model to train is no longer in the store; run `fastserve up` again")
    else:
        # On this machine the store's own folder, else a copy in the cache; digests were checked by the driver.
        folder = attempts.fetch(store, record, verify=False) / "model"
        ended = train(store, task, corpus, folder, Group.current())
    return {"step": ended.step, "reason": ended.reason, "message": ended.message}


def train(
    store: Store,
    task: Task,
    corpus: Corpus,
    folder: Path,
    group: Group,
    on_step: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> Ended:
    """Train the model in `folder` from the newest checkpoint to the last step, on this worker of `group`.

    on_step: told each row of the curve as it is made.

    What all workers meet alike and would meet again is returned; what may have befallen one of them alone (a store that
    could not be reached, a checkpoint that came damaged) is raised, so that the whole group begins anew.
    """
    try:
        return _Run(store, task, corpus, load_network(folder, task.train, max(corpus.lengths)), group).to_end(on_step)
    except (StageFailed, NotExecutable, AttemptFenced, StoreFull) as error:
        return Ended(-1, error.reason, str(error))


class _Run:
    """One worker's run."""

    def __init__(self, store: Store, task: Task, corpus: Corpus, network: Network, group: Group) -> None:
        self.store, self.task, self.corpus, self.group = store, task, corpus, group
        self.model = network.model
        self.flat = FlatParameters(network.trained, task.train.weight_decay)
        self.order = Order(corpus.lengths, task.train.batch_tokens, task.train.seed)
        self.run = state.RunState(export=network.export)
        self.seen_tokens = 0
        self.began_at = time.monotonic()
        self.reporter = Reporter(partial(tell, store, task.request)) if group.rank == 0 else None

    def to_end(self, on_step: Callable[[Mapping[str, Any]], None]) -> Ended:
        """Steps until the last; a checkpoint every so many, and after the last."""
        self._take_up()
        every, total = self.task.train.checkpoint.every_steps, self.task.total_steps
        for batch in self.order.since(self.run.step):
            if self.run.step >= total:
                break
            row = self._step(batch)
            on_step(row)
            if self.run.step % every == 0 or self.run.step == total:
                self._save()
        if self.reporter is not None:
            self.reporter.close()
        return Ended(self.run.step)

    def _take_up(self) -> None:
        """Go to the newest checkpoint; which one that is, the first worker says for all."""
        self.group.from_first(self.flat.masters)
        step = self.group.number_from_first(state.newest(self.store, self.task.request) if self.group.rank == 0 else 0)
        if step:
            self.run = state.load(self.store, self.task.request, step, self.flat.state())
        self.flat.resume(self.run.step)
        self.began_at = time.monotonic()
        self._report("training")

    def _step(self, batch: Any) -> dict[str, Any]:
        train, step = self.task.train, self.run.step
        # Drawn anew each step, so that dropout after a restart is what it would have been.
        torch.manual_seed(hash((train.seed, step, self.group.rank)) % 2**63)
        mine = share(batch, self.order.lengths, self.group.size, self.group.rank)
        self.flat.clear()
        loss = accumulate(self.model, self.flat, self.corpus, micro_batches(mine, self.order.lengths))
        trained_tokens = self.corpus.trained_tokens(batch.samples)
        mean = exchange(self.flat, self.group, loss, trained_tokens, step)
        rate = learning_rate(step, self.task.total_steps, train.learning_rate, train.schedule, train.warmup_steps)
        self.flat.step(rate, train.clip_norm)
        self.run.step += 1
        tokens = sum(self.order.lengths[sample] for sample in batch.samples)
        row = {
            "step": self.run.step,
            "loss": mean,
            "tokens": tokens,
            "trainedTokens": trained_tokens,
            "learningRate": rate,
        }
        self.run.curve.append(row)
        self.seen_tokens += tokens
        speed = self.seen_tokens / (time.monotonic() - self.began_at)
        self._report("training", loss=mean, learningRate=rate, tokensPerSecond=speed)
        return row

    def _save(self) -> None:
        """The first worker saves; all learn how that went, so that none waits for a worker that is gone.

        Raises AttemptFenced, StoreFull or StoreFailed, on every worker.
        """
        verdict, message = _SAVED, ""
        if self.group.rank == 0:
            try:
                state.save(self.store, self.task.request, self.flat.state(), self.run, self.task.train.checkpoint.keep)
            except StoreFailed as error:
                kinds = (kind for kind, known in _VERDICTS.items() if isinstance(error, known))
                verdict, message = next(kinds, _FAILED), str(error)
        verdict = self.group.number_from_first(verdict)
        if verdict != _SAVED:
            raise _VERDICTS[verdict](message or "the first worker could not save a checkpoint")

    def _report(self, note: str, **metrics: Any) -> None:
        if self.reporter is not None:
            self.reporter.update(self.run.step, self.task.total_steps, "steps", note, **metrics)
