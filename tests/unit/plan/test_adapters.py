"""Adapters are brought in before they are told of, and a bad one holds nobody up."""

from __future__ import annotations

import pytest

from fastserve.plan.adapters import adapter_key, adapter_keys
from fastserve.plan.keys import outside, stage_keys
from fastserve.plan.moves import Done, Refuse, RunStage, StartRevision, Wait
from fastserve.plan.observed import Attempt, AttemptState, Committed, LiveRevision, Observed, RevisionState
from fastserve.plan.pipeline import next_moves, wanted_revision
from fastserve.plan.stages import Stage

A48 = {"name": "a48", "source": "file:///adapters/a48"}
HEAD = {"name": "head", "source": "file:///adapters/head"}
LARGE = {"name": "large", "source": "file:///adapters/large"}


def digests(model):
    return {item.ident: f"digest of {item.ident}" for item in outside(model)}


def seen(model, ranks=None, **rest):
    """The model's source committed, and the adapters of `ranks`, by name."""
    known = digests(model)
    source = stage_keys(model, known)[Stage.SOURCE]
    keys = adapter_keys(model, known)
    committed = {source: Committed(Stage.SOURCE, source, "model bytes", 1)} | {
        keys[name]: Committed(Stage.SOURCE, keys[name], f"bytes of {name}", 1, {"rank": rank})
        for name, rank in (ranks or {}).items()
    }
    return Observed(digests=known, committed=committed, **rest)


def serving(observed, revision):
    live = LiveRevision(revision.digest, RevisionState.READY, replicas=1)
    known = {revision.digest: revision.to_json()}
    return Observed(
        digests=observed.digests,
        committed=observed.committed,
        attempts=observed.attempts,
        revisions=(live,),
        weights={revision.digest: 100},
        known_revisions=known,
    )


def revision_of(model, observed):
    return wanted_revision(model, observed, stage_keys(model, observed.digests))


def test_an_adapter_that_is_not_in_the_store_is_brought_in_first(model):
    wanted = model(serve={"adapters": [A48]})
    (move,) = next_moves(wanted, seen(wanted), 0.0)
    assert isinstance(move, RunStage)
    request = move.request
    assert request.stage is Stage.SOURCE
    assert request.key == adapter_key("digest of file:///adapters/a48")
    assert request.section["adapter"]["uri"] == "file:///adapters/a48"
    assert request.data == {"file:///adapters/a48": "digest of file:///adapters/a48"}
    assert "Adapter a48" in move.because


def test_while_it_comes_the_engine_is_not_started_without_it(model):
    wanted = model(serve={"adapters": [A48]})
    key = adapter_keys(wanted, digests(wanted))["a48"]
    running = Attempt(1, AttemptState.RUNNING, model="chat")
    (move,) = next_moves(wanted, seen(wanted, attempts={key: running}), 0.0)
    assert isinstance(move, Wait)


def test_the_engine_is_started_for_the_largest(model):
    wanted = model(serve={"adapters": [A48]})
    (move,) = next_moves(wanted, seen(wanted, {"a48": 48}), 0.0)
    assert isinstance(move, StartRevision)
    assert move.revision.lora_rank == 64
    assert revision_of(model(serve={}), seen(model(serve={}))).lora_rank == 0


@pytest.mark.parametrize(("rank", "same"), [(8, True), (64, True), (65, False)])
def test_another_adapter_within_the_limit_is_no_new_revision(model, rank, same):
    one, two = model(serve={"adapters": [A48]}), model(serve={"adapters": [A48, LARGE]})
    before = revision_of(one, seen(one, {"a48": 48}))
    after = revision_of(two, seen(two, {"a48": 48, "large": rank}))
    assert (after == before) is same
    assert (after.digest == before.digest) is same


def test_the_same_adapter_with_other_bytes_is_no_new_revision(model):
    one, two = model(serve={"adapters": [A48]}), model(serve={"adapters": [A48 | {"source": "file:///other"}]})
    assert revision_of(one, seen(one, {"a48": 48})) == revision_of(two, seen(two, {"a48": 40}))


def test_a_bad_adapter_beside_a_good_one_changes_nothing_for_what_serves(model):
    one, two = model(serve={"adapters": [A48]}), model(serve={"adapters": [A48, HEAD]})
    before = revision_of(one, seen(one, {"a48": 48}))
    key = adapter_keys(two, digests(two))["head"]
    failed = Attempt(1, AttemptState.FAILED, "SourceInvalid", "modules_to_save", final=True)
    observed = serving(seen(two, {"a48": 48}, attempts={key: failed}), before)
    (move,) = next_moves(two, observed, 0.0)
    assert isinstance(move, Refuse)
    assert "Adapter head" in move.because
    assert "modules_to_save" in move.because


def test_a_bad_adapter_keeps_a_model_from_nothing(model):
    wanted = model(serve={"adapters": [HEAD]})
    key = adapter_keys(wanted, digests(wanted))["head"]
    failed = Attempt(1, AttemptState.FAILED, "SourceInvalid", "modules_to_save", final=True)
    observed = seen(wanted, attempts={key: failed})
    (move,) = next_moves(wanted, observed, 0.0)
    assert isinstance(move, StartRevision)
    assert move.revision.lora_rank == 0


def test_with_all_there_nothing_is_left_to_do(model):
    wanted = model(serve={"adapters": [A48, LARGE]})
    observed = seen(wanted, {"a48": 48, "large": 128})
    (move,) = next_moves(wanted, serving(observed, revision_of(wanted, observed)), 0.0)
    assert isinstance(move, Done)
