"""What of the manifest this version runs. The rest is refused by name before anything starts, never ignored.

The manifest describes more than one release can do. Each refusal says what, and what works instead today; a line is
taken out of here when the part it names is built.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from fastserve.errors import ManifestInvalid, NotExecutable, Problem, PvcNotMounted
from fastserve.plan.accelerators import KNOWN, computes
from fastserve.plan.engine import check_extra_args
from fastserve.plan.facts import LOCAL, Hardware
from fastserve.plan.keys import outside
from fastserve.spec.hardware import HardwareProfileSpec
from fastserve.spec.model import AccessKey, HardwareProfile, Model
from fastserve.spec.nearest import nearest
from fastserve.spec.serve import Serve
from fastserve.spec.train import Train


def check(
    model: Model,
    profiles: Sequence[HardwareProfile] = (),
    cluster: Collection[str] = (LOCAL,),
    local: Hardware | None = None,
    claims: Collection[str] | None = None,
) -> None:
    """Raise NotExecutable with every part of `model` that this version does not run.

    profiles: HardwareProfiles that are described. cluster: names of those that it has machines of; a laptop has
    `local`. local: what that machine has; None: no accelerator.

    Raises ManifestInvalid for serve.engine.extraArgs that may not reach the engine, and for a profile of train.workers
    that nobody describes, PvcNotMounted for a pvc:// source on another claim than `claims`: those that the pods of a
    cluster have; None where there are no pods.
    """
    if claims is not None:
        _require_claims(model, claims)
    if model.spec.serve is not None:
        check_extra_args(model.spec.serve)
    described = {profile.metadata.name: profile.spec for profile in profiles}
    if model.spec.train is not None:
        _require_profiles(model.spec.train, {LOCAL, *described, *cluster})
    problems = problems_of(model, described, cluster, local, has_claims=claims is not None)
    if problems:
        raise NotExecutable(problems)


def _require_claims(model: Model, claims: Collection[str]) -> None:
    """Raise PvcNotMounted for every source on a claim that the pods do not have."""
    problems = []
    for path, uri in _claims(model):
        claim = uri.removeprefix("pvc://").partition("/")[0]
        if claim not in claims:
            there = ", ".join(sorted(claims)) or "none is"
            message = f"the claim {claim} is not mounted ({there}); add it to the chart's value ray.sourceClaims"
            problems.append(Problem(f"spec.{path}", message))
    if problems:
        raise PvcNotMounted(problems)


def check_access_key(key: AccessKey) -> None:
    """Raise NotExecutable with every limit of `key` that the gateway does not keep yet."""
    limits = {
        "requestsPerMinute": key.spec.requests_per_minute,
        "tokensPerMinute": key.spec.tokens_per_minute,
        "maxParallel": key.spec.max_parallel,
        "tokenBudget": key.spec.token_budget,
    }
    problems = [
        Problem(
            f"spec.{name}",
            f"nothing keeps {name} yet, and AccessKey {key.metadata.name} asks for it; remove it, and the key has no "
            "such limit",
        )
        for name, value in limits.items()
        if value is not None
    ]
    if problems:
        raise NotExecutable(problems)


def _require_profiles(train: Train, known: set[str]) -> None:
    """Raise ManifestInvalid for every group of workers whose profile nobody describes."""
    problems = []
    for index, group in enumerate(train.workers):
        if group.profile not in known:
            near = nearest(group.profile, sorted(known)) or LOCAL
            message = f"no HardwareProfile is named {group.profile}; write {near}, or add one of that name"
            problems.append(Problem(f"spec.train.workers[{index}].profile", message, suggestion=near))
    if problems:
        raise ManifestInvalid(problems)


def problems_of(
    model: Model,
    profiles: Mapping[str, HardwareProfileSpec] | None = None,
    cluster: Collection[str] = (LOCAL,),
    local: Hardware | None = None,
    has_claims: bool = False,
) -> list[Problem]:
    """Every part of `model` that this version does not run, in the order of the manifest. The rest as for `check`;
    profiles: specs by name. has_claims: whether there are pods that claims can be mounted into."""
    described = profiles or {}
    found = [
        Problem(f"spec.{path}", "pvc:// needs a Kubernetes cluster; use file://, s3://, hf:// or package://")
        for path, _ in ([] if has_claims else _claims(model))
    ]
    if model.spec.train is not None:
        found.extend(_train_problems(model.spec.train, described, cluster, local))
        if model.spec.train.method == "scratch" and model.spec.evaluate is not None:
            message = "a model from scratch has no parent to be compared with; remove evaluate, use train.validation"
            found.append(Problem("spec.evaluate", message))
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
        found.extend(_task_problems(model))
        found.extend(_serve_problems(model.spec.serve, described, cluster, local))
    return found


def _task_problems(model: Model) -> list[Problem]:
    """Stages that only models that generate text go through."""
    task = model.spec.serve.task if model.spec.serve is not None else "generate"
    stages = {"train": model.spec.train, "compress": model.spec.compress, "evaluate": model.spec.evaluate}
    if task == "generate":
        return []
    return [
        Problem(f"spec.{name}", f"goes with task: generate, and serve.task is {task}; remove {name}")
        for name, section in stages.items()
        if section
    ]


def _claims(model: Model) -> list[tuple[str, str]]:
    """The sources on a pvc://: their places, below `spec`, and their URIs."""
    if not any(item.source.scheme == "pvc" for item in outside(model)):
        return []
    spec = model.spec
    named = [("source", spec.source)]
    if spec.train is not None:
        named.append(("train.dataset", spec.train.dataset))
        if spec.train.validation is not None:
            named.append(("train.validation.data", spec.train.validation.data))
    for index, step in enumerate(spec.compress):
        if step.quantize is not None and step.quantize.calibration.data is not None:
            named.append((f"compress[{index}].quantize.calibration.data", step.quantize.calibration.data))
    if spec.evaluate is not None:
        named.append(("evaluate.data", spec.evaluate.data))
        named.extend((f"evaluate.tasks[{index}].data", task.data) for index, task in enumerate(spec.evaluate.tasks))
    if spec.serve is not None:
        named.extend((f"serve.adapters[{index}].source", item.source) for index, item in enumerate(spec.serve.adapters))
    return [(path, source.uri) for path, source in named if source.scheme == "pvc"]


