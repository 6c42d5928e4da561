"""Write to the running training attempts how many workers they shall have, so that replicas find machines.

`plan.sharing` decides; the attempt's own process follows (`stages.train.driver`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastserve.artifacts import attempts
from fastserve.artifacts.store import Store
from fastserve.errors import ArtifactNotFound, DigestMismatch
from fastserve.plan import keys
from fastserve.plan.observed import AttemptState, Observed
from fastserve.plan.sharing import Need, TrainingRun, Wish, share
from fastserve.plan.stages import Stage
from fastserve.spec.model import Model


@dataclass(frozen=True, slots=True)
class _Running:
    """A training attempt that runs, and where it stands."""

    key: str
    attempt: int
    run: TrainingRun


def share_machines(
    store: Store, models: Mapping[str, Model], observed: Mapping[str, Observed], needs: Sequence[Need], now: float
) -> list[str]:
    """Ask training runs to give up workers for replicas that find no machine, and to take them back afterwards.

    models and observed: by name, of all that are up. needs: of all that serve; their priorities are set here. now: Unix
    seconds. Returns a sentence for each run that is asked for something new. Doing so twice equals doing so once.

    Raises StoreFailed when the store cannot be read or written.
    """
    running = _running(store, models, observed)
    if not running:
        return []
    ranked = [replace(need, priority=_serve_priority(models.get(need.model))) for need in needs]
    said = []
    for one, wish in zip(running, share([one.run for one in running], ranked, now), strict=True):
        before = one.run.wish
        if wish is None or wish == before:
            continue
        attempts.write_wish(store, Stage.TRAIN, one.key, one.attempt, wish.to_json())
        if before is None or before.workers != wish.workers:
            said.append(f"{one.run.model}: {wish.because}")
    return said


def _running(store: Store, models: Mapping[str, Model], observed: Mapping[str, Observed]) -> list[_Running]:
    """The training attempts that run at the keys that the manifests lead to, each once."""
    found: dict[str, _Running] = {}
    for name, seen in sorted(observed.items()):
        model = models.get(name)
        if model is None or model.spec.train is None:
            continue
        key = keys.stage_keys(model, seen.digests).get(Stage.TRAIN, "")
        attempt = seen.attempts.get(key)
        if attempt is None or attempt.state is not AttemptState.RUNNING:
            continue
        try:
            section = attempts.request_of(store, Stage.TRAIN, key, attempt.number).section
            wish = _wish(attempts.read_wish(store, Stage.TRAIN, key, attempt.number))
        except (ArtifactNotFound, DigestMismatch):
            continue  # nothing to go by; the attempt will end and say so itself
        # Models with equal training share its key; the one that needs it most decides how firmly it holds on.
        priority = max(
            model.spec.train.priority, found[key].run.priority if key in found else model.spec.train.priority
        )
        found[key] = _Running(key, attempt.number, _run(name, priority, section, wish))
    return list(found.values())


def _run(model: str, priority: int, section: Mapping[str, Any], wish: Wish | None) -> TrainingRun:
    """From the request's section: what runs is what was asked for then, whatever the manifest says now."""
    workers: Counter[str] = Counter()
    for group in section["workers"]:
        workers[group["profile"]] += int(group["count"])
    elastic = section.get("elastic")
    return TrainingRun(model, priority, workers, None if elastic is None else int(elastic["minWorkers"]), wish)


def _wish(value: Mapping[str, Any] | None) -> Wish | None:
    if value is None:
        return None
    try:
        return Wish.from_json(value)
    except (KeyError, TypeError, ValueError):
        return None  # of another version; it is written anew


def _serve_priority(model: Model | None) -> int:
    return model.spec.serve.priority if model is not None and model.spec.serve is not None else 0
