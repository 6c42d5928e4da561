from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

from api_server import Resource
from hypothesis import given
from hypothesis import strategies as st

from fastserve.cluster.kube.pods import PodTrouble
from fastserve.plan.moves import Done, Wait
from fastserve.spec import status as schemas
from fastserve.spec.crd import crds
from fastserve_operator.conditions import Trouble
from fastserve_operator.story import moving_to, pruned, same, status_of_object

NOW = "2027-01-02T03:04:05Z"
SCHEMA = crds()["models"]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
DIGEST = "a" * 64


def found(**status: Any) -> dict[str, Any]:
    return {
        "apiVersion": "fastserve.dev/v1alpha1",
        "kind": "Model",
        "metadata": {"name": "m", "namespace": "demo", "generation": 3, "uid": "u"},
        "spec": {"source": "hf://org/small", "serve": {}},
        **({"status": status} if status else {}),
    }


def story(**more: Any) -> dict[str, Any]:
    return {
        "name": "m",
        "stages": {
            "source": {
                "state": "committed",
                "key": "k",
                "digest": DIGEST,
                "sizeBytes": 12,
                "metrics": {"a": {"b": [1, math.nan]}, "inf": math.inf, "none": None},
            },
            "train": {"state": "running", "key": "k", "attempt": 1, "progress": None},
        },
        "gate": None,
        "revisions": [
            {"digest": DIGEST, "state": "ready", "weight": 100, "replicas": 2, "message": "", "unknown": 1},
            {"digest": "b" * 64, "state": "starting", "weight": 0, "replicas": 0, "message": ""},
        ],
        "adapters": [{"name": "de", "state": "serving", "digest": DIGEST, "rank": 8, "revisions": [DIGEST]}],
        "pin": None,
        "url": "http://gateway/v1",
        "conditions": [{"type": "Ready", "status": "True", "reason": "Ready", "message": "It serves."}],
        "why": ["It serves."],
        **more,
    }


def test_the_story_fits_the_definition_to_the_letter() -> None:
    status = status_of_object(found(), story(), [Done(because="It serves.")], None, NOW)
    stored = Resource(SCHEMA).admit({**found(), "status": status})
    assert stored["status"] == status
    assert status["revision"] == "aaaaaaaa"
    assert status["replicas"] == 2
    assert status["observedGeneration"] == 3
    assert [item["type"] for item in status["conditions"]] == ["Ready", "Source", "Train", "Serve"]
    assert status["stages"]["source"]["metrics"] == {"a": {"b": [1]}}


def test_trouble_takes_the_place_of_ready_and_hides_nothing_else() -> None:
    status = status_of_object(found(), story(), [], Trouble("SourceNotFound", "gone", False), NOW)
    ready = status["conditions"][0]
    assert (ready["status"], ready["reason"], ready["message"]) == ("False", "SourceNotFound", "gone")
    assert status["url"] == "http://gateway/v1"
    assert status["conditions"][-1]["status"] == "True"


def test_a_cluster_that_does_not_answer_leaves_what_was_known() -> None:
    known = status_of_object(found(), story(), [], None, NOW)
    status = status_of_object(found(**known), None, [], Trouble("ClusterFailed", "no answer", True), NOW)
    assert status["url"] == known["url"]
    assert status["stages"] == known["stages"]
    ready = next(item for item in status["conditions"] if item["type"] == "Ready")
    assert (ready["status"], ready["reason"]) == ("Unknown", "ClusterFailed")


def test_what_is_refused_at_first_has_a_condition_and_nothing_else() -> None:
    status = status_of_object(found(), None, [], Trouble("ManifestInvalid", "spec.x: y", False), NOW)
    assert set(status) == {"observedGeneration", "conditions", "why"}


def test_the_same_story_is_told_once() -> None:
    moves = [Wait(because="It loads.", stage="serve")]
    first = status_of_object(found(), story(), moves, None, NOW)
    later = status_of_object(found(**first), story(), moves, None, "2027-06-01T00:00:00Z")
    assert same(later, first)
    turned = {**first, "conditions": first["conditions"][::-1]}
    assert same(later, turned)
    assert not same(status_of_object(found(**first), story(url=None), moves, None, NOW), first)
    assert not same(first, None)


texts = st.text(st.characters(exclude_categories=()), max_size=3)
"""Halves of letters too: the name of a file may hold them."""

