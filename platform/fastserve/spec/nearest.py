"""What somebody meant who wrote a key that is not there.

Three places are searched: the block itself (`batch_tokens`, `batchToken`), the other blocks of the manifest (`replicas`
under `spec`), and the habits of other model servers and trainers, whose manifests look much like ours and whose keys,
silently dropped, would leave a model that runs with defaults.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fastserve.spec.model import Model
from fastserve.spec.section import Section
from fastserve.spec.shape import fields_of, walk
from fastserve.spec.source import Source
from fastserve.spec.yaml_tree import Block, Items, Tree


@dataclass(frozen=True, slots=True)
class Advice:
    """What to write instead."""

    message: str
    """Ends with what to do."""

    suggestion: str | None = None
    """The right key alone; below `spec` its path, such as `serve.replicas`."""


@dataclass(frozen=True, slots=True)
class Habit:
    """What a key of another house is called here."""

    to: str
    """Path below `spec`."""

    how: str = ""
    """How its value is written there."""


_SOURCE = Habit("source", "such as source: hf://org/name")
_REPLICAS = Habit("serve.replicas", "such as serve: {replicas: {min: 0, max: 2}}")
_ENGINE = Habit("serve.engine", "vLLM serves everything; further arguments go into serve.engine.extraArgs")
_PROFILES = Habit("serve.profiles", "names of HardwareProfiles, such as serve: {profiles: [local]}")
_TASK = Habit("serve.task", "such as serve: {task: generate}")
_MAX_LENGTH = Habit("train.maxLength")
_BATCH = Habit("train.batchTokens", "tokens in one optimizer step, over all workers")
_EPOCHS = Habit("train.epochs")

HABITS = {
    # KubeAI
    "url": _SOURCE,
    "features": _TASK,
    "engine": _ENGINE,
    "args": Habit("serve.engine", 'as serve: {engine: {extraArgs: ["--max-num-seqs=8"]}}'),
    "minReplicas": _REPLICAS,
    "maxReplicas": _REPLICAS,
    "targetRequests": Habit("serve.target", "such as serve: {target: {queue: 4}}"),
    "resourceProfile": _PROFILES,
    "scaleDownDelaySeconds": Habit("serve.replicas", "such as serve: {replicas: {min: 0, idle: 5m}}"),
    "env": Habit("serve.engine", "flags of vLLM go into serve.engine.extraArgs, variables into the installation"),
    # KServe
    "storageUri": _SOURCE,
    "modelUri": _SOURCE,
    "predictor": Habit("serve", "and the model's address as source"),
    "modelFormat": _ENGINE,
    "runtime": _ENGINE,
    "containerConcurrency": Habit("serve.engine", "such as serve: {engine: {maxSequences: 8}}"),
    "scaleTarget": Habit("serve.target", "such as serve: {target: {queue: 4}}"),
    "scaleMetric": Habit("serve.target", "such as serve: {target: {ttft: 500ms}}"),
    "canaryTrafficPercent": Habit("serve.rollout", "such as serve: {rollout: {steps: [10, 100]}}"),
    "resources": _PROFILES,
    # vLLM and Hugging Face
    "model": _SOURCE,
    "modelId": _SOURCE,
    "baseModel": _SOURCE,
    "modelNameOrPath": _SOURCE,
    "maxModelLen": Habit("serve.context"),
    "maxNumSeqs": Habit("serve.engine", "as serve: {engine: {maxSequences: 8}}"),
    "gpuMemoryUtilization": Habit("serve.engine", "as serve: {engine: {kvCache: 8GiB}}"),
    "gpu": _PROFILES,
    "gpus": _PROFILES,
    "tensorParallelSize": Habit("serve.engine", "as serve: {engine: {tensorParallel: 2}}"),
    "quantization": Habit("compress", "such as compress: [{quantize: {format: int8}}]"),
    "quantize": Habit("compress", "such as compress: [{quantize: {format: int8}}]"),
    "prune": Habit("compress", "such as compress: [{prune: {layers: 0.75}}]"),
    "numTrainEpochs": _EPOCHS,
    "maxSteps": Habit("train.steps"),
    "perDeviceTrainBatchSize": _BATCH,
    "batchSize": _BATCH,
    "maxSeqLength": _MAX_LENGTH,
    "cutoffLen": _MAX_LENGTH,
    "loraRank": Habit("train.lora", "as train: {lora: {rank: 16}}"),
    "loraR": Habit("train.lora", "as train: {lora: {rank: 16}}"),
    "loraAlpha": Habit("train.lora", "as train: {lora: {alpha: 32}}"),
    "lr": Habit("train.learningRate"),
    "gradientClipping": Habit("train.clipNorm"),
    "maxGradNorm": Habit("train.clipNorm"),
}
"""Keys of KubeAI, KServe, vLLM and Hugging Face trainers, in camelCase, and where their meaning lives here."""

KIND_HABITS = {
    "InferenceService": "Model",
    "LLMInferenceService": "Model",
    "RayService": "Model",
    "ResourceProfile": "HardwareProfile",
    "ApiKey": "AccessKey",
}
"""Kinds of other houses and of the first guess, and ours."""


def key_advice(key: str, block: type[Section], kind: type[Section], value: Tree | None = None) -> Advice:
    """What to write instead of the unknown `key` in `block` of a manifest of `kind`."""
    allowed = list(fields_of(block))
    same = [name for name in allowed if _bare(name) == _bare(key)]
    if same:
        return Advice(f"unknown key; write `{same[0]}`", same[0])
    habit = _habit(key) if kind is Model and block is not Source else None
    if habit:
        return _from_habit(habit, value, "spec." if block is kind else "")
    near = nearest(key, allowed)
    if near:
        return Advice(f"unknown key; write `{near}`", near)
    elsewhere = [path for path, _ in walk(kind) if path.rsplit(".", 1)[-1] == key and "[" not in path]
    if block is not kind:
        elsewhere = [path.removeprefix("spec.") for path in elsewhere]
    if elsewhere:
        places = " or ".join(f"`{path}`" for path in elsewhere)
        return Advice(f"unknown key here; move it to {places}", elsewhere[0])
    return Advice(f"unknown key; remove it, or use one of: {', '.join(allowed)}")


def kind_advice(kind: str, kinds: Iterable[str]) -> str | None:
    """The kind that was meant, if any."""
    names = list(kinds)
    same = [name for name in names if name.lower() == kind.lower()]
    return same[0] if same else KIND_HABITS.get(kind) or nearest(kind, names)


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The most similar of `words`, if any is similar at all."""
    by_lower = {item.lower(): item for item in words}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def _bare(key: str) -> str:
    """`batch_tokens`, `batch-tokens` and `batchTokens` are one word."""
    return key.replace("_", "").replace("-", "").lower()


