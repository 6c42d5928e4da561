"""A deleted Model goes when nothing of it runs, and nothing but that holds it: no store, no state, no head that is
gone for good."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from model_files import write_model
from several_heads import CLUSTERS, SeveralHeads, several_heads
from small_cluster import SmallCluster, small_cluster

from fastserve.cluster.kube.cluster import LOST_SECONDS
from fastserve.errors import StoreFailed
from fastserve_operator.conditions import attempted
from fastserve_operator.model import Namespace

MODEL = "/apis/fastserve.dev/v1alpha1/namespaces/demo/models/small"
STATE = "/api/v1/namespaces/demo/configmaps/small-state"


def source_of(folder: Path) -> str:
    write_model(folder / "source")
    return f"file://{folder}/source"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[SmallCluster]:
    with small_cluster(tmp_path) as found:
        yield found


@pytest.fixture
def several(tmp_path: Path) -> Iterator[SeveralHeads]:
    with several_heads(tmp_path) as found:
        yield found


def ask(world: SmallCluster, **spec: Any) -> None:
    value = {"apiVersion": "fastserve.dev/v1alpha1", "kind": "Model", "metadata": {"name": "small"}}
    whole = {"source": source_of(world.folder), **spec}
    world.objects.put(MODEL, {**value, "spec": whole})


def look_until(cluster: SmallCluster, tended: Namespace, true: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + 120
    while not true():
        told = cluster.objects.objects.get(MODEL, {}).get("status", {}).get("conditions")
        assert time.monotonic() < end, f"never: {what}: {told}"
        attempted(tended.tend)
        (cluster.go_on if isinstance(cluster, SeveralHeads) else cluster.ray.go_on)()
        time.sleep(0.005)


def ready(cluster: SmallCluster) -> dict[str, Any]:
    conditions = cluster.objects.objects[MODEL].get("status", {}).get("conditions", [])
    return next((item for item in conditions if item["type"] == "Ready"), {"reason": "", "message": ""})


def gone(cluster: SmallCluster) -> bool:
    return MODEL not in cluster.objects.objects


@pytest.mark.parametrize("restarts", [False, True])
def test_what_runs_is_ended_also_when_the_state_went_first(cluster: SmallCluster, restarts: bool) -> None:
    """As the garbage collector does it where a Model is deleted in the foreground."""
    cluster.ray.holds = True
    ask(cluster)
    tended = cluster.operator()
    look_until(cluster, tended, lambda: cluster.ray.running, "its source is brought in")
    cluster.objects.delete(MODEL)
    del cluster.objects.objects[STATE]
    tended = cluster.operator() if restarts else tended
    look_until(cluster, tended, lambda: gone(cluster), "it is gone")
    assert cluster.ray.running == []
    assert [job["status"] for job in cluster.ray.jobs.values()] == ["STOPPED"]


def test_a_store_that_is_away_keeps_no_model(cluster: SmallCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.ray.holds = True
    ask(cluster)
    tended = cluster.operator()
    look_until(cluster, tended, lambda: cluster.ray.running, "its source is brought in")

    def away(*_: Any) -> Any:
        raise StoreFailed("the store does not answer")

    for name in ("read", "names", "write", "create", "delete", "delete_under"):
        monkeypatch.setattr(tended._cluster.store, name, away)
    cluster.objects.delete(MODEL)
    look_until(cluster, tended, lambda: gone(cluster), "it is gone")
    assert cluster.ray.running == []


def test_another_model_that_hides_which_heads_there_are_does_not_let_it_go(
    cluster: SmallCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look that fails before it has seen anything says nothing of what runs."""
    cluster.ray.holds = True
    ask(cluster)
    look_until(cluster, cluster.operator(), lambda: cluster.ray.running, "its source is brought in")
    tended = cluster.operator()
    monkeypatch.setattr(tended._cluster, "keep_gateway", lambda *_: 1 / 0)
    cluster.objects.delete(MODEL)
    look_until(cluster, tended, lambda: gone(cluster), "it is gone")
    assert [job["status"] for job in cluster.ray.jobs.values()] == ["STOPPED"]


def test_a_head_that_is_gone_for_good_is_not_waited_for_for_ever(several: SeveralHeads) -> None:
    ask(several, serve={"context": 16})
    tended = several.operator()
    look_until(several, tended, lambda: ready(several)["reason"] == "Ready", "it is served")
    (name,) = several.clusters()
    several.held = {name}
    del several.rays[name]  # its machine is lost, and no other one comes
    several.objects.delete(MODEL)
    look_until(several, tended, lambda: ready(several)["reason"] == "ClusterFailed", "it waits for the head")
    several.seconds += LOST_SECONDS + 1
    tended.tend()
    assert not gone(several), "KubeRay still calls the head ready: it may only be out of reach"
    found = several.objects.objects[f"{CLUSTERS}/{name}"]
    several.objects.put(f"{CLUSTERS}/{name}", {**found, "status": {"state": "failed", "head": {"serviceName": name}}})
    tended.tend()
    assert gone(several)


def test_where_kube_ray_was_taken_away_nothing_runs_and_a_model_says_so(
    several: SeveralHeads, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(several, serve={"context": 16})
    tended = several.operator()
    look_until(several, tended, lambda: ready(several)["reason"] == "Ready", "it is served")
    answer = several.objects.answer

    def without(method: str, path: str, *more: Any) -> tuple[int, Any]:
        unknown = "/rayclusters" in path
        return (404, {"message": "404 page not found\n"}) if unknown else answer(method, path, *more)

    monkeypatch.setattr(several.objects, "answer", without)
    monkeypatch.setattr(several, "kube_ray", lambda: several.rays.clear())
    look_until(several, tended, lambda: "KubeRay is not installed" in ready(several)["message"], "it says so")
    assert ready(several)["status"] == "Unknown"
    several.objects.delete(MODEL)
    look_until(several, tended, lambda: gone(several), "it is gone")


def test_nothing_of_a_model_that_is_gone_is_kept_in_memory(several: SeveralHeads) -> None:
    ask(several, serve={"context": 16}, cluster="dedicated")
    tended = several.operator()
    look_until(several, tended, lambda: ready(several)["reason"] == "Ready", "it is served")
    cluster = tended._cluster
    (own,) = several.clusters("small")
    assert f"http://{own}" in cluster._last_put
    assert own in cluster._served
    assert cluster._sights._routed
    several.objects.delete(MODEL)
    look_until(several, tended, lambda: gone(several) and own not in several.clusters(), "it is gone")
    look_until(several, tended, lambda: own not in cluster._served, "its head is forgotten")
    assert "small" not in cluster._records._of
    assert f"http://{own}" not in cluster._last_put
    assert not cluster._sights._routed
