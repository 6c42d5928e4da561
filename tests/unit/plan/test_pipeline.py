from __future__ import annotations

import pytest

from fastserve.plan.keys import outside, stage_keys, wanted_stages
from fastserve.plan.moves import (
    Done,
    Refuse,
    Resolve,
    RunStage,
    Shift,
    StartRevision,
    StopAttempt,
    StopRevision,
    Unpin,
    Wait,
)
from fastserve.plan.observed import Attempt, AttemptState, Committed, LiveRevision, Observed, Pin, RevisionState
from fastserve.plan.pipeline import next_moves, wanted_revision
from fastserve.plan.revision import Revision
from fastserve.plan.stages import Stage
from fastserve.plan.tries import MAX_ATTEMPTS

NOW = 1_000_000.0
GOOD = {
    "rows": 50,
    **{
        name: {"value": 0.01, "low": 0.01, "high": 0.01}
        for name in ("perplexityIncrease", "klDivergence", "flippedTokens")
    },
}
BAD = GOOD | {"klDivergence": {"value": 2.0, "low": 1.9, "high": 2.1}}
UNSURE = GOOD | {"klDivergence": {"value": 0.1, "low": 0.05, "high": 0.2}}


def digests(model):
    return {item.ident: f"digest of {item.ident}" for item in outside(model)}


def committed(model, stages, measured=GOOD):
    keys = stage_keys(model, digests(model))
    return {
        keys[stage]: Committed(
            stage, keys[stage], f"bytes of {keys[stage]}", 1, measured if stage == "evaluate" else {}
        )
        for stage in stages
    }


def seen(model, stages=None, measured=GOOD, **rest):
    """A snapshot with these stages committed; None: all that are wanted."""
    wanted = wanted_stages(model) if stages is None else stages
    return Observed(digests=digests(model), committed=committed(model, wanted, measured), **rest)


def moves(model, observed, now=NOW):
    return next_moves(model, observed, now)


def only(found):
    (move,) = found
    return move


def revision(model):
    observed = seen(model)
    return wanted_revision(model, observed, stage_keys(model, observed.digests))


def live(found, state=RevisionState.READY, message=""):
    return LiveRevision(found.digest, state, message)


def known(*revisions):
    return {found.digest: found.to_json() for found in revisions}


def older(model):
    """A revision that served before."""
    return Revision("chat", Stage.SOURCE, "old key", "old bytes", {"task": "generate"})


# -- sources and stages ---------------------------------------------------------------------------------------------


def test_every_source_is_resolved_first(model, all_stages):
    found = moves(model(**all_stages), Observed(digests={"file:///models/base": "known"}))
    assert [(move.uri, move.role, move.source.uri) for move in found] == [
        ("file:///data/train.jsonl", "data", "file:///data/train.jsonl"),
        ("file:///data/held-out.jsonl", "data", "file:///data/held-out.jsonl"),
    ]
    assert all(isinstance(move, Resolve) for move in found)


def test_stages_run_one_after_the_other(model, all_stages):
    full = model(**all_stages)
    for count, stage in enumerate(wanted_stages(full)):
        move = only(moves(full, seen(full, wanted_stages(full)[:count])))
        assert isinstance(move, RunStage)
        assert (move.request.stage, move.request.attempt) == (stage, 1)
        assert move.because.startswith(f"Stage {stage} has no artifact yet")


def test_a_committed_artifact_is_never_run_again(model, all_stages):
    full = model(**all_stages)
    assert not any(isinstance(move, RunStage) for move in moves(full, seen(full)))


def test_an_artifact_that_nothing_needs_any_more_is_not_made_again(model, all_stages):
    full = model(**all_stages)
    assert isinstance(only(moves(full, seen(full, [Stage.COMPRESS, Stage.EVALUATE]))), StartRevision)
    gone = only(moves(full, seen(full, [Stage.SOURCE, Stage.COMPRESS])))
    assert (gone.request.stage, gone.request.inputs.keys()) == (Stage.TRAIN, {"model"})


def test_a_running_attempt_is_waited_for(model, all_stages):
    full = model(**all_stages)
    key = stage_keys(full, digests(full))[Stage.TRAIN]
    observed = seen(full, [Stage.SOURCE], attempts={key: Attempt(2, AttemptState.RUNNING)})
    move = only(moves(full, observed))
    assert move == Wait(because="Stage train is running (attempt 2).", stage="train")


def tried(model, stage, attempt, **rest):
    key = stage_keys(model, digests(model))[stage]
    stages = wanted_stages(model)
    return seen(model, stages[: stages.index(stage)], attempts={key: attempt}, **rest)


