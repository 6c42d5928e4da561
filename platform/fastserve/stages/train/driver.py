"""The train stage: rows to samples, samples to a Ray Train run, its best or last checkpoint to a model.

The stage's own process is the driver. All that must survive it lies in the store: a new attempt at the same key finds
the newest checkpoint and goes on from there, or only exports when the last step was done.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastserve.artifacts.checkpoints import fetch_checkpoint
from fastserve.artifacts.describe import describe
from fastserve.errors import (
    AttemptFenced,
    InsufficientMemory,
    NotExecutable,
    Problem,
    StageFailed,
    StoreFull,
)
from fastserve.plan.brought import Kind, brought
from fastserve.plan.facts import ModelFacts
from fastserve.plan.keys import ident_of
from fastserve.plan.training import require_targets, training_facts
from fastserve.spec.train import Train
from fastserve.stages.train import news, scratch, state
from fastserve.stages.train.export import export
from fastserve.stages.train.machines import (
    Machines,
    machines,
    selectors,
    usable_places,
    worker_environment,
    worker_threads,
)
from fastserve.stages.train.network import read_config
from fastserve.stages.train.order import Order
from fastserve.stages.train.packing import require_packable
from fastserve.stages.train.pause import PAUSED
from fastserve.stages.train.size import Size, Sizes, Usable, listed
from fastserve.stages.train.task import Task
from fastserve.stages.train.tokens import CorpusRef, open_corpus, tokenised
from fastserve.stages.work import Outcome, Work

_LOG = logging.getLogger(__name__)

WORKER_RESTARTS = 3
"""Times that a group of workers of a fixed size is started anew within one attempt."""

ELASTIC_RESTARTS = 50
"""The same of an elastic run, which expects machines to come and go."""

_LOOK_EVERY_SECONDS = "1"
_START_SECONDS = "20"
"""Ray waits so long for a lost machine's place to be given out before it goes on with fewer (its default is 60 s)."""

_STARTS_AT_ONE_SIZE = 1
"""Times that an elastic group that finds no machines is tried again, before it is seen anew which there are."""

_NO_MACHINES = ("WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError")
"""Ray Train's errors of a group that could not be placed or started."""

_RESIZE_EVERY_SECONDS = 8.0
_COLLECTIVE_SECONDS = 300


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What a run trains, on what."""

    train: Train
    model: Path
    """Folder in Hugging Face layout; without weights for a model from scratch."""

    facts: ModelFacts
    corpus: CorpusRef
    validation: CorpusRef | None
    total_steps: int


def run(work: Work) -> Outcome:
    """Train `model/` of the input artifact on `spec.train.dataset`.

    Returns a folder with `model/`, for LoRA also `adapter/`, `curve.jsonl` and `curve.png`.

    Raises DatasetInvalid for rows that cannot be read or teach nothing, ManifestInvalid for targets that the model does
    not have, InsufficientMemory when no sharing fits the machines, StageFailed when training ended without its last
    step.
    """
    train = Train.model_validate(work.request.section)
    work.report.update(0, 1, "steps", note="reading rows")
    prepared = _prepare(work, train)
    total = prepared.total_steps
    done = state.newest(work.store, work.request)
    work.report.update(done, total, "steps", note="starting workers", rows=prepared.corpus.counts)
    work.report.close()
    began_at = time.monotonic()
    if done < total and not (done and _facts(work, done).extra.get("ended")):
        _train(work, prepared)
    trained_seconds = time.monotonic() - began_at
    work.report.update(total, total, "steps", note="writing the model")
    last = _facts(work, state.newest(work.store, work.request))
    chosen = last.best_step if train.validation is not None and last.best_step else last.step
    checkpoint = fetch_checkpoint(work.store, work.request.stage, work.request.key, chosen, work.scratch / "checkpoint")
    folder = work.scratch / "artifact"
    folder.mkdir()
    # The weights of the best step, the curve of all steps.
    title = f"{work.request.model}: training"
    best = replace(state.read_facts(checkpoint), curve=last.curve)
    export(prepared.model, best, state.read_parameters(checkpoint), folder, title=title)
    return Outcome(folder, _metrics(work, prepared, last, trained_seconds if not done else None))


def _prepare(work: Work, train: Train) -> _Prepared:
    """Everything before workers are started, so that what cannot work is refused before Ray is loaded."""
    source = work.input("model") / "model"
    data = work.data(train.dataset)
    if train.method == "scratch":
        model = scratch.prepare(source, data, train, work.scratch / "new")
        facts = scratch.facts_of(model, train)
    else:
        model = source
        facts = describe(source)
        require_targets(train, facts.layer_names)
    if train.packing:
        require_packable(read_config(model))
    digest = work.request.data[ident_of(train.dataset)]
    corpus = tokenised(work.store, data, digest, model, train, work.report, scratch=work.scratch)
    validation = None
    if train.validation is not None:
        held_out = train.validation.data
        validation = tokenised(
            work.store,
            work.data(held_out),
            work.request.data[ident_of(held_out)],
            model,
            train,
            work.report,
            scratch=work.scratch,
        )
    order = Order(open_corpus(work.store, corpus).lengths, train.batch_tokens, train.seed)
    return _Prepared(train, model, facts, corpus, validation, order.steps_of(train.epochs, train.steps))


def _train(work: Work, prepared: _Prepared) -> None:
    """Run the workers until the last step's checkpoint is in the store; in parts, where the run changes its size."""
    # Imported here: rows that teach nothing are refused before Ray is loaded.
    import ray

    # Read by Ray Train's controller, which takes the variables of this process over.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", _START_SECONDS)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _LOOK_EVERY_SECONDS)
    if not ray.is_initialized():
        ray.init(address="auto")
    train = prepared.train
    kinds = brought(os.environ)
    sizes = Sizes(work, train, _usable(train, machines(train, ray.nodes(), kinds).accelerated, kinds))
    with news.following(work, remark=lambda: sizes.now.note):
        for part in itertools.count(1):
            size = sizes.choose()
            with sizes.watching(part):
                ended = _part(work, prepared, size, part)
            if ended is _NOT_STARTED or (ended is not None and ended["reason"] == PAUSED):
                continue
            break
    raise_for(ended, prepared.total_steps)


