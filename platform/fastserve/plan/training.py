"""A training run before it runs: who takes part, what it needs, how it is shared, and what does not fit."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from fastserve.errors import InsufficientHardware, InsufficientMemory, ManifestInvalid, Problem
from fastserve.plan import accelerators
from fastserve.plan.facts import LOCAL, DatasetFacts, Hardware, ModelFacts, TrainingFacts, WorkerFacts
from fastserve.plan.footprint import footprint
from fastserve.plan.memory import ACCELERATOR_RUNTIME_BYTES, ByteLine, ByteTable, linear_layers, lora_parameters
from fastserve.plan.shares import SharePlan, plan_shares
from fastserve.spec.hardware import HardwareProfileSpec
from fastserve.spec.train import Lora, Train, Workers
from fastserve.units import show_bytes

MICRO_BATCH_TOKENS = 1024
"""Tokens that a worker without an accelerator computes at once, unless one sample is longer; more are no faster."""

ACCELERATOR_MICRO_BATCH_TOKENS = 16_384
"""The same with an accelerator; an allowance, not measured."""

CORE_OPERATIONS_S = 6.0e10
"""What a core with bf16 instructions keeps up in training; fp32 has half (measured: 5 to 10e10 on small models)."""

_STATE_BYTES = 16
"""A trained number's fp32 master, gradient and AdamW's two moments (Rajbhandari et al., 2020, arXiv 1910.02054)."""

_COPY_BYTES = 12
"""A trained number's master and moments in the copy that checkpoints are written from."""

_FOUR_BIT_BYTES = 4.5 / 8
"""A frozen number of qlora: 4 bits, and an fp32 scale for 64 of them (Dettmers et al., 2023, arXiv 2305.14314)."""

_TRAINER_BYTES = 1_100_000_000
"""One training worker without the model: Ray, torch and transformers (measured: 1.0 to 1.2 GB resident)."""

_MATRIX_TOKENS = 256
"""Up to this length of the longest sample the model may attend through a matrix (`stages.train.loading`)."""

_ROUNDED_UP = 1.2
"""What activations take beyond what is counted (measured on CPU, a model of 19 million numbers: 1.05 to 1.21 times)."""

_USABLE = 0.92
"""Part of an accelerator's memory that is planned with; the rest is lost between its allocations. An allowance."""


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """How a run is shared, and where its speeds come from."""

    shares: SharePlan
    given: tuple[bool, ...]
    """For each worker whether train.workers gives its speed; else it is assumed, and measured when the run starts."""

    tables: tuple[ByteTable, ...]
    """Memory of each kind of worker."""

    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values with the manifest's kind of keys."""
        plan = self.shares
        return {
            "batchTokens": plan.batch_tokens,
            "stepSeconds": plan.step_seconds,
            "microBatches": plan.micro_batches,
            "frozenWhole": plan.frozen_whole,
            "because": plan.because,
            "workers": [
                {
                    "worker": worker.name,
                    "profile": worker.profile,
                    "tokensPerSecond": worker.tokens_per_s,
                    "speedFrom": "given" if given else "assumed",
                    "batchShare": batch,
                    "stateShare": state,
                    "microBatchTokens": micro,
                    "keptBytes": kept,
                    "peakBytes": peak,
                    "memoryBytes": worker.memory_bytes,
                }
                for worker, given, batch, state, micro, kept, peak in zip(
                    plan.workers,
                    self.given,
                    plan.batch,
                    plan.state,
                    plan.micro_tokens,
                    plan.kept_bytes,
                    plan.peak_bytes,
                    strict=True,
                )
            ],
        }


