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
from fastserve.plan.moves import Done, Move, Refuse, RunStage, StartRevision, Wait
from fastserve.plan.observed import AttemptState, Observed, RevisionState
from fastserve.plan.stages import Stage
from fastserve.spec.model import Model
from fastserve.telemetry.curve import loaded


def status_of(model: Model, observed: Observed, moves: Sequence[Move], store: Store, url: str | None) -> dict[str, Any]:
    """The status of one model as plain values with the manifest's keys."""
    stages = {stage.value: _stage(model, stage, observed, store) for stage in keys.wanted_stages(model)}
    refusal = next((move for move in moves if isinstance(move, Refuse)), None)
    revisions = [
        {
            "digest": live.digest,
            "state": live.state.value,
            "weight": observed.weights.get(live.digest, 0),
            "replicas": live.replicas,
            "message": live.message,
        }
        for live in observed.revisions
    ]
    ready = any(
        live.state is RevisionState.READY and observed.weights.get(live.digest, 0) > 0 for live in observed.revisions
    )
    return {
        "name": model.name,
        "stages": stages,
        "gate": _gate(model, observed),
        "revisions": revisions,
        "pin": None
        if observed.pin is None
        else {"revision": observed.pin.revision, "insteadOf": observed.pin.instead_of},
        "url": url if ready else None,
        "conditions": [_ready_condition(model, ready, moves, refusal)],
        "why": [move.because for move in moves] or [_not_up(model)],
    }


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
    return "-"


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