@pytest.mark.parametrize(("number", "wait"), [(1, 0), (2, 2), (3, 10)])
@pytest.mark.parametrize("state", [AttemptState.FAILED, AttemptState.LOST])
def test_a_failed_or_lost_attempt_is_tried_again_after_a_wait(model, all_stages, number, wait, state):
    full = model(**all_stages)
    observed = tried(full, Stage.TRAIN, Attempt(number, state, "OutOfMemory", "killed", ended_at=NOW))
    if wait:
        early = only(moves(full, observed, NOW + wait - 0.1))
        assert isinstance(early, Wait)
        assert early.until == NOW + wait
    move = only(moves(full, observed, NOW + wait))
    assert (move.request.stage, move.request.attempt) == (Stage.TRAIN, number + 1)
    assert f"try {number + 1} of {MAX_ATTEMPTS}" in move.because
    assert "killed" in move.because


def test_a_clock_that_was_set_back_does_not_lengthen_the_wait(model, all_stages):
    full = model(**all_stages)
    observed = tried(full, Stage.TRAIN, Attempt(3, AttemptState.LOST, ended_at=NOW + 86_400))
    assert isinstance(only(moves(full, observed)), RunStage)


def test_after_the_last_attempt_the_stage_is_refused(model, all_stages):
    full = model(**all_stages)
    attempt = Attempt(MAX_ATTEMPTS, AttemptState.FAILED, "StageFailed", "exit code 1.", ended_at=0.0)
    move = only(moves(full, tried(full, Stage.TRAIN, attempt)))
    assert isinstance(move, Refuse)
    assert (move.reason, move.stage) == ("StageFailed", "train")
    assert "did not succeed in 4 attempts; the last one failed (StageFailed: exit code 1)" in move.because


def test_an_input_that_is_refused_is_not_tried_again(model, all_stages):
    full = model(**all_stages)
    attempt = Attempt(1, AttemptState.FAILED, "DatasetInvalid", "rows.jsonl:3: not JSON", final=True, ended_at=0.0)
    move = only(moves(full, tried(full, Stage.TRAIN, attempt)))
    assert (move.reason, move.stage) == ("DatasetInvalid", "train")
    assert move.because == "Stage train failed (DatasetInvalid: rows.jsonl:3: not JSON)."


@pytest.mark.parametrize("final", [True, False])
def test_asking_again_is_trying_again(model, all_stages, final):
    full = model(**all_stages)
    key = stage_keys(full, digests(full))[Stage.TRAIN]
    attempt = Attempt(4, AttemptState.FAILED, "StoreFull", "no space", final=final, ended_at=NOW)
    move = only(moves(full, tried(full, Stage.TRAIN, attempt, forgiven={key: 4})))
    assert move.request.attempt == 5
    fifth = Attempt(5, AttemptState.FAILED, "StoreFull", "no space", final=final, ended_at=NOW)
    again = only(moves(full, tried(full, Stage.TRAIN, fifth, forgiven={key: 4})))
    assert isinstance(again, Refuse if final else RunStage)


def test_an_attempt_that_nobody_wants_any_more_is_ended_first(model, all_stages):
    full = model(**all_stages)
    stale = Attempt(1, AttemptState.RUNNING, model="chat")
    observed = seen(full, [Stage.SOURCE], attempts={"old key": stale})
    assert only(moves(full, observed)) == StopAttempt(
        because="The manifest changed, so nobody wants what attempt 1 at key old key is making.",
        key="old key",
        attempt=1,
    )


def test_an_attempt_of_another_model_is_left_alone(model, all_stages):
    full = model(**all_stages)
    observed = seen(full, [], attempts={"old key": Attempt(1, AttemptState.RUNNING, model="other")})
    assert isinstance(only(moves(full, observed)), RunStage)


# -- the gate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measured", "reason"), [(BAD, "GateFailed"), (UNSURE, "GateInconclusive"), ({}, "GateInconclusive")]
)
def test_a_refused_candidate_serves_nothing_and_what_served_keeps_serving(model, all_stages, measured, reason):
    full = model(**all_stages)
    assert only(moves(full, seen(full, measured=measured))).reason == reason
    old = older(full)
    observed = seen(
        full, measured=measured, revisions=(live(old),), weights={old.digest: 100}, known_revisions=known(old)
    )
    move = only(moves(full, observed))
    assert (move.reason, move.stage) == (reason, "evaluate")
    assert "klDivergence" in move.because


