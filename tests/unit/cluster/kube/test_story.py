"""What the objects tell: with everything, with little, with nothing, and by an operator of another version."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kube_objects import KubeObjects

from fastserve.cli import stories
from fastserve.cluster.kube.api import RAY_CLUSTERS, KubeApi
from fastserve.cluster.kube.config import Reached
from fastserve.cluster.kube.door import Door
from fastserve.cluster.kube.keys import create_key, list_keys
from fastserve.cluster.kube.story import KubeModels, story_of
from fastserve.errors import ClusterFailed, UsageInvalid
from fastserve.spec.load import read
from fastserve.spec.model import API_VERSION

DIGEST = "ab" * 32
READY = {"type": "Ready", "status": "True", "reason": "Ready", "message": "It serves."}


def model(generation: int = 1, **status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "chat", "generation": generation}, "spec": {}, "status": status}


def test_a_model_that_nobody_has_looked_at_says_so() -> None:
    found = story_of({"metadata": {"name": "chat", "generation": 1}, "spec": {}})
    assert found["conditions"][0]["reason"] == "NotLookedAt"
    assert "Is one running" in found["why"][0]
    assert found["stage"] == "-"


def test_a_change_that_was_not_looked_at_is_not_called_ready() -> None:
    found = story_of(model(2, conditions=[READY], observedGeneration=1))
    ready = found["conditions"][0]
    assert (ready["status"], ready["reason"]) == ("Unknown", "NotLookedAt")
    assert ready["message"].endswith("before it: It serves.")


def test_a_deleted_one_is_not_called_ready() -> None:
    value = model(conditions=[READY], observedGeneration=1)
    value["metadata"]["deletionTimestamp"] = "2027-01-01T00:00:00Z"
    assert story_of(value)["conditions"][0]["reason"] == "Deleting"


def test_a_rollout_is_told_in_a_sentence() -> None:
    rollout = {"revision": DIGEST, "from": "cd" * 32, "weight": 5, "step": 1, "steps": [5, 100]}
    found = story_of(model(conditions=[READY], observedGeneration=1, rollout=rollout))
    assert found["rollout"]["message"] == "step 1 of 2: revision abababab has 5 % of traffic, cdcdcdcd the rest"


STAGE = st.fixed_dictionaries(
    {"state": st.sampled_from(["waiting", "running", "committed", "failed", "lost"])},
    optional={"key": st.text("0123456789abcdef", max_size=64), "attempt": st.integers(0, 3), "message": st.text()},
)
REVISION = st.fixed_dictionaries(
    {"digest": st.just(DIGEST)},
    optional={
        "state": st.sampled_from(["ready", "starting"]),
        "weight": st.integers(0, 100),
        "replicas": st.integers(0, 3),
        "places": st.lists(st.fixed_dictionaries({"profile": st.just("local")}, optional={"state": st.just("ready")})),
    },
)
STATUS = st.fixed_dictionaries(
    {},
    optional={
        "stages": st.dictionaries(st.sampled_from(["source", "train"]), STAGE),
        "revisions": st.lists(REVISION, max_size=2),
        "conditions": st.lists(st.just(READY), max_size=1),
        "why": st.lists(st.text(), max_size=2),
        "rollout": st.just({"revision": DIGEST}),
        "observedGeneration": st.integers(0, 3),
        "url": st.just("http://g/v1"),
    },
)


@given(STATUS)
def test_any_status_can_be_shown(status: dict[str, Any]) -> None:
    """Also one of an operator that wrote fewer keys."""
    found = story_of(model(**status))
    json.dumps(found)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        stories.details(found)
        stories.why(found)


@pytest.fixture
def objects() -> KubeObjects:
    found = KubeObjects()
    found.put("/api/v1/namespaces/demo", {"metadata": {"name": "demo"}})
    return found


def test_nothing_there_is_not_the_same_as_no_such_namespace(api: KubeApi) -> None:
    assert KubeModels(api, "demo").all() == []
    with pytest.raises(UsageInvalid, match=r"no namespace demos on the cluster; did you mean demo\?"):
        KubeModels(api, "demos").all()


@pytest.mark.parametrize("kind", ["models", "accesskeys", "rayclusters"])
def test_a_cluster_without_the_kinds_is_told_so(api: KubeApi, objects: KubeObjects, kind: str) -> None:
    answer, unknown = objects.answer, (404, {"message": "404 page not found\n"})
    objects.answer = lambda *call: unknown if f"/{kind}" in call[1] else answer(*call)  # type: ignore[method-assign]
    door = Door(Reached(api, "demo", None, None))
    ask: dict[str, Callable[[], object]] = {
        "models": door.models.all,
        "accesskeys": lambda: create_key(door, "team", ["chat"], None),
        "rayclusters": lambda: api.list(RAY_CLUSTERS, "demo"),
    }
    who = "KubeRay" if kind == "rayclusters" else "FastServe"
    with pytest.raises(ClusterFailed, match=f"{who} is not installed there; install its chart first"):
        ask[kind]()


def test_what_cannot_be_made_in_a_namespace_that_is_not_there_names_the_nearest(
    api: KubeApi, objects: KubeObjects
) -> None:
    answer, missing = objects.answer, (404, {"message": 'namespaces "dmo" not found'})
    objects.answer = lambda *call: missing if call[0] != "GET" else answer(*call)  # type: ignore[method-assign]
    door = Door(Reached(api, "dmo", None, None))
    (wanted,) = read(f"apiVersion: {API_VERSION}\nkind: Model\nmetadata: {{name: chat}}\nspec: {{source: hf://a/b}}\n")
    ask: list[Callable[[], object]] = [
        lambda: door.apply(wanted),
        lambda: create_key(door, "team", ["chat"], None),
        lambda: list_keys(door),
    ]
    for attempt in ask:
        with pytest.raises(UsageInvalid, match=r"no namespace dmo on the cluster; did you mean demo\?"):
            attempt()


def test_who_may_not_is_told_the_verb_and_the_resource(api: KubeApi, objects: KubeObjects) -> None:
    said = 'models.fastserve.dev is forbidden: User "me" cannot list resource "models" in API group "fastserve.dev"'
    objects.answer = lambda *_: (403, {"message": said})  # type: ignore[method-assign]
    with pytest.raises(ClusterFailed) as caught:
        KubeModels(api, "demo").all()
    assert 'cannot list resource "models"' in str(caught.value)
    assert "ask for a Role with that verb on that resource" in str(caught.value)
