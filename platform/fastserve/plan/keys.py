"""Artifacts are addressed by what made them: the key of a stage is the digest of its section, its data and its inputs.

An outside source enters a key as the digest of its content, so moving a file changes nothing and changing a byte of it
re-runs what reads it. What changes only how a stage runs (workers, their engine, checkpoints) or who judges its result
(the gate) stays outside, and nothing under `serve` is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fastserve.plan.digest import digest_of
from fastserve.plan.stages import FORMAT, Stage, StageRequest
from fastserve.spec.compress import CompressStep
from fastserve.spec.evaluate import Evaluate
from fastserve.spec.model import Model
from fastserve.spec.source import Source
from fastserve.spec.train import Lora, Scratch, Train

Role = Literal["model", "data", "adapter"]
"""What an outside source is used as; it decides which types of file may be in it."""

_ONLY_FASTER = {"workers", "elastic", "checkpoint", "activation_checkpointing", "engine", "priority"}
"""Of `train`: what changes speed and memory of a run and not its result."""


@dataclass(frozen=True, slots=True)
class OutsideSource:
    """Something that the pipeline reads and did not make."""

    ident: str
    """URI with `@revision` where one is given: the name under which its digest is kept."""

    role: Role
    source: Source


def ident_of(source: Source) -> str:
    """`uri`, or `uri@revision`: `{uri: hf://org/name, revision: main}` and `hf://org/name@main` are one thing."""
    return f"{source.uri}@{source.revision}" if source.revision else source.uri


def outside(model: Model) -> tuple[OutsideSource, ...]:
    """Every outside source that the pipeline reads, each once, in the order of the stages.

    Where one source is named twice, the entry that names a token is kept.
    """
    found = [OutsideSource(ident_of(model.spec.source), "model", model.spec.source)]
    for stage in wanted_stages(model):
        found.extend(data_of(model, stage))
    if model.spec.serve is not None:
        found.extend(
            OutsideSource(ident_of(adapter.source), "adapter", adapter.source) for adapter in model.spec.serve.adapters
        )
    unique: dict[tuple[str, Role], OutsideSource] = {}
    for item in found:
        known = unique.get((item.ident, item.role))
        if known is None or (known.source.token_secret is None and item.source.token_secret is not None):
            unique[item.ident, item.role] = item
    return tuple(unique.values())


def wanted_stages(model: Model) -> tuple[Stage, ...]:
    """The stages that the manifest asks for, in their order. `source` is always among them."""
    spec = model.spec
    wanted = {
        Stage.SOURCE: True,
        Stage.TRAIN: spec.train is not None,
        Stage.COMPRESS: bool(spec.compress),
        Stage.EVALUATE: spec.evaluate is not None,
    }
    return tuple(stage for stage in Stage if wanted[stage])


def candidate_stage(model: Model) -> Stage:
    """The stage whose artifact is evaluated and served: the last one that makes a model."""
    return [stage for stage in wanted_stages(model) if stage is not Stage.EVALUATE][-1]


def inputs_of(model: Model, stage: Stage) -> dict[str, Stage]:
    """Stages whose artifacts `stage` reads, by role.

    train and compress: {model}. evaluate: {candidate, parent}, and {source} where it is not the parent. The parent is
    what the candidate was compressed from, else the source; a source served as it is is its own parent.
    """
    makers = [made for made in wanted_stages(model) if made is not Stage.EVALUATE]
    if stage is Stage.SOURCE:
        return {}
    if stage is not Stage.EVALUATE:
        return {"model": makers[makers.index(stage) - 1]}
    candidate, parent = makers[-1], makers[-2] if len(makers) > 1 else makers[-1]
    inputs: dict[str, Stage] = {"candidate": candidate, "parent": parent}
    if parent is not Stage.SOURCE:
        inputs["source"] = Stage.SOURCE
    return inputs


def data_of(model: Model, stage: Stage) -> tuple[OutsideSource, ...]:
    """Outside sources that `stage` itself reads, each once."""
    found: dict[str, OutsideSource] = {}

    def note(source: Source) -> str:
        role: Role = "model" if stage is Stage.SOURCE else "data"
        found.setdefault(ident_of(source), OutsideSource(ident_of(source), role, source))
        return ""

    _section(model, stage, note)
    return tuple(found.values())


def stage_keys(model: Model, digests: Mapping[str, str]) -> dict[Stage, str]:
    """Keys of the wanted stages, 64 hex digits each.

    digests: digest of each outside source by ident. A stage with an unresolved source, and every stage that reads its
    artifact, is left out.
    """
    keys: dict[Stage, str] = {}
    for stage in wanted_stages(model):
        inputs = inputs_of(model, stage)
        resolved = all(item.ident in digests for item in data_of(model, stage))
        if not resolved or any(needed not in keys for needed in inputs.values()):
            continue
        keys[stage] = digest_of(
            {
                "stage": stage.value,
                "format": FORMAT[stage],
                "section": _section(model, stage, lambda source: digests[ident_of(source)]),
                "inputs": {role: keys[needed] for role, needed in inputs.items()},
            }
        )
    return keys


def request_for(model: Model, stage: Stage, digests: Mapping[str, str], attempt: int) -> StageRequest:
    """The request that carries one attempt of a stage to a worker.

    Its section holds everything that the key looks at and what the key leaves out but the worker needs: places of
    sources, workers, checkpoints. Rows that a compress step would borrow from train.dataset are written out. Raises
    KeyError when a source of the stage, or of one before it, is not in `digests`.
    """
    keys = stage_keys(model, digests)
    inputs = inputs_of(model, stage)
    section = _section(model, stage, lambda source: _json(source, exclude_none=True))
    if stage is Stage.TRAIN and model.spec.train is not None:
        section |= _json(model.spec.train, include=_ONLY_FASTER)
    if stage is Stage.SOURCE:
        section = _json(model.spec.source)
    return StageRequest(
        model=model.name,
        stage=stage,
        key=keys[stage],
        attempt=attempt,
        section=section,
        inputs={role: keys[needed] for role, needed in inputs.items()},
        input_stages=inputs,
        data={item.ident: digests[item.ident] for item in data_of(model, stage)},
    )


def _section(model: Model, stage: Stage, place: Callable[[Source], Any]) -> dict[str, Any]:
    """What decides a stage's result, in the manifest's keys, defaults written out, each source as `place` gives it."""
    spec = model.spec
    if stage is Stage.TRAIN and spec.train is not None:
        return _train_section(spec.train, place)
    if stage is Stage.COMPRESS:
        rows = spec.train.dataset if spec.train is not None else None
        return {"steps": [_step_section(step, rows, place) for step in spec.compress]}
    if stage is Stage.EVALUATE and spec.evaluate is not None:
        return _evaluate_section(spec.evaluate, place)
    return {"source": place(spec.source)}


def _train_section(train: Train, place: Callable[[Source], Any]) -> dict[str, Any]:
    section = _json(train, exclude={*_ONLY_FASTER, "dataset", "validation"})
    section["dataset"] = place(train.dataset)
    if train.validation is not None:
        section["validation"] = _json(train.validation, exclude={"data"}) | {"data": place(train.validation.data)}
    if train.epochs is None and train.steps is None:
        section["epochs"] = 1
    if train.method in ("lora", "qlora"):
        lora = train.lora or Lora()
        section["lora"] = _json(lora) | {"targets": sorted(set(lora.targets))}
    if train.method == "scratch":
        section["scratch"] = _json(train.scratch or Scratch())
    return section


def _step_section(step: CompressStep, rows: Source | None, place: Callable[[Source], Any]) -> dict[str, Any]:
    """One compress step; where it reads rows and names none, it reads those of train.dataset."""
    section = _json(step, exclude_none=True)
    if step.quantize is not None:
        source = step.quantize.calibration.data or rows
        section["quantize"]["calibration"].pop("data", None)
        if source is not None:
            section["quantize"]["calibration"]["data"] = place(source)
    if step.prune is not None and step.prune.recover is not None and rows is not None:
        # Not a key of the manifest: recovery always learns from train.dataset, whose content therefore decides.
        section["prune"]["recover"]["rows"] = place(rows)
    return section


def _evaluate_section(evaluate: Evaluate, place: Callable[[Source], Any]) -> dict[str, Any]:
    section = _json(evaluate, exclude={"gate", "data", "tasks"})
    section["data"] = place(evaluate.data)
    section["tasks"] = [_json(task, exclude={"data"}) | {"data": place(task.data)} for task in evaluate.tasks]
    return section


def _json(section: Any, **options: Any) -> dict[str, Any]:
    """A block of the manifest as plain values with the manifest's keys; defaults are written out."""
    plain: dict[str, Any] = section.model_dump(mode="json", by_alias=True, **options)
    return plain