def test_the_gate_holds_for_a_model_that_is_not_served_too(model, all_stages):
    del all_stages["serve"]
    full = model(**all_stages)
    assert only(moves(full, seen(full, measured=BAD))).reason == "GateFailed"
    assert isinstance(only(moves(full, seen(full))), Done)


def test_without_a_gate_what_was_measured_refuses_nothing(model, all_stages):
    all_stages["evaluate"] = {"data": "file:///data/held-out.jsonl"}
    full = model(**all_stages)
    assert isinstance(only(moves(full, seen(full, measured=BAD))), StartRevision)


def test_bytes_that_were_not_measured_are_not_served(model, all_stages):
    full = model(**all_stages)
    measured = GOOD | {"models": {"candidate": {"digest": "other bytes"}}}
    move = only(moves(full, seen(full, measured=measured)))
    assert (move.reason, move.stage) == ("GateInconclusive", "evaluate")


# -- serving --------------------------------------------------------------------------------------------------------


def test_a_first_revision_is_started_awaited_routed_and_done(model):
    plain = model(serve={})
    new = revision(plain)
    assert only(moves(plain, seen(plain))).revision == new
    starting = seen(plain, revisions=(live(new, RevisionState.STARTING),))
    assert only(moves(plain, starting)).stage == "serve"
    ready = seen(plain, revisions=(live(new),))
    assert only(moves(plain, ready)).weights == {new.digest: 100}
    serving = seen(plain, revisions=(live(new),), weights={new.digest: 100})
    assert isinstance(only(moves(plain, serving)), Done)


def test_the_old_revision_serves_until_the_new_one_is_ready(model):
    plain = model(serve={})
    new, old = revision(plain), older(plain)
    routes = {"weights": {old.digest: 100}, "known_revisions": known(old)}
    start = only(moves(plain, seen(plain, revisions=(live(old),), **routes)))
    assert f"{old.short} keeps the traffic until it is ready" in start.because
    both = seen(plain, revisions=(live(old), live(new, RevisionState.STARTING)), **routes)
    assert isinstance(only(moves(plain, both)), Wait)
    ready = seen(plain, revisions=(live(old), live(new)), **routes)
    assert isinstance(only(moves(plain, ready)), Shift)
    shifted = seen(plain, revisions=(live(old), live(new)), weights={new.digest: 100})
    assert only(moves(plain, shifted)).digest == old.digest
    draining = seen(plain, revisions=(live(old, RevisionState.STOPPING), live(new)), weights={new.digest: 100})
    assert isinstance(only(moves(plain, draining)), Done)


def test_while_a_candidate_is_made_what_serves_keeps_serving(model, all_stages):
    full = model(**all_stages)
    old = older(full)
    observed = seen(full, [Stage.SOURCE], revisions=(live(old),), weights={old.digest: 100}, known_revisions=known(old))
    assert only(moves(full, observed)).request.stage == "train"


def test_an_engine_that_does_not_come_up_is_refused_and_the_old_one_stays(model):
    plain = model(serve={})
    new, old = revision(plain), older(plain)
    failed = live(new, RevisionState.FAILED, "no memory.")
    move = only(moves(plain, seen(plain, revisions=(live(old), failed), weights={old.digest: 100})))
    assert (move.reason, move.stage) == ("EngineFailed", "serve")
    assert "did not come up: no memory." in move.because
    assert f"Revision {old.short} keeps the traffic" in move.because


def test_an_engine_that_died_under_traffic_is_named(model):
    plain = model(serve={})
    new = revision(plain)
    observed = seen(plain, revisions=(live(new, RevisionState.FAILED),), weights={new.digest: 100})
    assert only(moves(plain, observed)).reason == "EngineFailed"


def test_a_failed_revision_that_is_no_longer_wanted_is_taken_away(model):
    plain = model(serve={})
    new, old = revision(plain), older(plain)
    observed = seen(plain, revisions=(live(old, RevisionState.FAILED), live(new)), weights={new.digest: 100})
    assert only(moves(plain, observed)).digest == old.digest


def test_what_has_the_traffic_comes_back_when_the_cluster_died(model, all_stages):
    full = model(**all_stages)
    old = older(full)
    routes = {"weights": {old.digest: 100}, "known_revisions": known(old)}
    back, run = moves(full, seen(full, [Stage.SOURCE], **routes))
    assert isinstance(back, StartRevision)
    assert back.revision == old
    assert run.request.stage == "train"
    refused = moves(full, seen(full, measured=BAD, **routes))
    assert [type(move) for move in refused] == [StartRevision]
    again = moves(full, seen(full, measured=BAD, revisions=(live(old, RevisionState.STARTING),), **routes))
    assert only(again).reason == "GateFailed"


