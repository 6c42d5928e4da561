"""What is true of a model now, in the words of `status` on a cluster: stages, conditions, revisions, URL.

It is computed from one snapshot and the moves that follow from it, so the laptop's `fastserve status`, `fastserve
why` and the operator's status cannot tell different stories.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastserve.artifacts import attempts
from fastserve.artifacts.store import Store
from fastserve.errors import UsageInvalid
from fastserve.plan import gate as gates
from fastserve.plan import keys
from fastserve.plan.adapters import adapter_keys
from fastserve.plan.moves import Done, Move, Refuse, RunStage, StartRevision, Wait
from fastserve.plan.observed import AttemptState, LiveRevision, Observed, Place, RevisionState, Window
from fastserve.plan.pipeline import wanted_revision
from fastserve.plan.revision import Revision
from fastserve.plan.stages import Stage
from fastserve.plan.steps import step_of
from fastserve.spec.model import Model
from fastserve.telemetry.curve import loaded


def status_of(
    model: Model,
    observed: Observed,
    moves: Sequence[Move],
    store: Store,
    url: str | None,
    scaling: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The status of one model as plain values with the manifest's keys.

    scaling: of the places of its revisions, as `cluster.fleet` tells it; may be left out.
    """
    stages = {stage.value: _stage(model, stage, observed, store) for stage in keys.wanted_stages(model)}
    refusal = next((move for move in moves if isinstance(move, Refuse)), None)
    revisions = [_revision(live, observed, scaling) for live in observed.revisions]
    ready = any(
        live.state is RevisionState.READY and observed.weights.get(live.digest, 0) > 0 for live in observed.revisions
    )
    return {
        "name": model.name,
        "stages": stages,
        "gate": _gate(model, observed),
        "adapters": _adapters(model, observed),
        "revisions": revisions,
        "rollout": _rollout(model, observed),
        "pin": _pin(observed),
        "url": url if ready else None,
        "conditions": [_ready_condition(model, ready, moves, refusal)],
        "why": [move.because for move in moves] or [_not_up(model)],
    }


