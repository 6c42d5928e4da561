"""One look at a namespace, with real sources on disk and a Ray that is not there or does not answer."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub_stand_in
import pytest
from kube_objects import KubeObjects
from model_files import model_folder, write_model

from fastserve.artifacts import attempts
from fastserve.artifacts.stores import open_store
from fastserve.cluster.kube.api import KubeApi
from fastserve.cluster.kube.cluster import KubeCluster
from fastserve.cluster.kube.finalizer import FINALIZER
from fastserve.cluster.kube.gateway import KubeGateway
from fastserve.cluster.kube.home import RETRY, KubeHome, asking
from fastserve.cluster.kube.ray import GivenRay, RayClusterHead
from fastserve.cluster.parts import Head
from fastserve.cluster.ray_rest import RayRest
from fastserve.errors import ClusterFailed
from fastserve.gateway.config import Revision, Served, Target
from fastserve.plan.keys import request_for, stage_keys
from fastserve.plan.observed import Pin
from fastserve.plan.stages import Stage
from fastserve.plan.steps import ROLLED_BACK
from fastserve_operator import acceptance
from fastserve_operator.model import Namespace

MODELS = "/apis/fastserve.dev/v1alpha1/namespaces/demo/models"
PROFILES = "/apis/fastserve.dev/v1alpha1/hardwareprofiles"
STATE = "/api/v1/namespaces/demo/configmaps"
ORDERS = f"{STATE}/fastserve-gateway"


@pytest.fixture
def source(tmp_path: Path) -> str:
    folder = tmp_path / "source"
    write_model(folder)
    return f"file://{folder}"


def namespace(api: KubeApi, folder: Path, head: Head | None = None) -> Namespace:
    home = KubeHome(api, "demo", folder / "scratch", str(folder / "store"))
    home.create()
    ray = head or RayClusterHead(api, "demo", "fastserve", "python")
    return Namespace(api, "demo", KubeCluster(api, home, ray, KubeGateway(api, "demo", None)))


def wish(objects: KubeObjects, name: str, source: str, **more: Any) -> None:
    value = {
        "apiVersion": "fastserve.dev/v1alpha1",
        "kind": "Model",
        "metadata": {"name": name, **more},
        "spec": {"source": source},
    }
    objects.put(f"{MODELS}/{name}", value)


def ready(objects: KubeObjects, name: str) -> dict[str, Any]:
    conditions = objects.objects[f"{MODELS}/{name}"].get("status", {}).get("conditions", [])
    return next((item for item in conditions if item["type"] == "Ready"), {"reason": ""})


def tend_until(tended: Namespace, objects: KubeObjects, name: str, reason: str) -> dict[str, Any]:
    end = time.monotonic() + 120
    while ready(objects, name)["reason"] != reason:
        assert time.monotonic() < end, f"{name} is {ready(objects, name)}"
        tended.tend()
        time.sleep(0.02)
    return ready(objects, name)


def events(objects: KubeObjects) -> list[tuple[str, str]]:
    return [(item["type"], item["reason"]) for path, item in objects.objects.items() if "/events/" in path]


def test_without_a_ray_cluster_a_model_says_what_is_missing(
    api: KubeApi, objects: KubeObjects, source: str, tmp_path: Path
) -> None:
    wish(objects, "small", source)
    told = tend_until(namespace(api, tmp_path), objects, "small", "ClusterFailed")
    assert told["status"] == "Unknown"
    assert "no RayCluster named fastserve in namespace demo" in told["message"]
    assert objects.objects[f"{MODELS}/small"]["metadata"]["finalizers"] == [FINALIZER]
    assert objects.objects[f"{STATE}/small-state"]["metadata"]["ownerReferences"][0]["name"] == "small"


def test_a_head_that_does_not_come_up_says_what_its_pod_says(
    api: KubeApi, objects: KubeObjects, source: str, tmp_path: Path
) -> None:
    raycluster = {"metadata": {"name": "fastserve"}, "spec": {"authOptions": {"mode": "token"}}}
    objects.put("/apis/ray.io/v1/namespaces/demo/rayclusters/fastserve", raycluster)
    why = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "3 Insufficient memory."}
    labels = {"ray.io/cluster": "fastserve", "ray.io/node-type": "head"}
    pod = {"metadata": {"name": "head", "labels": labels}, "status": {"phase": "Pending", "conditions": [why]}}
    objects.put("/api/v1/namespaces/demo/pods/head", pod)
    wish(objects, "small", source)
    tended = namespace(api, tmp_path)
    told = tend_until(tended, objects, "small", "Unschedulable")
    assert told["status"] == "Unknown"
    assert "pod head of the head: Unschedulable: 3 Insufficient memory" in told["message"]
    objects.delete("/api/v1/namespaces/demo/pods/head")
    tend_until(tended, objects, "small", "ClusterFailed")


def test_a_source_whose_secret_is_missing_goes_on_when_it_comes(
    api: KubeApi, objects: KubeObjects, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance, "REFUSED_SECONDS", 0.1)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with hub_stand_in.hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.repository("acme/model", token="right").commit(model_folder())
        wish(objects, "private", "")
        objects.objects[f"{MODELS}/private"]["spec"]["source"] = {"uri": "hf://acme/model", "tokenSecret": "hub"}
        tended = namespace(api, tmp_path)
        told = tend_until(tended, objects, "private", "SecretMissing")
        assert told["status"] == "Unknown"
        assert "no Secret hub in namespace demo" in told["message"]
        token = {"metadata": {"name": "hub"}, "data": {"token": base64.b64encode(b"right").decode()}}
        objects.put("/api/v1/namespaces/demo/secrets/hub", token)
        tend_until(tended, objects, "private", "ClusterFailed")  # accepted
    assert "right" not in json.dumps(objects.objects[f"{STATE}/private-state"])


def test_one_broken_model_touches_no_other(api: KubeApi, objects: KubeObjects, source: str, tmp_path: Path) -> None:
    wish(objects, "a-nowhere", "file:///nowhere/at/all")
    wish(objects, "b-nonsense", source)
    objects.objects[f"{MODELS}/b-nonsense"]["spec"] = {"sourec": 3}
    objects.put(f"{MODELS}/c-odd", {"apiVersion": "x", "kind": "Model", "metadata": {"name": "c-odd"}, "spec": None})
    objects.put(f"{STATE}/d-taken-state", {"metadata": {"name": "d-taken-state"}, "data": {}})
    wish(objects, "d-taken", source)
    wish(objects, "e-good", source)
    tended = namespace(api, tmp_path)
    tend_until(tended, objects, "e-good", "ClusterFailed")
    tend_until(tended, objects, "a-nowhere", "SourceNotFound")
    told = tend_until(tended, objects, "b-nonsense", "ManifestInvalid")
    assert "sourec" in told["message"]
    tend_until(tended, objects, "c-odd", "ManifestInvalid")
    told = tend_until(tended, objects, "d-taken", "NameConflict")
    assert "d-taken-state" in told["message"]


def test_a_settled_model_is_looked_at_and_not_written(
    api: KubeApi, objects: KubeObjects, source: str, tmp_path: Path
) -> None:
    wish(objects, "small", source)
    wish(objects, "bad", "file:///nowhere/at/all")
    tended = namespace(api, tmp_path)
    tend_until(tended, objects, "small", "ClusterFailed")
    tend_until(tended, objects, "bad", "SourceNotFound")
    told = events(objects)
    before = len(objects.calls)
    for _ in range(3):
        tended.tend()
    assert [call for call in objects.calls[before:] if call[0] != "GET"] == []
    assert events(objects) == told
    assert ("Warning", "SourceNotFound") in told


def test_a_model_that_is_done_rests_until_something_of_it_changes(
    api: KubeApi, objects: KubeObjects, source: str, tmp_path: Path
) -> None:
    wish(objects, "small", source)
    tended = namespace(api, tmp_path)
    tend_until(tended, objects, "small", "ClusterFailed")  # accepted; its artifact is made by hand
    home = KubeHome(api, "demo", tmp_path / "hand", str(tmp_path / "store"))
    home.look()
    model, store = home.model("small"), open_store(home.store_uri)
    assert model is not None
    request = request_for(model, Stage.SOURCE, home.resolved("small"), attempts.newest_attempt(store, *stage(home)) + 1)
    attempts.claim(store, request)
    attempts.commit(store, request, tmp_path / "source", {}, {})
    assert tend_until(tended, objects, "small", "Ready")["status"] == "True"
    tended.tend()
    store.delete(f"artifacts/source/{request.key}/record.json")
    tended.tend()
    assert ready(objects, "small")["reason"] == "Ready"
    wish(objects, "small", source, annotations={RETRY: "1"})
    tend_until(tended, objects, "small", "ClusterFailed")


def stage(home: KubeHome) -> tuple[Stage, str]:
    model = home.model("small")
    assert model is not None
    return Stage.SOURCE, stage_keys(model, home.resolved("small"))[Stage.SOURCE]


def test_a_restart_goes_on_from_what_is_there(api: KubeApi, objects: KubeObjects, source: str, tmp_path: Path) -> None:
    wish(objects, "small", source)
    tend_until(namespace(api, tmp_path), objects, "small", "ClusterFailed")
    before = len(objects.calls)
    namespace(api, tmp_path / "after").tend()
    assert [call for call in objects.calls[before:] if call[0] != "GET"] == []


def test_a_mistake_in_an_edit_takes_nothing_away(
    api: KubeApi, objects: KubeObjects, source: str, tmp_path: Path
) -> None:
    wish(objects, "small", source)
    tended = namespace(api, tmp_path)
    tend_until(tended, objects, "small", "ClusterFailed")
    accepted = objects.objects[f"{STATE}/small-state"]["data"]["model.json"]
    wish(objects, "small", "file:///nowhere/at/all")
    told = tend_until(tended, objects, "small", "SourceNotFound")
    assert told["observedGeneration"] == 2
    assert objects.objects[f"{STATE}/small-state"]["data"]["model.json"] == accepted
    assert "Source" in {item["type"] for item in objects.objects[f"{MODELS}/small"]["status"]["conditions"]}
    wish(objects, "small", source)
    tend_until(tended, objects, "small", "ClusterFailed")


def test_a_new_value_of_the_retry_annotation_is_a_new_asking(
    api: KubeApi, objects: KubeObjects, source: str, tmp_path: Path
) -> None:
    wish(objects, "small", source)
    tended = namespace(api, tmp_path)
    tend_until(tended, objects, "small", "ClusterFailed")
    wish(objects, "small", source, annotations={RETRY: "1"})
    until_accepted(tended, objects)


def test_a_rollback_of_its_own_accord_ends_when_somebody_asks_again_and_not_when_it_is_scaled(
    api: KubeApi, objects: KubeObjects, source: str, tmp_path: Path
) -> None:
    wish(objects, "small", source)
    tended = namespace(api, tmp_path)
    tend_until(tended, objects, "small", "ClusterFailed")
    home = KubeHome(api, "demo", tmp_path / "hand", str(tmp_path / "store"))

    def pin() -> Pin | None:
        home.look()
        return home.pin("small")

    home.look()
    home.set_pin("small", Pin("a" * 64, "b" * 64, ROLLED_BACK, "it was slow"))
    spec = {"source": source, "evaluate": {"data": source}}  # another generation
    objects.put(f"{MODELS}/small", {"metadata": {"name": "small"}, "spec": spec})
    tended.tend()
    wish(objects, "small", source)
    until_accepted(tended, objects)
    assert pin() is not None
    wish(objects, "small", source, annotations={RETRY: "1"})
    until_accepted(tended, objects)
    assert pin() is None


@pytest.mark.parametrize("change", ["an unknown key", "no JSON"])
def test_what_another_version_accepted_is_surveyed_anew_and_hinders_nobody(
    api: KubeApi, objects: KubeObjects, source: str, tmp_path: Path, change: str
) -> None:
    for name in ("old", "small"):
        wish(objects, name, source)
    tended = namespace(api, tmp_path)
    for name in ("old", "small"):
        tend_until(tended, objects, name, "ClusterFailed")
    data = objects.objects[f"{STATE}/old-state"]["data"]
    whole = json.loads(data["model.json"])
    spoiled = {**whole, "spec": {**whole["spec"], "ofAnotherVersion": 1}}
    data["model.json"] = json.dumps(spoiled) if change == "an unknown key" else "{"
    wish(objects, "new", source)
    after = namespace(api, tmp_path / "after")
    tend_until(after, objects, "new", "ClusterFailed")
    until(lambda: json_or_none(objects.objects[f"{STATE}/old-state"]["data"]["model.json"]) == whole, after)


def test_an_object_that_this_version_cannot_read_keeps_what_is_routed_and_hinders_nobody(
    api: KubeApi, objects: KubeObjects, source: str, tmp_path: Path
) -> None:
    served = {"source": source, "serve": {}}
    objects.put(f"{MODELS}/old", {"kind": "Model", "metadata": {"name": "old"}, "spec": served} | VERSION)
    silent = GivenRay("http://127.0.0.1:9", None, None, "python")
    tended = namespace(api, tmp_path, silent)
    tend_until(tended, objects, "old", "ClusterFailed")
    route = (Revision("a" * 64, 100, (Target("http://engine"),)),)
    KubeGateway(api, "demo", None).configure({"old": Served("generate", 1, route)}, (), 8100)
    objects.objects[f"{MODELS}/old"]["spec"]["ofAnotherVersion"] = 1
    objects.objects[f"{MODELS}/old"]["metadata"]["generation"] += 1
    data = objects.objects[f"{STATE}/old-state"]["data"]
    data["model.json"] = json.dumps({"kind": "Model", "spec": {"of": "another version"}})
    wish(objects, "small", source)
    after = namespace(api, tmp_path / "after", silent)
    told = tend_until(after, objects, "old", "ManifestInvalid")
    assert "ofAnotherVersion" in told["message"]
    tend_until(after, objects, "small", "ClusterFailed")
    orders = json.loads(objects.objects[ORDERS]["data"]["config.json"])
    assert orders["models"]["old"]["revisions"][0]["weight"] == 100
    objects.objects[f"{MODELS}/old"]["metadata"]["finalizers"] = []
    objects.delete(f"{MODELS}/old")
    until(lambda: f"{MODELS}/old" not in objects.objects, after)


VERSION = {"apiVersion": "fastserve.dev/v1alpha1"}


def json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def until(true: Callable[[], object], tended: Namespace) -> None:
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        tended.tend()
        time.sleep(0.02)


def until_accepted(tended: Namespace, objects: KubeObjects) -> None:
    end = time.monotonic() + 120
    path = f"{MODELS}/small"
    while json.loads(objects.objects[f"{STATE}/small-state"]["data"]["accepted.json"]) != asking(objects.objects[path]):
        assert time.monotonic() < end
        tended.tend()


def test_a_deleted_model_goes_when_nothing_of_it_runs(
    api: KubeApi, objects: KubeObjects, source: str, tmp_path: Path
) -> None:
    wish(objects, "small", source)
    tended = namespace(api, tmp_path)
    tend_until(tended, objects, "small", "ClusterFailed")
    objects.delete(f"{MODELS}/small")
    assert f"{MODELS}/small" in objects.objects
    tended.tend()
    left = [path for path in objects.objects if "/events/" not in path]
    assert [path for path in left if not path.rsplit("/", 1)[-1].startswith("fastserve-gateway")] == []


def test_a_key_that_is_taken_away_opens_nothing_while_ray_is_away(
    api: KubeApi, objects: KubeObjects, tmp_path: Path
) -> None:
    path = "/apis/fastserve.dev/v1alpha1/namespaces/demo/accesskeys/team"
    value = {"apiVersion": "fastserve.dev/v1alpha1", "kind": "AccessKey", "metadata": {"name": "team"}}
    objects.put(path, value | {"spec": {"models": ["small"]}})
    tended = namespace(api, tmp_path, GivenRay("http://127.0.0.1:9", None, None, "python"))

    def keys() -> list[str]:
        tended.tend()
        return [key["name"] for key in json.loads(objects.objects[ORDERS]["data"]["config.json"])["keys"]]

    assert keys() == ["team"]
    objects.delete(path)
    assert keys() == []


def test_a_deleted_model_waits_for_a_ray_that_does_not_answer(
    api: KubeApi, objects: KubeObjects, source: str, tmp_path: Path
) -> None:
    wish(objects, "small", source)
    silent = GivenRay("http://127.0.0.1:9", None, None, "python")
    tended = namespace(api, tmp_path, silent)
    tend_until(tended, objects, "small", "ClusterFailed")
    wish(objects, "small", source)
    tended.tend()
    objects.objects[f"{MODELS}/small"]["metadata"]["finalizers"] = [FINALIZER]
    objects.delete(f"{MODELS}/small")
    tended.tend()
    told = ready(objects, "small")
    assert (told["status"], told["reason"]) == ("Unknown", "ClusterFailed")
    assert "127.0.0.1:9" in told["message"]


def test_a_profile_that_is_described_is_known(api: KubeApi, objects: KubeObjects, source: str, tmp_path: Path) -> None:
    wish(objects, "small", source)
    spec = objects.objects[f"{MODELS}/small"]["spec"]
    objects.put(f"{MODELS}/small", {"metadata": {"name": "small"}, "spec": {**spec, "serve": {"profiles": ["h100"]}}})
    tended = namespace(api, tmp_path)
    told = tend_until(tended, objects, "small", "NotExecutable")
    assert "no HardwareProfile is named h100" in told["message"]
    profile = {
        "apiVersion": "fastserve.dev/v1alpha1",
        "kind": "HardwareProfile",
        "metadata": {"name": "h100"},
        "spec": {"cpus": 8, "memory": "64GiB", "accelerator": {"type": "H100", "count": 1, "memory": "80GiB"}},
    }
    objects.put(f"{PROFILES}/h100", profile)
    wish_again = {**spec, "serve": {"profiles": ["h100"], "context": 32}}
    objects.put(f"{MODELS}/small", {"metadata": {"name": "small"}, "spec": wish_again})
    tend_until(tended, objects, "small", "ClusterFailed")  # accepted: it waits for a Ray cluster


def test_many_models_ask_ray_for_its_machines_once_a_look(
    api: KubeApi, objects: KubeObjects, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each one that is new or refused would wait for a head that does not answer, one after the other."""
    asked: list[str] = []

    def silent(rest: RayRest, method: str, path: str, **_: Any) -> Any:
        asked.append(path)
        raise ClusterFailed("it does not answer")

    monkeypatch.setattr(RayRest, "call", silent)
    for number in range(20):
        wish(objects, f"m{number}", "file:///nowhere")
    tended = namespace(api, tmp_path, GivenRay("http://ray", None, None, "python"))
    tend_until(tended, objects, "m19", "SourceNotFound")
    asked.clear()
    tended.tend_models()
    assert len(asked) <= 2, asked
