"""The annotation becomes a pin once, in one write that nobody else's is lost by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kube_objects import KubeObjects

from fastserve.cluster.kube.api import KubeApi
from fastserve.cluster.kube.home import KubeHome
from fastserve.cluster.kube.rollback import ROLLBACK, roll_back
from fastserve.cluster.local import Beat
from fastserve.errors import StateChanged
from fastserve.plan import keys
from fastserve.plan.observed import Committed, Observed, Pin
from fastserve.plan.pipeline import wanted_revision
from fastserve.plan.revision import Revision
from fastserve.plan.stages import Stage
from fastserve.spec.model import Model

PATH = "/apis/fastserve.dev/v1alpha1/namespaces/demo/models/one"
DIGESTS = {"hf://org/small": "d" * 64}
OLD = Revision("one", Stage.SOURCE, "old", "bytes", {})


def model(**serve: Any) -> Model:
    spec = {"source": "hf://org/small", "serve": serve}
    value = {"apiVersion": "fastserve.dev/v1alpha1", "kind": "Model", "metadata": {"name": "one"}, "spec": spec}
    return Model.model_validate(value, by_alias=True)


def beat(made: bool = True, **serve: Any) -> Beat:
    """A look at the model, whose source is there."""
    key = keys.stage_keys(model(**serve), DIGESTS)[Stage.SOURCE]
    committed = {key: Committed(Stage.SOURCE, key, "e" * 64, 1)} if made else {}
    observed = Observed(digests=DIGESTS, committed=committed, weights={OLD.digest: 100})
    return Beat(model(**serve), observed, ())


def wanted(seen: Beat) -> Revision:
    found = wanted_revision(seen.model, seen.observed, keys.stage_keys(seen.model, seen.observed.digests))
    assert found is not None
    return found


def asked(objects: KubeObjects, word: str | None) -> dict[str, Any]:
    annotations = {} if word is None else {ROLLBACK: word}
    return objects.put(PATH, {"metadata": {"name": "one", "annotations": annotations}, "spec": {"source": "x"}})


def home(api: KubeApi, folder: Path, seen: Beat) -> KubeHome:
    found = KubeHome(api, "demo", folder, "s3://bucket/demo")
    found.look()
    for at, revision in enumerate((OLD, wanted(seen))):
        found.keep_revision(revision, at)
    return found


def test_nobody_asked(api: KubeApi, objects: KubeObjects, tmp_path: Path) -> None:
    for word in (None, "", "  "):
        found = asked(objects, word)
        assert roll_back(home(api, tmp_path, beat()), found, beat()) is None


def test_the_pin_and_the_note_are_one_write(api: KubeApi, objects: KubeObjects, tmp_path: Path) -> None:
    found, seen = asked(objects, f"{OLD.short}@7"), beat()
    there = home(api, tmp_path, seen)
    before = len(objects.calls)
    told = roll_back(there, found, seen)
    assert told is not None
    assert told["revision"] == OLD.digest
    assert [method for method, _ in objects.calls[before:]] == ["PATCH"]
    again = home(api, tmp_path, seen)
    assert again.pin("one") == Pin(OLD.digest, wanted(seen).digest)
    assert roll_back(again, found, seen) is None
    again.set_pin("one", None)  # a changed manifest
    assert roll_back(again, found, seen) is None, "the same value is not obeyed again"
    assert roll_back(again, asked(objects, f"{OLD.short}@8"), seen) is not None


def test_who_wrote_in_between_is_not_overwritten(api: KubeApi, objects: KubeObjects, tmp_path: Path) -> None:
    found, seen = asked(objects, OLD.short), beat()
    there, other = home(api, tmp_path, seen), KubeHome(api, "demo", tmp_path / "other", "s3://bucket/demo")
    other.look()
    other.set_weights("one", {OLD.digest: 100})
    with pytest.raises(StateChanged):
        roll_back(there, found, seen)
    other.look()
    assert (other.pin("one"), other.rollback("one")) == (None, None)


def test_a_refusal_changes_nothing_but_the_note(api: KubeApi, objects: KubeObjects, tmp_path: Path) -> None:
    found, seen = asked(objects, "nonsense"), beat()
    there = home(api, tmp_path, seen)
    there.set_pin("one", Pin("a" * 64, "b" * 64))
    told = roll_back(there, found, seen)
    assert told is not None
    assert "revision" not in told
    assert OLD.short in told["message"]
    assert there.pin("one") == Pin("a" * 64, "b" * 64)
    early = roll_back(there, asked(objects, "previous@2"), beat(made=False))
    assert early is not None
    assert "has no revision of what its manifest asks for yet" in early["message"]


def test_the_wanted_one_is_pinned_only_where_there_are_steps(
    api: KubeApi, objects: KubeObjects, tmp_path: Path
) -> None:
    for number, serve in enumerate(({}, {"rollout": {"steps": [5, 100]}})):
        seen = beat(**serve)
        found = asked(objects, f"{wanted(seen).digest}@{number}")
        there = home(api, tmp_path / str(number), seen)
        told = roll_back(there, found, seen)
        assert told is not None
        assert "what the manifest asks for" in told["message"]
        assert there.pin("one") == (Pin(wanted(seen).digest, wanted(seen).digest) if serve else None)