def _usable(train: Train, accelerated: bool, kinds: Mapping[str, Kind]) -> Usable:
    """Places that this run has or could have, as Ray knows them now."""
    import ray
    from ray._private import state as ray_state
    from ray.exceptions import RayError

    def usable(held: Mapping[str, int]) -> Mapping[str, int] | None:
        try:
            return usable_places(
                listed(train), held, ray.nodes(), ray_state.available_resources_per_node(), accelerated, kinds
            )
        except RayError as error:
            _LOG.warning("which machines are free was not learnt: %s", error)
            return held  # no more than there is for sure

    return usable


_NOT_STARTED: Mapping[str, Any] = {"reason": "NotStarted"}
"""What a part returns whose machines could not be had."""


def _part(work: Work, prepared: _Prepared, size: Size, part: int) -> Mapping[str, Any] | None:
    """One Ray Train run; what its first worker returned, or _NOT_STARTED."""
    import ray
    from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    from fastserve.stages.train.worker import run_worker

    train, elastic, kinds = prepared.train, prepared.train.elastic, brought(os.environ)
    there = machines(train, ray.nodes(), kinds)
    threads = worker_threads(size.count, there.count, there.smallest)
    together = one_host(ray.nodes(), size.count if elastic is None or kinds else elastic.min_workers)
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={
            "task": task_of(work, prepared, there, threads, part),
            "corpus": prepared.corpus,
            "validation": prepared.validation,
        },
        torch_config=TorchConfig(backend="nccl" if there.accelerated else "gloo", timeout_s=_COLLECTIVE_SECONDS),
        scaling_config=ScalingConfig(
            num_workers=size.count if elastic is None else (min(elastic.min_workers, size.count), size.count),
            use_gpu=there.accelerated,
            resources_per_worker={"CPU": 1, **({"GPU": 1} if there.accelerated else {})},
            label_selector=selectors(train, size, kinds),
            elastic_resize_monitor_interval_s=_RESIZE_EVERY_SECONDS,
        ),
        run_config=RunConfig(
            name=f"train-{work.request.key[:12]}-{work.request.attempt}-{part}",
            storage_path=str(work.scratch / "ray_train"),
            failure_config=FailureConfig(
                max_failures=WORKER_RESTARTS if elastic is None else ELASTIC_RESTARTS,
                controller_failure_limit=-1 if elastic is None else _STARTS_AT_ONE_SIZE,
            ),
            worker_runtime_env={"env_vars": worker_environment(threads, one_machine=together)},
        ),
    )
    try:
        ended: Mapping[str, Any] | None = trainer.fit().return_value
        return ended
    except ControllerError as error:
        if elastic is not None and type(error.controller_failure).__name__ in _NO_MACHINES:
            return _NOT_STARTED
        raise _broken_off(work, error) from error
    except TrainingFailedError as error:
        raise _broken_off(work, error) from error