def plan_training(
    model: ModelFacts,
    train: Train,
    local: Hardware,
    profiles: Mapping[str, HardwareProfileSpec] | None = None,
    dataset: DatasetFacts | None = None,
) -> TrainingPlan:
    """Share a run over the workers of the manifest.

    model: what is trained: the source, or what scratch makes. local: this machine. profiles: specs of the
    HardwareProfiles by name. dataset: of train.dataset, where its rows have been counted.

    Raises ManifestInvalid for a batch with fewer samples than workers and for adapters on layers that the model does
    not have, InsufficientHardware and InsufficientMemory.
    """
    require_targets(train, model.layer_names)
    if dataset is not None:
        _require_samples(train, dataset)
    workers = worker_facts(model, train, local, profiles or {})
    in_main_memory = any(not _accelerated(group, local, profiles or {}) for group in train.workers)
    facts = training_facts(model, train, accelerated=not in_main_memory)
    plan = plan_shares(workers, facts, train.batch_tokens, even=train.engine == "fsdp2")
    given = tuple(group.speed is not None for group in train.workers for _ in range(group.count))
    warnings = _elastic_warnings(train, plan)
    if train.precision == "fp16" and in_main_memory:
        warnings.append("train.precision: fp16 is more than ten times as slow as bf16 on CPUs; bf16 computes there")
    return TrainingPlan(plan, given, tuple(training_memory(plan)), tuple(warnings))


def require_targets(train: Train, layer_names: Sequence[str]) -> None:
    """Raise ManifestInvalid when train.lora.targets names a layer that is not among those of the model.

    layer_names: `ModelFacts.layer_names`; with none, nothing is known and nothing refused.
    """
    targets = train.lora.targets if train.lora is not None and layer_names else []
    for target in targets:
        last = target.rpartition(".")[2]
        if last not in layer_names:
            near = difflib.get_close_matches(last, layer_names, 1)
            hint = f"write {near[0]}, or another" if near else "write one"
            message = f"the model has no layer '{target}'; {hint} of {', '.join(layer_names)}"
            raise ManifestInvalid([Problem("spec.train.lora.targets", message, suggestion=near[0] if near else None)])


