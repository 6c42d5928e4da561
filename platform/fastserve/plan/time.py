"""How long it will take, roughly, so that nobody starts in the morning what ends at night.

Times are estimates from counts of arithmetic (about 2 operations a number and token forward, 4 backward: Kaplan et
al., 2020, arXiv 2001.08361, section 2.1) and from start-up times measured on two cores. They are right to a factor of
about two, on a machine that does nothing else, and are shown with `~`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import ceil

from fastserve.plan.accelerators import operations_s
from fastserve.plan.facts import DatasetFacts, Hardware, ModelFacts
from fastserve.plan.keys import inputs_of, wanted_stages
from fastserve.plan.shares import SharePlan
from fastserve.plan.stages import Stage
from fastserve.plan.training import CORE_OPERATIONS_S
from fastserve.spec.compress import CompressStep
from fastserve.spec.model import Model
from fastserve.units import show_duration

_INFERENCE_OPERATIONS_S = 8.0e10
"""What such a core keeps up in forward passes over whole rows; an allowance."""

_JOB_SECONDS = 15.0
"""Start of a stage's process: Ray job, torch, transformers (measured: 10 to 20 s)."""

ENGINE_SECONDS = 25.0
"""Start of an engine (measured: 20 s alone on two cores with compiled bytecode)."""

_CONVERT_BYTES_S = 1.5e7
"""Bytes a second through fetch, check, conversion and upload (measured on a GGUF file: 269 MB in 18 s)."""

_GPTQ_OPERATIONS = 4.0
"""Operations a number and calibration token of GPTQ, its Hessians and solves included, against 2 of a forward pass
(from the measured 140 core-seconds for 135M numbers and 16,384 tokens)."""

_ROW_TOKENS = 256
"""Tokens of a held-out row while nobody has counted."""


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """A stage, or `serve`, and how long it may take."""

    stage: str
    seconds: float
    """0 when its artifact is committed."""

    why: str


def estimate(
    model: Model,
    facts: ModelFacts,
    dataset: DatasetFacts | None,
    hardware: Hardware,
    cached: Collection[Stage],
    shares: SharePlan | None = None,
) -> list[StageEstimate]:
    """Estimates of the wanted stages in order, and of the engine's start as `serve`.

    dataset: of train.dataset; None without a train stage. cached: stages whose artifacts are committed. shares: how
    training is shared; None: this machine works alone.
    """
    found = []
    for stage in wanted_stages(model):
        if stage in cached:
            found.append(StageEstimate(stage, 0.0, "committed already"))
            continue
        if stage is Stage.TRAIN and shares is not None and dataset is not None:
            seconds, why = _shared_training(model, dataset, shares)
        else:
            seconds, why = _stage(model, stage, facts, dataset, hardware)
        found.append(StageEstimate(stage, seconds, why))
    if model.spec.serve is not None:
        found.append(StageEstimate("serve", ENGINE_SECONDS, "one engine start"))
    return found


def _shared_training(model: Model, dataset: DatasetFacts, shares: SharePlan) -> tuple[float, str]:
    steps = ceil(training_tokens(model, dataset) / shares.batch_tokens)
    why = f"{steps} steps of {show_duration(shares.step_seconds)} on {len(shares.workers)} workers"
    return _JOB_SECONDS * 2 + steps * shares.step_seconds, why


def _stage(
    model: Model, stage: Stage, facts: ModelFacts, dataset: DatasetFacts | None, hardware: Hardware
) -> tuple[float, str]:
    spec = model.spec
    if stage is Stage.TRAIN and spec.train is not None and dataset is not None:
        tokens = training_tokens(model, dataset)
        frozen = spec.train.method in ("lora", "qlora")
        # With frozen weights the backward pass computes no gradient of a weight: half of its work.
        operations = tokens * facts.parameters * (4 if frozen else 6)
        speed = _operations_s(hardware, CORE_OPERATIONS_S) * (0.5 if spec.train.precision == "fp32" else 1)
        return _JOB_SECONDS * 2 + operations / speed, f"{tokens:,} tokens x {facts.parameters:,} numbers"
    if stage is Stage.COMPRESS:
        has_rows = spec.train is not None
        seconds = sum(_compress_step(step, facts, hardware, has_rows) for step in spec.compress)
        return _JOB_SECONDS + facts.weight_bytes / _CONVERT_BYTES_S + seconds, f"{facts.parameters:,} numbers"
    if stage is Stage.EVALUATE and spec.evaluate is not None:
        engines = len(set(inputs_of(model, stage).values()))
        tokens = spec.evaluate.max_rows * min(_ROW_TOKENS, spec.evaluate.context)
        speed = _operations_s(hardware, _INFERENCE_OPERATIONS_S)
        seconds = engines * (ENGINE_SECONDS + 2 * tokens * facts.parameters / speed)
        return seconds, f"{engines} engines over up to {spec.evaluate.max_rows} rows"
    seconds = _JOB_SECONDS + facts.weight_bytes / _CONVERT_BYTES_S
    return seconds, "fetched, checked and written in Hugging Face layout"


def training_tokens(model: Model, dataset: DatasetFacts) -> int:
    """Tokens that the train stage computes; 0 without one."""
    train = model.spec.train
    if train is None:
        return 0
    if train.steps is not None:
        return train.steps * train.batch_tokens
    return ceil(dataset.tokens * (train.epochs or 1))


def _compress_step(step: CompressStep, facts: ModelFacts, hardware: Hardware, has_rows: bool) -> float:
    if step.quantize is None:
        return 0.0
    calibration = step.quantize.calibration
    calibrated = step.quantize.method != "auto" or calibration.data is not None or has_rows
    if step.quantize.method == "roundToNearest" or not calibrated:
        return 2.0
    tokens = calibration.rows * min(_ROW_TOKENS, calibration.max_length)
    return tokens * facts.parameters * _GPTQ_OPERATIONS / _operations_s(hardware, CORE_OPERATIONS_S)


def _operations_s(hardware: Hardware, core_operations_s: float) -> float:
    if hardware.accelerators:
        return hardware.accelerators * operations_s(hardware.accelerator_type)
    return hardware.cpus * core_operations_s


def total_text(estimates: Collection[StageEstimate]) -> str:
    """`~4m10s, an estimate`."""
    return f"~{show_duration(sum(item.seconds for item in estimates))}, an estimate"
