"""The train stage: rows to samples, samples to a Ray Train run, its last checkpoint to a model.

The stage's own process is the driver. All that must survive it lies in the store: a new attempt at the same key finds
the newest checkpoint and goes on from there, or only exports when the last step was done.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastserve.artifacts.checkpoints import fetch_checkpoint
from fastserve.artifacts.safetensors_header import check
from fastserve.artifacts.tokenizer import load_tokenizer
from fastserve.data.samples import SampleSet, samples
from fastserve.errors import (
    AttemptFenced,
    ManifestInvalid,
    NotExecutable,
    Problem,
    StageFailed,
    StoreFull,
)
from fastserve.spec.train import Train
from fastserve.stages.train import state
from fastserve.stages.train.export import export
from fastserve.stages.train.news import following
from fastserve.stages.train.order import Order
from fastserve.stages.work import Outcome, Work

WORKER_RESTARTS = 3
"""Times that a group of workers is started anew within one attempt."""

_LOOK_EVERY_SECONDS = "1"
_START_SECONDS = "20"
_COLLECTIVE_SECONDS = 300


def run(work: Work) -> Outcome:
    """Train `model/` of the input artifact on `spec.train.dataset`.

    Returns a folder with `model/`, for LoRA also `adapter/`, and `curve.jsonl`.

    Raises DatasetInvalid for rows that cannot be read or teach nothing, ManifestInvalid for targets that the model does
    not have, StageFailed when training ended without its last step.
    """
    train = Train.model_validate(work.request.section)
    work.report.update(0, 1, "steps", note="reading rows")
    source = work.input("model") / "model"
    if train.lora is not None:
        require_targets(source, train.lora.targets)
    sample_set = read_samples(source, work.data(train.dataset), train.max_length)
    order = Order([len(sample.ids) for sample in sample_set.samples], train.batch_tokens, train.seed)
    total_steps = order.steps_of(train.epochs, train.steps)
    done = state.newest(work.store, work.request)
    work.report.update(done, total_steps, "steps", note="starting workers")
    work.report.close()
    began_at = time.monotonic()
    if done < total_steps:
        _train(work, train, sample_set, total_steps)
    trained_seconds = time.monotonic() - began_at
    work.report.update(total_steps, total_steps, "steps", note="writing the model")
    checkpoint = fetch_checkpoint(
        work.store, work.request.stage, work.request.key, total_steps, work.scratch / "checkpoint"
    )
    last = state.read_facts(checkpoint)
    folder = work.scratch / "artifact"
    folder.mkdir()
    export(source, last, state.read_parameters(checkpoint), folder)
    return Outcome(folder, _metrics(train, sample_set, last, trained_seconds if not done else None))


def read_samples(model: Path, data: Path, max_length: int) -> SampleSet:
    """Samples of the rows at `data` for the model in the folder `model`."""
    files = load_tokenizer(model)
    return samples([data], files.tokenizer(), files.chat_template, max_length, special=files.special)


def require_targets(model: Path, targets: list[str]) -> None:
    """Raise ManifestInvalid when `spec.train.lora.targets` names a layer that the model does not have."""
    names = {name for file in sorted(model.glob("*.safetensors")) for name in check(file).tensors}
    layers = {name.removesuffix(".weight").rpartition(".")[2] for name in names if name.endswith(".weight")}
    unknown = [target for target in targets if target.rpartition(".")[2] not in layers]
    if unknown:
        known = ", ".join(sorted(layer for layer in layers if "norm" not in layer))
        raise ManifestInvalid(
            [Problem("spec.train.lora.targets", f"the model has no layer '{unknown[0]}'; it has {known}")]
        )


def _train(work: Work, train: Train, sample_set: SampleSet, total_steps: int) -> None:
    """Run the workers until the last step's checkpoint is in the store."""
    # Imported here: rows that teach nothing are refused before Ray is loaded.
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    from fastserve.stages.train.corpus import Corpus
    from fastserve.stages.train.worker import Task, run_worker

    # Read by Ray Train's controller, which takes the variables of this process over.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", _START_SECONDS)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _LOOK_EVERY_SECONDS)
    if not ray.is_initialized():
        ray.init(address="auto")
    threads = worker_threads(train.worker_count, _alive_nodes(ray))
    task = Task(work.store.uri, work.request, train, total_steps, threads)
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={"task": task, "corpus": ray.put(Corpus.of(sample_set.samples))},
        torch_config=TorchConfig(backend="gloo", timeout_s=_COLLECTIVE_SECONDS),
        scaling_config=ScalingConfig(num_workers=train.worker_count, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            name=f"train-{work.request.key[:12]}-{work.request.attempt}",
            storage_path=str(work.scratch / "ray_train"),
            failure_config=FailureConfig(max_failures=WORKER_RESTARTS),
            worker_runtime_env={"env_vars": worker_environment(threads, one_machine=_alive_nodes(ray) == 1)},
        ),
    )
    try:
        with following(work):
            result = trainer.fit()
    except TrainingFailedError as error:
        raise StageFailed(
            f"training broke off: {_first_cause(error)}; see `fastserve logs {work.request.model} train`"
        ) from error
    _raise_for(result.return_value, total_steps)