def training_facts(model: ModelFacts, train: Train, accelerated: bool = False) -> TrainingFacts:
    """What `train` needs of memory. model: what is trained. accelerated: whether every worker has an accelerator."""
    size = 4 if train.precision == "fp32" else 2
    longest = min(train.max_length, model.max_context)
    root = model.vocab * model.hidden * (1 if model.tied_embeddings else 2) + model.hidden
    block = max(0, model.parameters - root) // model.layers
    adapted = train.method in ("lora", "qlora")
    trained = lora_parameters(model, train.lora or Lora()) if adapted else model.parameters
    frozen_block = block * size
    if train.method == "qlora":
        linear = min(block, sum(inputs * outputs for inputs, outputs in linear_layers(model).values()))
        frozen_block = ceil(linear * _FOUR_BIT_BYTES) + (block - linear) * size
    return TrainingFacts(
        state_bytes=trained * _STATE_BYTES,
        frozen_bytes=root * size + frozen_block * model.layers if adapted else 0,
        unit_bytes=(trained // model.layers if adapted else block) * size,
        root_bytes=0 if adapted else root * size,
        activation_bytes_per_token=activation_bytes(model, size, train.activation_checkpointing, longest),
        process_bytes=ACCELERATOR_RUNTIME_BYTES if accelerated else _TRAINER_BYTES,
        longest_tokens=longest,
        copy_bytes=0 if accelerated else trained * _COPY_BYTES,
        loaded_bytes=0 if accelerated else _loaded_bytes(model, train, size),
        working_bytes=trained * size,
        frozen_unit_bytes=frozen_block if adapted else 0,
        frozen_root_bytes=root * size if adapted else 0,
        ways=_ways(train),
    )


def _loaded_bytes(model: ModelFacts, train: Train, size: int) -> int:
    """Trained weights are loaded as they are stored where that is the computing precision, else in fp32."""
    if train.method in ("lora", "qlora"):
        return model.parameters * size + lora_parameters(model, train.lora or Lora()) * 4
    stored = {"bf16": "bfloat16", "fp16": "float16"}.get(train.precision)
    return model.parameters * (2 if train.method == "full" and model.dtype == stored else 4)


def activation_bytes(model: ModelFacts, size: int, checkpointing: bool, longest: int) -> float:
    """Bytes kept from forward to backward for one token (Korthikanti et al., 2022, arXiv 2205.05198), and its logits
    with their gradient in fp32.

    size: bytes of a number. checkpointing: only the inputs of the blocks are kept, and one block's inside at a time.
    longest: tokens of the longest sample; of short ones the attention matrix is kept, which scaled-dot-product
    attention does without.
    """
    attention = model.heads * model.head_dim * 2 + model.kv_heads * model.head_dim * 2
    # Norms and the softmax keep fp32 copies of the residual stream.
    block = (4 * model.hidden + attention + 4 * model.intermediate) * size + 2 * model.hidden * 4
    if longest <= _MATRIX_TOKENS:
        block += model.heads * longest * (4 + size)
    kept = model.layers * model.hidden * size + block if checkpointing else model.layers * block
    return _ROUNDED_UP * kept + 3 * model.vocab * 4


def worker_facts(
    model: ModelFacts, train: Train, local: Hardware, profiles: Mapping[str, HardwareProfileSpec]
) -> tuple[WorkerFacts, ...]:
    """The workers of the manifest, one after the other, with assumed or given speeds.

    A worker has one accelerator of its profile, or, where the profile has none, the machine. Workers on this machine
    share its cores and memory evenly. Given speeds are relative: all workers together are assumed to be as fast as
    without them. Raises InsufficientHardware when this machine has fewer accelerators than `local` workers.
    """
    here = sum(group.count for group in train.workers if group.profile == LOCAL)
    if local.accelerators and here > local.accelerators:
        raise InsufficientHardware(
            f"train.workers asks for {here} workers of profile {LOCAL}, and this machine has {local.accelerators} "
            f"accelerators; write count: {local.accelerators}"
        )
    adapted = train.method in ("lora", "qlora")
    # With frozen weights the backward pass computes no gradient of a weight: half of its work.
    token_operations = model.parameters * (4 if adapted else 6)
    groups = [group for group in train.workers for _ in range(group.count)]
    assumed = [_operations_s(group, train, local, profiles, here) / token_operations for group in groups]
    speeds = assumed
    if any(group.speed is not None for group in train.workers):
        given = [group.speed or 1.0 for group in groups]
        speeds = [speed * sum(assumed) / sum(given) for speed in given]
    return tuple(
        WorkerFacts(
            name=f"worker-{index}",
            profile=group.profile,
            tokens_per_s=speed,
            memory_bytes=_memory_bytes(group, local, profiles, here),
            most_tokens=ACCELERATOR_MICRO_BATCH_TOKENS if _accelerated(group, local, profiles) else MICRO_BATCH_TOKENS,
        )
        for index, (group, speed) in enumerate(zip(groups, speeds, strict=True))
    )


def training_memory(plan: SharePlan) -> list[ByteTable]:
    """What each kind of worker needs at most, line by line. A kind: workers with equal profile, speed and memory."""
    kinds: dict[tuple[str, float, int], list[int]] = {}
    for index, worker in enumerate(plan.workers):
        kinds.setdefault((worker.profile, worker.tokens_per_s, worker.memory_bytes), []).append(index)
    tables = []
    for (profile, _, memory), members in kinds.items():
        count = len(members)
        title = f"Memory of each of {count} training workers" if count > 1 else "Memory of the training worker"
        if len(kinds) > 1:
            named = plan.workers[members[0]].name + (f" to {plan.workers[members[-1]].name}" if count > 1 else "")
            title = f"Memory of each of {count} training workers" if count > 1 else "Memory of a training worker"
            title += f", profile {profile} ({named})"
        lines = tuple(line for line in _lines(plan, members[0]) if line.size_bytes)
        tables.append(ByteTable(title, lines, count, memory * count))
    return tables


def _lines(plan: SharePlan, index: int) -> list[ByteLine]:
    facts, share = plan.facts, plan.state[index]
    trained = facts.state_bytes // _STATE_BYTES
    part = f"{share:.1%} of {trained:,} trained numbers, 16 bytes each"
    needs = footprint(facts, len(plan.workers), plan.frozen_whole)
    frozen = needs.frozen + round(share * (needs.cut - facts.state_bytes))
    exchange = needs.gradients + round(share * needs.received)
    lines = [
        ByteLine("state", round(share * facts.state_bytes), part),
        ByteLine("frozen weights", frozen, "whole" if needs.frozen else f"{share:.1%} of them"),
        ByteLine("working copy", needs.together, "what is trained and its gradient, whole"),
        ByteLine("gathered weights", needs.gathered, "embedding, head and two blocks at a time"),
        ByteLine("gradients", exchange, "on their way to the workers that keep them"),
        ByteLine("checkpoint", round(share * facts.copy_bytes), "the copy that is written while training goes on"),
        ByteLine("process", facts.process_bytes, "without the model"),
    ]
    step = sum(line.size_bytes for line in lines)
    tokens = plan.tokens_at_once()[index]
    if needs.at_start(share) == plan.peak_bytes[index]:
        state = ByteLine("state", round(share * needs.cut), f"{share:.1%} of it")
        model = ByteLine("model", needs.loaded, "loaded whole, before it is cut: more than a step needs later")
        return [state, model, lines[-1]]
    lines.insert(5, ByteLine("activations", plan.peak_bytes[index] - step, f"{tokens:,} tokens at once, an estimate"))
    return lines


def _require_samples(train: Train, dataset: DatasetFacts) -> None:
    """Raise ManifestInvalid when a step has fewer samples than there are workers."""
    mean = dataset.tokens / max(1, dataset.used)
    if train.worker_count == 1 or train.batch_tokens >= train.worker_count * mean:
        return
    samples = max(1, int(train.batch_tokens / mean))
    enough = ceil(train.worker_count * mean)
    message = (
        f"a step of {train.batch_tokens} tokens holds about {samples} samples of train.dataset, fewer than the "
        f"{train.worker_count} workers, so some would have nothing to do; write at least {enough}, or list fewer "
        "workers"
    )
    raise ManifestInvalid([Problem("spec.train.batchTokens", message, suggestion=str(enough))])


def _elastic_warnings(train: Train, plan: SharePlan) -> list[str]:
    """What would not fit if the run shrank as far as it may, to the workers with the least memory."""
    if train.elastic is None or train.elastic.min_workers >= train.worker_count:
        return []
    least = train.elastic.min_workers
    left: Sequence[WorkerFacts] = sorted(plan.workers, key=lambda worker: worker.memory_bytes)[:least]
    try:
        plan_shares(left, plan.facts, plan.batch_tokens, even=plan.even)
    except InsufficientMemory:
        room = show_bytes(sum(worker.memory_bytes for worker in left))
        return [
            f"train.elastic.minWorkers is {least}, but training does not fit the {least} with the least memory ({room} "
            "together); should they be left alone, the run stops. Raise minWorkers, and it waits for more instead"
        ]
    return []


def _accelerated(group: Workers, local: Hardware, profiles: Mapping[str, HardwareProfileSpec]) -> bool:
    profile = profiles.get(group.profile)
    return local.accelerators > 0 if profile is None else profile.accelerator is not None


def _memory_bytes(group: Workers, local: Hardware, profiles: Mapping[str, HardwareProfileSpec], here: int) -> int:
    profile = profiles.get(group.profile)
    if profile is None:
        return int(local.accelerator_memory_bytes * _USABLE) if local.accelerators else local.memory_bytes // here
    return int(profile.accelerator.memory * _USABLE) if profile.accelerator is not None else profile.memory


def _operations_s(
    group: Workers, train: Train, local: Hardware, profiles: Mapping[str, HardwareProfileSpec], here: int
) -> float:
    profile = profiles.get(group.profile)
    if _accelerated(group, local, profiles):
        known = local.accelerator_type if profile is None or profile.accelerator is None else profile.accelerator.type
        return accelerators.operations_s(known)
    cores = local.cpus / here if profile is None else profile.cpus
    return cores * CORE_OPERATIONS_S * (0.5 if train.precision == "fp32" else 1)


def _ways(train: Train) -> tuple[str, ...]:
    ways = ["lower train.maxLength"]
    if not train.activation_checkpointing:
        ways.append("write train.activationCheckpointing: true")
    last = {"full": "write train.method: lora", "scratch": "make the model smaller in train.scratch.config"}
    return (*ways, last.get(train.method, "take a smaller spec.source"))
