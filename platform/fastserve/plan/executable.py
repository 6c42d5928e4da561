"""What of the manifest this version runs. The rest is refused by name before anything starts, never ignored.

The manifest describes more than one release can do. Each refusal says what, and what works instead today; a line is
taken out of here when the part it names is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastserve.errors import NotExecutable, Problem
from fastserve.plan.engine import check_extra_args
from fastserve.plan.keys import outside
from fastserve.spec.model import AccessKey, HardwareProfile, Model
from fastserve.spec.serve import Serve
from fastserve.spec.train import Train

LOCAL = "local"
"""The profile that is discovered on a laptop."""


def check(model: Model, profiles: Sequence[HardwareProfile] = ()) -> None:
    """Raise NotExecutable with every part of `model` that this version does not run.

    profiles: HardwareProfiles of the same file; they are accepted, and nothing is placed on them yet.

    Raises ManifestInvalid for serve.engine.extraArgs that may not reach the engine.
    """
    if model.spec.serve is not None:
        check_extra_args(model.spec.serve)
    problems = problems_of(model, {profile.metadata.name for profile in profiles})
    if problems:
        raise NotExecutable(problems)


def check_access_key(key: AccessKey) -> None:
    """Raise NotExecutable with every limit of `key` that the gateway does not keep yet."""
    limits = {
        "requestsPerMinute": key.spec.requests_per_minute,
        "tokensPerMinute": key.spec.tokens_per_minute,
        "maxParallel": key.spec.max_parallel,
        "tokenBudget": key.spec.token_budget,
    }
    problems = [
        Problem(f"spec.{name}", f"the gateway does not keep {name} yet; remove it, the key then has no such limit")
        for name, value in limits.items()
        if value is not None
    ]
    if problems:
        raise NotExecutable(problems)


def problems_of(model: Model, profiles: Iterable[str] = ()) -> list[Problem]:
    """Every part of `model` that this version does not run, in the order of the manifest. profiles: names described
    in the file."""
    known = set(profiles)
    found = [
        Problem(f"spec.{path}", "pvc:// needs a Kubernetes cluster; use file://, s3://, hf:// or package://")
        for path in _claims(model)
    ]
    if model.spec.train is not None:
        found.extend(_train_problems(model.spec.train, known))
    for index, step in enumerate(model.spec.compress):
        path = f"spec.compress[{index}]"
        if step.prune is not None:
            found.append(Problem(f"{path}.prune", "pruning does not run yet; remove it, or quantize: {format: int8}"))
        elif step.quantize is not None and step.quantize.format != "int8":
            message = f"{step.quantize.format} does not run yet; write int8"
            found.append(Problem(f"{path}.quantize.format", message, suggestion="int8"))
    if len(model.spec.compress) > 1 and not any(step.prune for step in model.spec.compress):
        found.append(Problem("spec.compress[1]", "a model is quantised once; keep one of the steps"))
    if model.spec.serve is not None:
        found.extend(_serve_problems(model.spec.serve, known))
    return found


def _claims(model: Model) -> list[str]:
    """Places, below `spec`, of the sources on a pvc://."""
    if not any(item.source.scheme == "pvc" for item in outside(model)):
        return []
    spec = model.spec
    named = [("source", spec.source)]
    if spec.train is not None:
        named.append(("train.dataset", spec.train.dataset))
    for index, step in enumerate(spec.compress):
        if step.quantize is not None and step.quantize.calibration.data is not None:
            named.append((f"compress[{index}].quantize.calibration.data", step.quantize.calibration.data))
    if spec.evaluate is not None:
        named.append(("evaluate.data", spec.evaluate.data))
        named.extend((f"evaluate.tasks[{index}].data", task.data) for index, task in enumerate(spec.evaluate.tasks))
    if spec.serve is not None:
        named.extend((f"serve.adapters[{index}].source", item.source) for index, item in enumerate(spec.serve.adapters))
    return [path for path, source in named if source.scheme == "pvc"]


def _train_problems(train: Train, profiles: set[str]) -> list[Problem]:
    found = []
    if train.method in ("qlora", "scratch"):
        message = f"{train.method} does not run yet; write lora or full"
        found.append(Problem("spec.train.method", message, suggestion="lora"))
    if train.precision in ("fp16", "fp8"):
        message = f"{train.precision} does not run yet; write bf16 or fp32"
        found.append(Problem("spec.train.precision", message, suggestion="bf16"))
    for index, group in enumerate(train.workers):
        path = f"spec.train.workers[{index}]"
        if group.profile != LOCAL:
            found.append(Problem(f"{path}.profile", _elsewhere(group.profile, profiles), suggestion=LOCAL))
        if group.speed is not None:
            found.append(Problem(f"{path}.speed", "the batch is shared evenly for now; remove speed"))
    if len(train.workers) > 1:
        message = f"unequal groups do not run yet; write one, such as [{{profile: local, count: {train.worker_count}}}]"
        found.append(Problem("spec.train.workers", message))
    if train.elastic is not None:
        message = "a run cannot change its size yet; remove elastic, a lost worker resumes from its checkpoint"
        found.append(Problem("spec.train.elastic", message))
    return found


def _serve_problems(serve: Serve, profiles: set[str]) -> list[Problem]:
    found = []
    if serve.task != "generate":
        found.append(
            Problem("spec.serve.task", f"{serve.task} does not run yet; write generate", suggestion="generate")
        )
    found.extend(
        Problem(f"spec.serve.profiles[{index}]", _elsewhere(profile, profiles), suggestion=LOCAL)
        for index, profile in enumerate(serve.profiles)
        if profile != LOCAL
    )
    if serve.target.ttft is not None:
        message = "autoscaling does not keep a time to first token yet; remove ttft, target.queue works"
        found.append(Problem("spec.serve.target.ttft", message))
    if serve.scheduler != "fcfs":
        found.append(
            Problem("spec.serve.scheduler", f"{serve.scheduler} does not run yet; write fcfs", suggestion="fcfs")
        )
    if (serve.engine.tensor_parallel or 1) > 1:
        message = "a replica runs on one device for now; remove tensorParallel"
        found.append(Problem("spec.serve.engine.tensorParallel", message))
    if serve.rollout is not None:
        message = "a new revision takes all traffic at once when it is ready, for now; remove rollout"
        found.append(Problem("spec.serve.rollout", message))
    if serve.adapters:
        message = "adapters are not served yet; remove them, or train with method: lora, which is merged into the model"
        found.append(Problem("spec.serve.adapters", message))
    return found


def _elsewhere(profile: str, profiles: set[str]) -> str:
    known = "is described, but" if profile in profiles else "is not this machine, and"
    return f"profile {profile} {known} this version runs everything on the machine it is started on; write local"
