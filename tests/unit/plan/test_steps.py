"""A rollout by steps: forward while the new revision is no worse, back as soon as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastserve.plan.keys import outside, stage_keys
from fastserve.plan.moves import Done, Refuse, RollBack, Shift, StartRevision, StopRevision, Unpin, Wait
from fastserve.plan.observed import Committed, LiveRevision, Observed, Pin, Place, RevisionState, Window
from fastserve.plan.pipeline import next_moves, wanted_revision
from fastserve.plan.revision import Revision
from fastserve.plan.stages import Stage
from fastserve.plan.steps import ROLLED_BACK, step_of

NOW = 1_000_000.0
STEPS = {"steps": [5, 25, 100], "hold": "60s"}
OLD = Revision("chat", Stage.SOURCE, "old key", "old bytes", {"task": "generate"})


@pytest.fixture
def stepped(model):
    return model(serve={"rollout": STEPS})


def seen(model, **rest):
    """A snapshot with the source committed."""
    digests = {item.ident: f"digest of {item.ident}" for item in outside(model)}
    keys = stage_keys(model, digests)
    artifact = Committed(Stage.SOURCE, keys[Stage.SOURCE], "bytes", 1)
    bare = Observed(digests=digests, committed={artifact.key: artifact})
    new = wanted_revision(model, bare, keys)
    known = {item.digest: item.to_json() for item in (OLD, new)}
    return new, replace(bare, **{"known_revisions": known, "proven": OLD.digest} | rest)


def at_step(model, share, new_window=None, old_window=None, seconds=30.0, **rest):
    """Both revisions ready, the new one with `share` percent for so long."""
    new, _ = seen(model)
    windows = {}
    if new_window is not None:
        windows = {new.digest: new_window, OLD.digest: old_window or Window(new_window.seconds, 1000)}
    both = {
        "revisions": (LiveRevision(OLD.digest, RevisionState.READY), LiveRevision(new.digest, RevisionState.READY)),
        "weights": {OLD.digest: 100 - share, new.digest: share} if share else {OLD.digest: 100},
        "shifted_at": NOW - seconds,
        "windows": windows,
    }
    return seen(model, **(both | rest))


def moves(model, observed):
    return next_moves(model, observed, NOW)


def only(found):
    (move,) = found
    return move


def test_a_ready_revision_takes_its_first_step_beside_the_old_one(stepped):
    new, observed = at_step(stepped, 0)
    shift = only(moves(stepped, observed))
    assert shift.weights == {OLD.digest: 95, new.digest: 5}
    assert "first step" in shift.because


def test_the_first_revision_of_a_model_takes_all_traffic(stepped):
    new, observed = seen(stepped, proven=None)
    ready = replace(observed, revisions=(LiveRevision(new.digest, RevisionState.READY),))
    assert only(moves(stepped, ready)).weights == {new.digest: 100}


def test_a_step_is_held_and_then_the_next_one_taken(stepped):
    new, held = at_step(stepped, 5, Window(30, 50))
    assert "watched for 60 s" in only(moves(stepped, held)).because
    for share, following in ((5, {OLD.digest: 75, new.digest: 25}), (25, {new.digest: 100})):
        _, over = at_step(stepped, share, Window(60, 50), seconds=60)
        shift = only(moves(stepped, over))
        assert shift.weights == following
        assert "was no worse than" in shift.because


def test_at_the_end_the_old_revision_is_stopped_and_all_is_done(stepped):
    new, observed = at_step(stepped, 5)
    whole = replace(observed, weights={new.digest: 100}, proven=new.digest)
    assert isinstance(only(moves(stepped, whole)), StopRevision)
    alone = replace(whole, revisions=whole.revisions[1:])
    assert isinstance(only(moves(stepped, alone)), Done)


def test_a_bad_revision_is_rolled_back_with_its_figures_and_stays_so(stepped):
    new, observed = at_step(stepped, 5, Window(10, 100, 8))
    back, shift = moves(stepped, observed)
    assert isinstance(back, RollBack)
    assert back.pin == Pin(OLD.digest, new.digest, ROLLED_BACK, back.because)
    assert "8 of 100 requests failed" in back.because
    assert shift.weights == {OLD.digest: 100}
    pinned = replace(observed, weights={OLD.digest: 100}, windows={}, pin=back.pin)
    assert only(moves(stepped, pinned)).digest == new.digest, "it is stopped"
    rest = replace(pinned, revisions=pinned.revisions[:1])
    refusal = only(moves(stepped, rest))
    assert (refusal.reason, refusal.because) == (ROLLED_BACK, back.because)
    # Asking again takes the pin away, and it is tried anew.
    assert only(moves(stepped, replace(rest, pin=None))).revision == new


def test_another_manifest_ends_an_automatic_rollback(stepped, model):
    new, observed = at_step(stepped, 0, pin=Pin(OLD.digest, seen(stepped)[0].digest, ROLLED_BACK, "It was slow."))
    changed = model(serve={"rollout": STEPS, "context": 64})
    first, *rest = moves(changed, observed)
    assert isinstance(first, Unpin)
    assert any(isinstance(move, StartRevision) and move.revision != new for move in rest)


@pytest.mark.parametrize("state", [RevisionState.STARTING, RevisionState.FAILED])
def test_an_engine_that_dies_during_a_step_is_rolled_back(stepped, state):
    new, observed = at_step(stepped, 25, Window(10, 100))
    dead = replace(observed, revisions=(observed.revisions[0], LiveRevision(new.digest, state, "out of memory.")))
    back, shift = moves(stepped, dead)
    assert "its engine stopped answering (out of memory)" in back.because
    assert shift.weights == {OLD.digest: 100}


def test_a_revision_that_went_down_with_its_cluster_begins_its_steps_anew(stepped):
    new, observed = at_step(stepped, 25, Window(10, 100))
    starting = (observed.revisions[0], LiveRevision(new.digest, RevisionState.STARTING))
    shift = only(moves(stepped, replace(observed, revisions=starting, cluster_since=NOW - 1)))
    assert shift.weights == {OLD.digest: 100}
    gone = replace(observed, revisions=observed.revisions[:1])
    assert only(moves(stepped, gone)).weights == {OLD.digest: 100}


def test_a_revision_that_rests_at_no_replica_is_not_dead(stepped):
    new, observed = at_step(stepped, 25, Window(10, 0))
    place = Place("local", RevisionState.STARTING, 0, 0)
    resting = LiveRevision(new.digest, RevisionState.STARTING, places=(place,))
    assert isinstance(only(moves(stepped, replace(observed, revisions=(observed.revisions[0], resting)))), Wait)


@pytest.mark.parametrize("state", [RevisionState.STARTING, RevisionState.FAILED])
def test_a_candidate_that_does_not_come_up_gets_no_traffic(stepped, state):
    new, observed = at_step(stepped, 0)
    failed = replace(observed, revisions=(observed.revisions[0], LiveRevision(new.digest, state, "no memory")))
    move = only(moves(stepped, failed))
    if state is RevisionState.FAILED:
        assert (move.reason, OLD.short in move.because) == ("EngineFailed", True)
    else:
        assert isinstance(move, Wait)


def test_an_engine_that_never_comes_up_is_refused_after_an_hour(stepped):
    new, observed = at_step(stepped, 0)
    for since, late in ((NOW - 3500, False), (NOW - 3700, True)):
        starting = LiveRevision(new.digest, RevisionState.STARTING, since=since)
        move = only(moves(stepped, replace(observed, revisions=(observed.revisions[0], starting))))
        assert isinstance(move, Refuse if late else Wait)
    again = replace(observed, revisions=(observed.revisions[0], starting), cluster_since=NOW - 100)
    assert isinstance(only(moves(stepped, again)), Wait), "the cluster itself has just started"


def test_without_the_gateways_figures_nothing_is_decided(stepped):
    _, early = at_step(stepped, 5, seconds=170)
    assert isinstance(only(moves(stepped, early)), Wait)
    _, late = at_step(stepped, 5, seconds=190)
    refusal = only(moves(stepped, late))
    assert (refusal.reason, refusal.stage) == ("ClusterFailed", "serve")
    assert "for 180 s the gateway has not told" in refusal.because


@pytest.mark.parametrize("shifted_at", [None, NOW + 5000])
def test_a_step_of_unknown_age_is_watched_from_now_on(stepped, shifted_at):
    new, observed = at_step(stepped, 5, Window(600, 500), shifted_at=shifted_at)
    assert only(moves(stepped, observed)).weights == {OLD.digest: 95, new.digest: 5}


def test_when_the_old_revision_does_not_come_back_the_new_one_takes_over(stepped):
    new, observed = at_step(stepped, 5, Window(60, 100), seconds=60)
    starting = (LiveRevision(OLD.digest, RevisionState.STARTING), observed.revisions[1])
    assert only(moves(stepped, replace(observed, revisions=starting))).weights == {new.digest: 100}
    early = replace(observed, revisions=starting, windows={key: Window(20, 50) for key in observed.windows})
    assert isinstance(only(moves(stepped, early)), Wait)
    gone = replace(early, revisions=observed.revisions[1:])
    assert only(moves(stepped, gone)).weights == {new.digest: 100}


def test_a_bad_revision_is_not_left_for_an_old_one_that_does_not_answer(stepped):
    _, observed = at_step(stepped, 5, Window(10, 100, 50))
    starting = replace(observed, revisions=(LiveRevision(OLD.digest, RevisionState.STARTING), observed.revisions[1]))
    back = only(moves(stepped, starting))
    assert isinstance(back, RollBack)
    assert isinstance(only(moves(stepped, replace(starting, pin=back.pin))), Wait)
    assert moves(stepped, replace(observed, pin=back.pin))[0].weights == {OLD.digest: 100}


def test_a_third_revision_sends_the_second_home_first(stepped, model):
    _, observed = at_step(stepped, 25, Window(10, 100))
    third = model(serve={"rollout": STEPS, "context": 64})
    wanted, bare = seen(third)
    observed = replace(observed, known_revisions={**observed.known_revisions, **bare.known_revisions})
    found = moves(third, observed)
    assert [move.weights for move in found if isinstance(move, Shift)] == [{OLD.digest: 100}]
    assert [move.revision for move in found if isinstance(move, StartRevision)] == [wanted]
    assert not any(isinstance(move, StopRevision) for move in found), "it still has weight"


def test_back_to_the_proven_revision_goes_at_once(stepped, model):
    other = model(serve={"rollout": STEPS, "context": 64})
    candidate, _ = seen(other)
    new, observed = seen(stepped)
    mid = replace(
        observed,
        proven=new.digest,
        revisions=tuple(LiveRevision(item.digest, RevisionState.READY) for item in (new, candidate)),
        weights={new.digest: 75, candidate.digest: 25},
        shifted_at=NOW,
    )
    assert only(moves(stepped, mid)).weights == {new.digest: 100}


def test_while_the_next_candidate_is_made_traffic_is_not_left_shared(model, all_stages):
    all_stages["serve"] = {"rollout": STEPS}
    full = model(**all_stages)
    second = Revision("chat", Stage.SOURCE, "second", "second", {"task": "generate"})
    digests = {item.ident: f"digest of {item.ident}" for item in outside(full)}
    observed = Observed(
        digests=digests,
        revisions=tuple(LiveRevision(item.digest, RevisionState.READY) for item in (OLD, second)),
        weights={OLD.digest: 25, second.digest: 75},
        proven=OLD.digest,
        known_revisions={item.digest: item.to_json() for item in (OLD, second)},
    )
    shift, run = moves(full, observed)
    assert shift.weights == {OLD.digest: 100}
    assert run.request.stage == "source"


def test_a_rollback_by_hand_moves_all_traffic_at_once(stepped):
    new, observed = at_step(stepped, 25, Window(10, 100), pin=Pin(OLD.digest, seen(stepped)[0].digest))
    assert moves(stepped, observed)[0].weights == {OLD.digest: 100}
    # Also to the wanted one, when it is named.
    named = replace(observed, pin=Pin(new.digest, new.digest))
    assert only(moves(stepped, named)).weights == {new.digest: 100}


def test_without_steps_the_new_revision_takes_all_traffic_when_it_is_ready(stepped, model):
    plain = model(serve={})
    new, observed = at_step(plain, 0)
    assert only(moves(plain, observed)).weights == {new.digest: 100}
    _, shared = at_step(plain, 25, Window(10, 100, 90))
    assert only(moves(plain, shared)).weights == {new.digest: 100}, "rollout was removed from the manifest"


def test_changed_steps_go_on_from_where_the_traffic_is(model):
    changed = model(serve={"rollout": {"steps": [10, 50, 100], "hold": "60s"}})
    new, observed = at_step(changed, 25, Window(60, 100), seconds=60)
    assert only(moves(changed, observed)).weights == {OLD.digest: 50, new.digest: 50}


def test_where_a_rollout_stands(stepped):
    new, observed = at_step(stepped, 25, Window(12, 100))
    rollout = stepped.spec.serve.rollout
    step = step_of(observed, new.digest, rollout)
    assert (step.old, step.weight, step.number, step.watched_seconds) == (OLD.digest, 25, 2, 12)
    _, whole = at_step(stepped, 0)
    assert step_of(whole, new.digest, rollout) is None
    assert step_of(observed, new.digest, None) is None