def test_a_successor_that_may_serve_is_started_rather_than_its_dead_predecessor(model):
    plain = model(serve={})
    old = older(plain)
    observed = seen(plain, weights={old.digest: 100}, known_revisions=known(old))
    assert only(moves(plain, observed)).revision == revision(plain)


def test_a_ready_revision_is_not_stopped_when_the_routes_were_lost(model, all_stages):
    full = model(**all_stages)
    old = older(full)
    observed = seen(full, [Stage.SOURCE], revisions=(live(old),), known_revisions=known(old))
    assert not any(isinstance(move, StopRevision) for move in moves(full, observed))


def test_a_revision_that_is_being_taken_away_can_be_wanted_again(model):
    plain = model(serve={})
    new = revision(plain)
    assert isinstance(only(moves(plain, seen(plain, revisions=(live(new, RevisionState.STOPPING),)))), StartRevision)


def test_a_model_without_serve_is_taken_off_the_air(model):
    plain = model()
    old = older(plain)
    routed = seen(plain, revisions=(live(old),), weights={old.digest: 100})
    assert only(moves(plain, routed)).weights == {}
    assert only(moves(plain, seen(plain, revisions=(live(old),)))).digest == old.digest
    assert isinstance(only(moves(plain, seen(plain))), Done)


def test_counts_of_replicas_and_targets_are_not_part_of_a_revision(model):
    one, other = model(serve={}), model(serve={"replicas": {"min": 2}, "target": {"queue": 9}, "streamLimit": "1m"})
    assert revision(one) == revision(other)
    assert revision(one) != revision(model(serve={"context": 64}))
    assert revision(one) != revision(model(name="other", serve={}))


# -- rollback -------------------------------------------------------------------------------------------------------


def test_a_rollback_takes_the_traffic_back_and_stays(model):
    plain = model(serve={})
    new, old = revision(plain), older(plain)
    pinned = {"pin": Pin(old.digest, new.digest), "known_revisions": known(old, new)}
    start = only(moves(plain, seen(plain, revisions=(live(new),), weights={new.digest: 100}, **pinned)))
    assert start.revision == old
    assert "Rolled back from" in start.because
    both = seen(plain, revisions=(live(new), live(old)), weights={new.digest: 100}, **pinned)
    assert only(moves(plain, both)).weights == {old.digest: 100}
    stop = only(moves(plain, seen(plain, revisions=(live(new), live(old)), weights={old.digest: 100}, **pinned)))
    assert stop.digest == new.digest
    done = only(moves(plain, seen(plain, revisions=(live(old),), weights={old.digest: 100}, **pinned)))
    assert isinstance(done, Done)
    assert "rolled back" in done.because


def test_a_rollback_is_over_when_the_manifest_asks_for_something_else(model):
    plain, changed = model(serve={}), model(serve={"context": 64})
    new, old = revision(plain), older(plain)
    observed = seen(
        changed,
        revisions=(live(old),),
        weights={old.digest: 100},
        pin=Pin(old.digest, new.digest),
        known_revisions=known(old, new),
    )
    unpin, start = moves(changed, observed)
    assert isinstance(unpin, Unpin)
    assert start.revision == revision(changed)


def test_a_rollback_holds_while_the_next_candidate_is_made(model, all_stages):
    full = model(**all_stages)
    new, old = revision(full), older(full)
    observed = seen(
        full,
        [Stage.SOURCE],
        revisions=(live(new), live(old)),
        weights={new.digest: 100},
        pin=Pin(old.digest, new.digest),
        known_revisions=known(old, new),
    )
    shift, run = moves(full, observed)
    assert shift.weights == {old.digest: 100}
    assert run.request.stage == "train"


def test_a_rollback_to_nowhere_is_refused_and_what_serves_keeps_serving(model):
    plain = model(serve={})
    new = revision(plain)
    observed = seen(
        plain,
        revisions=(live(new),),
        weights={new.digest: 100},
        pin=Pin("f" * 64, new.digest),
        known_revisions=known(new),
    )
    move = only(moves(plain, observed))
    assert move.reason == "RevisionNotFound"
    assert new.short in move.because


def test_what_had_the_traffic_comes_back_when_its_successor_fails(model):
    plain = model(serve={})
    new, old = revision(plain), older(plain)
    failed = (live(new, RevisionState.FAILED),)
    move = only(moves(plain, seen(plain, revisions=failed, weights={old.digest: 100}, known_revisions=known(old))))
    assert isinstance(move, StartRevision)
    assert move.revision == old