def _revision(live: LiveRevision, observed: Observed, scaling: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    bounds = {item["profile"]: item for item in scaling if item["revision"] == live.digest}
    window = observed.windows.get(live.digest)
    found: dict[str, Any] = {
        "digest": live.digest,
        "state": live.state.value,
        "weight": observed.weights.get(live.digest, 0),
        "replicas": live.replicas,
        "message": live.message,
        "places": [_place(place, bounds.get(place.profile, {})) for place in live.places],
    }
    return found if window is None else found | {"window": _window(window)}


def _adapters(model: Model, observed: Observed) -> list[dict[str, Any]]:
    """Each adapter that the manifest names: how far it is, and which revisions can apply it.

    It is serving when a revision that answers requests has an engine that was started for its rank.
    """
    ranks = {digest: Revision.from_json(value).lora_rank for digest, value in observed.known_revisions.items()}
    answering = [live.digest for live in observed.revisions if live.state is RevisionState.READY]
    carrying = [digest for digest in answering if observed.weights.get(digest, 0) > 0]
    resolved = adapter_keys(model, observed.digests)
    found: list[dict[str, Any]] = []
    for name in [item.name for item in model.spec.serve.adapters] if model.spec.serve is not None else []:
        key = resolved.get(name, "")
        done, attempt = observed.committed.get(key), observed.attempts.get(key)
        if done is not None:
            rank = int(done.metrics["rank"])
            able = [digest for digest in carrying if ranks.get(digest, 0) >= rank]
            state = "serving" if able else "committed"
            found.append({"name": name, "state": state, "digest": done.digest, "rank": rank, "revisions": able})
        elif attempt is None or attempt.state is AttemptState.RUNNING:
            found.append({"name": name, "state": "waiting" if attempt is None else attempt.state.value})
        else:
            told = {"reason": attempt.reason, "message": attempt.message}
            found.append({"name": name, "state": attempt.state.value, **told})
    return found


def _place(place: Place, bounds: Mapping[str, Any]) -> dict[str, Any]:
    told = {key: bounds[key] for key in ("min", "max", "because", "decided", "decisions") if key in bounds}
    state = {"profile": place.profile, "state": place.state.value, "replicas": place.replicas}
    return {**state, "wanted": place.wanted, "message": place.message, **told}


def _window(window: Window) -> dict[str, Any]:
    figures = {
        "ttftMs": window.ttft_ms,
        "ttftP95Ms": window.ttft_p95_ms,
        "tokensPerSecond": window.tokens_per_s,
    }
    counted = {"seconds": window.seconds, "requests": window.requests, "errors": window.errors}
    return counted | {key: value for key, value in figures.items() if value is not None}


def _rollout(model: Model, observed: Observed) -> dict[str, Any] | None:
    """Where the new revision stands; None when traffic is not shared."""
    rollout = model.spec.serve.rollout if model.spec.serve is not None else None
    wanted = wanted_revision(model, observed, keys.stage_keys(model, observed.digests))
    step = None if wanted is None else step_of(observed, wanted.digest, rollout)
    if step is None:
        return None
    new, old = observed.windows.get(step.revision), observed.windows.get(step.old)
    return {
        "revision": step.revision,
        "from": step.old,
        "weight": step.weight,
        "step": step.number,
        "steps": list(step.steps),
        "watchedSeconds": step.watched_seconds,
        "holdSeconds": step.hold_seconds,
        "message": (
            f"step {step.number} of {len(step.steps)}: revision {step.revision[:8]} has {step.weight} % of traffic, "
            f"{_figures(new)}; {step.old[:8]} {_figures(old)}"
        ),
    }


def _figures(window: Window | None) -> str:
    """How a revision did, in words."""
    if window is None:
        return "the gateway has not told how it does"
    told = [f"{window.errors} of {window.requests} requests failed in {window.seconds:.0f} s"]
    if window.ttft_ms is not None:
        told.append(f"{window.ttft_ms:.0f} ms to the first token")
    if window.tokens_per_s is not None:
        told.append(f"{window.tokens_per_s:.0f} tokens/s")
    return ", ".join(told)


def _pin(observed: Observed) -> dict[str, Any] | None:
    pin = observed.pin
    if pin is None:
        return None
    told = {"reason": pin.reason or "ByHand", "message": pin.because}
    return {"revision": pin.revision, "insteadOf": pin.instead_of, **told}


def curve_of(status: Mapping[str, Any], store: Store) -> list[Mapping[str, Any]]:
    """Rows of the train stage's loss curve, thinned while it runs; empty before the first step.

    status: of one model. Raises UsageInvalid when the model is not trained.
    """
    train = status["stages"].get(Stage.TRAIN.value)
    if train is None:
        raise UsageInvalid(f"{status['name']} has no train stage, so there is no loss to plot; leave --plot out")
    if train["key"] is None:
        return []
    return list(loaded(attempts.read_curve(store, Stage.TRAIN, train["key"], train.get("attempt"))))


def current_stage(moves: Sequence[Move]) -> str:
    """The stage that is under way or next, in one word; `-` when nothing is."""
    for move in moves:
        if isinstance(move, RunStage):
            return move.request.stage.value
        if isinstance(move, StartRevision):
            return "serve"
        if isinstance(move, Refuse):
            return str(move.stage) or "-"
    return next((move.stage for move in moves if isinstance(move, Wait)), "-")


def _stage(model: Model, stage: Stage, observed: Observed, store: Store) -> dict[str, Any]:
    key = keys.stage_keys(model, observed.digests).get(stage)
    if key is None:
        return {"state": "waiting", "key": None}
    done = observed.committed.get(key)
    if done is not None:
        return {
            "state": "committed",
            "key": key,
            "digest": done.digest,
            "sizeBytes": done.size_bytes,
            "metrics": dict(done.metrics),
        }
    attempt = observed.attempts.get(key)
    if attempt is None:
        return {"state": "waiting", "key": key}
    found: dict[str, Any] = {"state": attempt.state.value, "key": key, "attempt": attempt.number}
    if attempt.state is AttemptState.RUNNING:
        found["progress"] = attempts.read_progress(store, stage, key, attempt.number)
    else:
        found |= {"reason": attempt.reason, "message": attempt.message}
    return found


def _gate(model: Model, observed: Observed) -> dict[str, Any] | None:
    evaluate = model.spec.evaluate
    key = keys.stage_keys(model, observed.digests).get(Stage.EVALUATE)
    done = observed.committed.get(key) if key is not None else None
    if evaluate is None or done is None:
        return None
    return gates.decide(done.metrics, evaluate.gate).to_json()


def _not_up(model: Model) -> str:
    return f"{model.name} is not up; what it made is kept, and `fastserve up FILE` goes on from there."


def _ready_condition(model: Model, ready: bool, moves: Sequence[Move], refusal: Refuse | None) -> Mapping[str, Any]:
    """`Ready`: serving what the manifest asks for; a model that is not served is ready when its last stage is."""
    finished = any(isinstance(move, Done) for move in moves)
    if refusal is not None:
        return {"type": "Ready", "status": str(ready), "reason": refusal.reason, "message": refusal.because}
    if finished and (ready or model.spec.serve is None):
        return {"type": "Ready", "status": "True", "reason": "Ready", "message": moves[0].because}
    if not moves:
        return {"type": "Ready", "status": "False", "reason": "NotUp", "message": _not_up(model)}
    reason = "Waiting" if isinstance(moves[0], Wait) else "Working"
    return {"type": "Ready", "status": str(ready), "reason": reason, "message": moves[0].because}