def _train_problems(
    train: Train, profiles: Mapping[str, HardwareProfileSpec], cluster: Collection[str], local: Hardware | None
) -> list[Problem]:
    kinds = {group.profile: _accelerator(group.profile, profiles, local) for group in train.workers}
    found = []
    without = next((profile for profile, kind in kinds.items() if kind is None), None)
    if train.method == "qlora" and without is not None:
        message = f"qlora computes on an accelerator, and profile {without} has none; write lora"
        found.append(Problem("spec.train.method", message, suggestion="lora"))
    if train.engine == "fsdp2" and train.precision == "fp8":
        message = "fsdp2 does not go with precision: fp8; write sharded"
        found.append(Problem("spec.train.engine", message, suggestion="sharded"))
    precision = _precision_problem(train.precision, kinds)
    if precision is not None:
        found.append(precision)
    for index, group in enumerate(train.workers):
        if group.profile not in cluster:
            message = _elsewhere(group.profile, set(profiles), cluster)
            found.append(Problem(f"spec.train.workers[{index}].profile", message, suggestion=LOCAL))
    return found


def _accelerator(profile: str, profiles: Mapping[str, HardwareProfileSpec], local: Hardware | None) -> str | None:
    """Type of a profile's accelerator, empty where it is not said; None: it has none."""
    if profile in profiles:
        accelerator = profiles[profile].accelerator
        return None if accelerator is None else accelerator.type
    return local.accelerator_type if local is not None and local.accelerators else None


def _precision_problem(precision: str, kinds: Mapping[str, str | None]) -> Problem | None:
    """A precision that some worker's hardware does not compute. kinds: type of accelerator by profile, None: none."""
    without = next((profile for profile, kind in kinds.items() if not computes(kind, precision)), None)
    if without is not None and precision == "fp8":
        has = ", ".join(name for name, item in KNOWN.items() if item.fp8)
        message = f"profile {without} does not compute fp8 (of those known, {has} do); write bf16"
        return Problem("spec.train.precision", message, suggestion="bf16")
    if without is not None:
        message = f"the {kinds[without]} of profile {without} does not compute {precision}; write fp16"
        return Problem("spec.train.precision", message, suggestion="fp16")
    return None


def _serve_problems(
    serve: Serve, profiles: Mapping[str, HardwareProfileSpec], cluster: Collection[str], local: Hardware | None
) -> list[Problem]:
    found = []
    if serve.task != "generate" and serve.adapters:
        message = f"adapters go with task: generate, and this is {serve.task}; remove them"
        found.append(Problem("spec.serve.adapters", message))
    found.extend(_place_problems(serve, set(profiles), cluster))
    found.extend(_parallel_problems(serve, profiles, local))
    return found


def _place_problems(serve: Serve, profiles: set[str], cluster: Collection[str]) -> list[Problem]:
    """Profiles that nobody knows, and a list without a single machine. One that has none yet waits for it."""
    found = []
    for index, profile in enumerate(serve.profiles):
        if profile not in {*profiles, *cluster, LOCAL}:
            there = sorted({*profiles, *cluster})
            near = nearest(profile, there) or (there[0] if there else LOCAL)
            message = f"no HardwareProfile is named {profile}, and no machine has its label; write {near}, or add it"
            found.append(Problem(f"spec.serve.profiles[{index}]", message, suggestion=near))
    if not found and not set(serve.profiles) & set(cluster):
        message = _elsewhere(serve.profiles[0], profiles, cluster)
        found.append(Problem("spec.serve.profiles[0]", message, suggestion=min(cluster, default=LOCAL)))
    return found


def _parallel_problems(
    serve: Serve, profiles: Mapping[str, HardwareProfileSpec], local: Hardware | None
) -> list[Problem]:
    """A replica that asks for more accelerators than a machine of one of its profiles has."""
    wanted = serve.engine.tensor_parallel or 1
    if wanted == 1:
        return []
    has = {name: _accelerators(name, profiles, local) for name in serve.profiles}
    least = min(has, key=lambda name: has[name])
    if wanted <= has[least]:
        return []
    instead = f"write {has[least]}" if has[least] > 1 else "remove tensorParallel"
    message = f"is {wanted}, and a machine of profile {least} has {has[least]} accelerators; {instead}"
    return [Problem("spec.serve.engine.tensorParallel", message)]


def _accelerators(profile: str, profiles: Mapping[str, HardwareProfileSpec], local: Hardware | None) -> int:
    """Accelerators in one machine of a profile."""
    if profile in profiles:
        accelerator = profiles[profile].accelerator
        return 0 if accelerator is None else accelerator.count
    return local.accelerators if local is not None else 0


def _elsewhere(profile: str, profiles: set[str], cluster: Collection[str]) -> str:
    known = "is described, but" if profile in profiles else "is not this machine, and"
    if set(cluster) <= {LOCAL}:
        return f"profile {profile} {known} this version runs everything on the machine it is started on; write local"
    there = ", ".join(sorted(cluster))
    return f"profile {profile} is described, but the cluster has no machine of it; write one of those it has: {there}"