def _alive_nodes(ray: Any) -> int:
    return sum(1 for node in ray.nodes() if node["Alive"])


def worker_threads(workers: int, nodes: int) -> int:
    """Threads of each worker, so that the workers of one machine together have one thread a core.

    Cores are this machine's real ones: the CPUs that Ray counts are logical, and more threads than cores would spin
    against each other (measured with 32 on 2 cores: a third of the tokens/s).
    """
    return max(1, len(os.sched_getaffinity(0)) // math.ceil(workers / max(1, nodes)))


def worker_environment(threads: int, one_machine: bool) -> dict[str, str]:
    """Environment of the workers."""
    platform = str(Path(__file__).resolve().parents[3])
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # The package as this process found it, installed or not.
        "PYTHONPATH": os.pathsep.join(
            dict.fromkeys([platform, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
        ),
    }
    if one_machine:
        # Otherwise gloo asks the resolver for this machine's name, which in a container often leads nowhere.
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    return environment


def _first_cause(error: BaseException) -> str:
    """The deepest cause in one line; Ray wraps a worker's error several times."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = next(iter(failures.values()))
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _raise_for(ended: Mapping[str, Any] | None, total_steps: int) -> None:
    """Raise what the workers returned as the end of their run, unless that was the last step."""
    if ended is None:
        raise StageFailed("the workers ended without a word; see the stage's log")
    if ended["reason"] == "NotExecutable":
        raise NotExecutable([Problem("spec.train", ended["message"])])
    known = {kind.__name__: kind for kind in (AttemptFenced, StoreFull)}
    if ended["reason"]:
        raise known.get(ended["reason"], StageFailed)(ended["message"])
    if ended["step"] != total_steps:
        raise StageFailed(f"training ended at step {ended['step']} of {total_steps}; run `fastserve up` again")


def _metrics(train: Train, sample_set: SampleSet, last: state.RunState, seconds: float | None) -> dict[str, Any]:
    facts = sample_set.facts
    tokens = sum(row["tokens"] for row in last.curve)
    return {
        "steps": last.step,
        "workers": train.worker_count,
        "tokens": tokens,
        "trainedTokens": sum(row["trainedTokens"] for row in last.curve),
        "firstLoss": last.curve[0]["loss"],
        "finalLoss": last.curve[-1]["loss"],
        # Of an undisturbed run alone: what was done before a restart was not timed.
        **({"tokensPerSecond": tokens / seconds} if seconds else {}),
        "rows": {"read": facts.rows, "used": facts.used, "truncated": facts.truncated, "leftOut": dict(facts.left_out)},
    }