def _broken_off(work: Work, error: BaseException) -> StageFailed:
    cause = _first_cause(error)
    return StageFailed(f"training broke off: {cause}; see `fastserve logs {work.request.model} train`")


def task_of(work: Work, prepared: _Prepared, there: Machines, threads: int, part: int) -> Task:
    """What the workers are told."""
    train = prepared.train
    longest = max(prepared.corpus.longest, prepared.validation.longest if prepared.validation else 0)
    facts = replace(
        training_facts(prepared.facts, train, accelerated=there.accelerated), longest_tokens=prepared.corpus.longest
    )
    return Task(
        work.store.uri,
        work.request,
        train,
        prepared.total_steps,
        threads,
        state.tokenizer_digest(prepared.model),
        longest,
        facts,
        config=scratch.config_of(prepared.model) if train.method == "scratch" else None,
        part=part,
    )


def one_host(nodes: Sequence[Mapping[str, Any]], workers: int) -> bool:
    """Whether so many workers are on one machine, where loopback is enough.

    nodes: `ray.nodes()`. Where the one that is there has too few CPUs (a head that computes nothing has none), others
    will be brought for them.
    """
    alive = [node for node in nodes if node.get("Alive")]
    places = sum(int(node.get("Resources", {}).get("CPU", 0)) for node in alive)
    return len({node.get("NodeManagerAddress") for node in alive}) <= 1 and places >= workers


def _first_cause(error: BaseException) -> str:
    """The deepest cause in one line; Ray wraps a worker's error several times."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = next(iter(failures.values()))
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def raise_for(ended: Mapping[str, Any] | None, total_steps: int) -> None:
    """Raise what the workers returned as the end of their run, unless that was the last step."""
    if ended is None:
        raise StageFailed("the workers ended without a word; see the stage's log")
    if ended["reason"] == "NotExecutable":
        raise NotExecutable([Problem("spec.train", ended["message"])])
    known = {kind.__name__: kind for kind in (AttemptFenced, StoreFull, InsufficientMemory)}
    if ended["reason"]:
        raise known.get(ended["reason"], StageFailed)(ended["message"])
    if ended["step"] != total_steps and not ended["early"]:
        raise StageFailed(f"training ended at step {ended['step']} of {total_steps}; run `fastserve up` again")


def _facts(work: Work, step: int) -> state.RunState:
    """What the checkpoint of `step` says beside its tensors."""
    if not step:
        raise StageFailed("training ended and left no checkpoint; run `fastserve up` again")
    folder = fetch_checkpoint(
        work.store,
        work.request.stage,
        work.request.key,
        step,
        work.scratch / f"facts-{step}-{time.monotonic_ns()}",
        only=[state.FACTS],
    )
    return state.read_facts(folder)


def _metrics(work: Work, prepared: _Prepared, last: state.RunState, seconds: float | None) -> dict[str, Any]:
    """For the record. seconds: of an undisturbed run alone; what was done before a restart was not timed."""
    tokens = sum(row["tokens"] for row in last.curve)
    measured = last.best_loss is not None
    told = news.last(work.store, work.request)
    kept = ("proof", "plan", "workers", "replans", "restarts", "lostSteps")
    return {
        "steps": last.step,
        "workers": prepared.train.worker_count,
        "tokens": tokens,
        "trainedTokens": sum(row["trainedTokens"] for row in last.curve),
        "firstLoss": last.curve[0]["loss"],
        "finalLoss": last.curve[-1]["loss"],
        **({"validationLoss": last.best_loss, "bestStep": last.best_step} if measured else {}),
        **({"endedEarly": last.extra["ended"]} if "ended" in last.extra else {}),
        **({"tokensPerSecond": tokens / seconds} if seconds else {}),
        "rows": prepared.corpus.counts,
        **({"sharing": {name: told.metrics[name] for name in kept if name in told.metrics}} if told else {}),
    }