def _habit(key: str) -> Habit | None:
    return next((habit for name, habit in HABITS.items() if _bare(name) == _bare(key)), None)


def _from_habit(habit: Habit, value: Tree | None, above: str) -> Advice:
    """The habit's words; of a whole foreign block, also what is known of the keys in it.

    above: what leads from the block of the key to our place: `spec.` where `spec` itself was forgotten.
    """
    to = above + habit.to
    inside = {key: known.to for key, known in _habits_below(value) if known.to != habit.to}
    how = f" ({habit.how})" if habit.how else ""
    if not inside:
        return Advice(f"unknown key; write `{to}` instead{how}", to)
    places = ", ".join(f"`{above}{ours}` for {key}" for key, ours in inside.items())
    first = f"{above}source" if "source" in inside.values() else to
    return Advice(f"unknown block; write `{to}` instead{how}: {places}", first)


def _habits_below(value: Tree | None) -> Iterator[tuple[str, Habit]]:
    """The deepest known keys: `model: {storageUri: ...}` speaks of storageUri."""
    if isinstance(value, Items):
        for item in value.items:
            yield from _habits_below(item)
    if isinstance(value, Block):
        for key, entry in value.entries.items():
            deeper = list(_habits_below(entry.node))
            habit = _habit(key)
            if deeper:
                yield from deeper
            elif habit:
                yield key, habit