values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(metrics=st.dictionaries(texts, values, max_size=4))
def test_what_is_kept_once_is_kept_again(metrics: dict[str, Any]) -> None:
    """Otherwise every look would write: the server would hold something else than was sent."""
    schema = schemas.of_model()
    once = pruned(schema, {"stages": {"train": {"state": "committed", "metrics": metrics, "odd": 1}}, "odd": 2})
    assert pruned(schema, once) == once
    assert json.loads(json.dumps(once).encode().decode()) == once
    json.dumps(once, ensure_ascii=False).encode()  # all of it are letters
    assert "odd" not in once


HEAD = PodTrouble("fastserve", None, "OutOfMemory", "pod h of the head: OOMKilled; raise it")
L4 = PodTrouble("fastserve", "l4", "Unschedulable", "pod w of profile l4: no room; add one")


def reasons(pods: list[PodTrouble], trouble: Trouble | None = None, **more: Any) -> dict[str, str]:
    """Reasons of the conditions of a Model that trains, and serves on l4."""
    model = found()
    model["spec"] |= {"serve": {"profiles": ["l4"]}, "train": {"workers": [{"profile": "h100", "count": 2}]}}
    waits = {"type": "Ready", "status": "False", "reason": "Working", "message": "It is trained."}
    status = status_of_object(model, story(**{"conditions": [waits], **more}), [], trouble, NOW, pods=pods)
    return {item["type"]: item["reason"] for item in status["conditions"]}


def test_a_move_and_what_it_waits_for_stand_in_the_condition_serve_alone() -> None:
    sentence = moving_to("new", "", {"spec": {"serve": {"profiles": ["l4"]}}}, [HEAD, replace(L4, cluster="new")])
    assert sentence == (
        "It moves to RayCluster new and is served where it is until it answers there; that waits: "
        "pod w of profile l4: no room; add one"
    )
    status = status_of_object(found(), story(), [], None, NOW, moving=sentence)
    told = {item["type"]: item["message"] for item in status["conditions"]}
    assert told["Serve"] == f"Revision {DIGEST[:8]} answers. {sentence}"
    assert [kind for kind, message in told.items() if sentence in message] == ["Serve"]
    assert status["why"] == ["It serves.", sentence]
    down = [{"digest": DIGEST, "state": "starting", "weight": 0, "replicas": 0, "message": ""}]
    silent = status_of_object(found(), story(revisions=down), [], None, NOW, moving=sentence)
    assert sentence not in str(silent)
    assert "waits" not in moving_to("new", "", found(), [HEAD])
    assert "taken away" in moving_to("", "the Secret was taken away", found(), [])


def test_what_a_pod_says_stands_in_the_condition_that_waits_for_it() -> None:
    starting = [{"digest": DIGEST, "state": "starting", "weight": 0, "replicas": 0, "message": ""}]
    told = reasons([L4], revisions=starting)
    assert told == {"Ready": "Unschedulable", "Source": "Committed", "Train": "Running", "Serve": "Unschedulable"}
    told = reasons([HEAD], revisions=[])
    assert told == {"Ready": "OutOfMemory", "Source": "Committed", "Train": "OutOfMemory", "Serve": "Waiting"}
    h100 = PodTrouble("fastserve", "h100", "ImagePull", "pod w of profile h100: ImagePullBackOff")
    assert reasons([h100], revisions=[])["Train"] == "ImagePull"
    assert reasons([], revisions=[])["Ready"] == "Working"


def test_a_stage_that_gets_on_and_a_model_that_answers_do_not_wait_for_a_pod() -> None:
    train = {"state": "running", "key": "k", "attempt": 1, "progress": {"done": 3, "total": 9, "unit": "steps"}}
    told = reasons([HEAD, L4], stages={"train": train})
    assert told == {"Ready": "Working", "Train": "Running", "Serve": "Serving"}
    ready = {"type": "Ready", "status": "True", "reason": "Ready", "message": "It serves."}
    assert reasons([L4], conditions=[ready])["Ready"] == "Ready"


def test_a_head_that_does_not_answer_says_why_where_its_pod_does() -> None:
    silent = Trouble("ClusterFailed", "the head does not answer", True)
    for told in (None, story()):
        status = status_of_object(found(), told, [], silent, NOW, pods=[L4, HEAD])
        ready = next(item for item in status["conditions"] if item["type"] == "Ready")
        assert (ready["status"], ready["reason"]) == ("Unknown", "OutOfMemory")
        assert ready["message"] == "pod h of the head: OOMKilled; raise it (the head does not answer)"
    bad = Trouble("SourceNotFound", "it is not there", False)
    assert status_of_object(found(), None, [], bad, NOW, pods=[HEAD])["conditions"][0]["reason"] == "SourceNotFound"
