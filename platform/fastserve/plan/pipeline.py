"""The one decision of the whole system: from what is wanted and what is there, what to do next.

`next_moves` is a pure function of a snapshot. It remembers nothing, so a crash at any point only means that the next
look decides again, and it is the same function on a laptop and in the operator.

    Resolve every outside source
      -> RunStage, one at a time: source, train, compress, evaluate
      -> the gate
      -> StartRevision -> Shift traffic, all or step by step -> StopRevision of what got none -> Done

What serves keeps serving all the while: traffic moves only to a revision that is ready, and a revision is stopped
only when it has no traffic and is not wanted.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastserve.plan.adapters import adapter_keys, adapter_moves, committed_ranks
from fastserve.plan.gate import GateOutcome, decide
from fastserve.plan.keys import candidate_stage, inputs_of, outside, request_for, stage_keys, wanted_stages
from fastserve.plan.moves import Done, Move, Refuse, Resolve, RunStage, StopAttempt, Wait
from fastserve.plan.observed import Attempt, AttemptState, Committed, Observed
from fastserve.plan.revision import Revision, deciding
from fastserve.plan.rollout import serve_moves, unserve_moves
from fastserve.plan.stages import Stage
from fastserve.plan.tries import next_try
from fastserve.spec.model import Model


def next_moves(model: Model, observed: Observed, now: float) -> list[Move]:
    """What to do next, in order. Never empty: `Wait`, `Done` or `Refuse` say that there is nothing to do.

    observed: the world as far as this Model is concerned.
    now: Unix seconds, for the wait between attempts.
    """
    unresolved = [item for item in outside(model) if item.ident not in observed.digests]
    if unresolved:
        return [
            Resolve(
                because=f"{item.ident} has to be resolved to a digest before anything can be made from it.",
                uri=item.ident,
                role=item.role,
                source=item.source,
            )
            for item in unresolved
        ]
    keys = stage_keys(model, observed.digests)
    stale = _stale_attempts(model, observed, keys)
    if stale:
        return stale
    # An adapter that is refused holds nobody up; one that is on its way is waited for, so that it is there when the
    # engine is told of it.
    adapters = adapter_moves(model, observed, now)
    refused: list[Move] = [move for move in adapters if isinstance(move, Refuse)]
    blocked = (
        [move for move in adapters if not isinstance(move, Refuse)]
        or _stage_moves(model, observed, keys, now)
        or _gate_moves(model, observed, keys)
    )
    if model.spec.serve is None:
        leaving = unserve_moves(observed)
        if leaving:
            return [*leaving, *(move for move in blocked if not isinstance(move, Refuse))]
        return blocked or [
            Done(because="Every stage has its artifact, and the manifest has no serve section, so nothing is served.")
        ]
    moves = serve_moves(observed, wanted_revision(model, observed, keys), blocked, model.spec.serve.rollout, now)
    return refused if refused and all(isinstance(move, Done) for move in moves) else moves


def wanted_revision(model: Model, observed: Observed, keys: Mapping[Stage, str]) -> Revision | None:
    """The revision that the manifest asks for; None while its artifact is not committed, or without a serve section."""
    stage = candidate_stage(model)
    artifact = observed.committed.get(keys.get(stage, ""))
    if artifact is None or model.spec.serve is None:
        return None
    return Revision(
        model=model.name,
        artifact_stage=stage,
        artifact_key=artifact.key,
        artifact_digest=artifact.digest,
        serve=deciding(model.spec.serve, committed_ranks(model, observed)),
    )


def missing_stages(model: Model, observed: Observed, keys: Mapping[Stage, str]) -> list[Stage]:
    """Stages that have to run, in order.

    An artifact that nothing needs any more is not made again: with the compressed model committed, a train artifact
    that was deleted stays deleted, unless the evaluate stage has yet to read it.
    """
    stages = wanted_stages(model)
    needed = {candidate_stage(model), stages[-1]}
    for stage in reversed(stages):
        if stage in needed and keys[stage] not in observed.committed:
            needed.update(inputs_of(model, stage).values())
    return [stage for stage in stages if stage in needed and keys[stage] not in observed.committed]


def _stale_attempts(model: Model, observed: Observed, keys: Mapping[Stage, str]) -> list[Move]:
    """Running attempts of this Model that the manifest, as it is now, has no use for."""
    wanted = {*keys.values(), *adapter_keys(model, observed.digests).values()}
    return [
        StopAttempt(
            because=f"The manifest changed, so nobody wants what attempt {attempt.number} at key {key[:8]} is making.",
            key=key,
            attempt=attempt.number,
        )
        for key, attempt in sorted(observed.attempts.items())
        if attempt.state is AttemptState.RUNNING and attempt.model == model.name and key not in wanted
    ]


def _stage_moves(model: Model, observed: Observed, keys: Mapping[Stage, str], now: float) -> list[Move]:
    """The next attempt, or the wait for one; empty when every stage that is needed has committed."""
    missing = missing_stages(model, observed, keys)
    if not missing:
        return []
    for stage, key in keys.items():
        # Also a later stage than the first missing one: it had its inputs when it began.
        attempt = observed.attempts.get(key)
        if attempt is not None and attempt.state is AttemptState.RUNNING:
            return [Wait(because=f"{_name(stage)} is running ({_whose(attempt, model)}).", stage=stage)]
    stage = missing[0]

    def run(number: int, because: str) -> RunStage:
        return RunStage(because=because, request=request_for(model, stage, observed.digests, number))

    return next_try(_name(stage), observed, keys[stage], run, now, (model.name, stage.value))


def _gate_moves(model: Model, observed: Observed, keys: Mapping[Stage, str]) -> list[Move]:
    """A refusal when the candidate may not take traffic; empty when it may."""
    if model.spec.evaluate is None:
        return []
    measured = observed.committed[keys[Stage.EVALUATE]]
    verdict = decide(measured.metrics, model.spec.evaluate.gate)
    if verdict.outcome is not GateOutcome.PASS:
        because = "The gate refuses the candidate. " + " ".join(verdict.reasons)
        return [Refuse(because=because, reason=verdict.refusal, stage=Stage.EVALUATE)]
    return _other_bytes(measured, observed.committed[keys[candidate_stage(model)]])


def _other_bytes(measured: Committed, candidate: Committed) -> list[Move]:
    """A refusal when the candidate was made anew after it was measured: training twice may not give the same bytes."""
    models = measured.metrics.get("models", {})
    digest = models.get("candidate", {}).get("digest", candidate.digest)
    if digest == candidate.digest:
        return []
    because = (
        f"The evaluate artifact {measured.key[:8]} was measured on bytes {digest[:8]}, but the candidate is now "
        f"{candidate.digest[:8]}; delete that evaluate artifact from the store, and it is measured again."
    )
    return [Refuse(because=because, reason="GateInconclusive", stage=Stage.EVALUATE)]


def _whose(attempt: Attempt, model: Model) -> str:
    """An attempt for people; of two models that ask for the same thing one makes it, and has its log."""
    others = f" of model {attempt.model}, which asks for the same" if attempt.model not in ("", model.name) else ""
    return f"attempt {attempt.number}{others}"


def _name(stage: Stage) -> str:
    """The stage as a sentence begins with it."""
    return f"Stage {stage}"
