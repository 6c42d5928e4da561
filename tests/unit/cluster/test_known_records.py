"""A model that is done asks the store for its records once a minute, every other one at each look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from model_files import write_model

from fastserve.artifacts import attempts
from fastserve.artifacts.store import Store
from fastserve.artifacts.stores import open_store
from fastserve.cluster.known_records import KNOWN_SECONDS, KnownRecords
from fastserve.plan.keys import request_for, stage_keys
from fastserve.plan.moves import Done, Move, Wait
from fastserve.plan.stages import Stage
from fastserve.spec.model import Model

DIGESTS = {"hf://org/small": "d" * 64}


def committed(folder: Path) -> tuple[Store, str]:
    value = {"apiVersion": "fastserve.dev/v1alpha1", "kind": "Model", "metadata": {"name": "m"}}
    model = Model.model_validate(value | {"spec": {"source": "hf://org/small"}})
    store, request = open_store(str(folder / "store")), request_for(model, Stage.SOURCE, DIGESTS, 1)
    write_model(folder / "model")
    attempts.claim(store, request)
    attempts.commit(store, request, folder / "model", {}, {})
    return store, stage_keys(model, DIGESTS)[Stage.SOURCE]


def test_it_is_asked_for_again_after_a_while_and_at_once_when_something_is_due(tmp_path: Path) -> None:
    store, key = committed(tmp_path)
    now = [0.0]
    records = KnownRecords(lambda: now[0])

    def look(*moves: Move) -> bool:
        records.begin("m")
        found = records.find(store, Stage.SOURCE, key) is not None
        records.end("m", moves)
        return found

    done: Sequence[Move] = [Done(because="It is done.")]
    assert look(*done)
    store.delete(f"artifacts/source/{key}/record.json")
    assert look(*done), "it is believed for a while"
    now[0] += KNOWN_SECONDS + 1
    assert not look(*done)
    assert not look(), "what is not there is never remembered"


def test_a_model_with_something_to_do_believes_nothing(tmp_path: Path) -> None:
    store, key = committed(tmp_path)
    records = KnownRecords(lambda: 0.0)
    for moves in (
        [Wait(because="It waits.", stage="source")],
        [Done(because="One."), Wait(because="Two.", stage="source")],
        [],
    ):
        records.begin("m")
        assert records.find(store, Stage.SOURCE, key) is not None
        records.end("m", moves)
    store.delete(f"artifacts/source/{key}/record.json")
    records.begin("m")
    assert records.find(store, Stage.SOURCE, key) is None
