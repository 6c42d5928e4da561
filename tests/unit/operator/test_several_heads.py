"""A Model with a RayCluster of its own, and RayClusters that are replaced: what answers is never taken away first."""

from __future__ import annotations

import base64
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from model_files import write_model
from several_heads import CLUSTERS, SECRETS, TEMPLATE, SeveralHeads, several_heads
from small_cluster import Killed, Moments

from fastserve.plan.moving import LEAVE_SECONDS
from fastserve_operator.conditions import attempted
from fastserve_operator.model import Namespace

MODELS = "/apis/fastserve.dev/v1alpha1/namespaces/demo/models"
LOOKS = 300
SECONDS_A_LOOK = LEAVE_SECONDS / 4


@dataclass
class World:
    """The cluster, the operator in front of it, and the model files."""

    cluster: SeveralHeads
    source: str
    tended: Namespace = field(init=False)
    restarts: random.Random | None = None
    """When set, the operator starts anew before some looks."""

    always: list[str] = field(default_factory=list)
    """Models that must have an answer at every look from now on."""

    def __post_init__(self) -> None:
        self.tended = self.cluster.operator()

    def apply(self, name: str, **spec: Any) -> None:
        value = {"apiVersion": "fastserve.dev/v1alpha1", "kind": "Model", "metadata": {"name": name}}
        whole = {"source": self.source, "serve": {"context": 16}, **spec}
        self.cluster.objects.put(f"{MODELS}/{name}", {**value, "spec": whole})

    def look(self) -> None:
        if self.restarts is not None and self.restarts.random() < 0.3:
            self.tended = self.cluster.operator()
        try:
            attempted(self.tended.tend)
        except Killed:
            self.tended = self.cluster.operator()
        for name in self.always:
            urls = self.cluster.targets(name)
            assert urls, f"{name} has no place"
            assert [url for url in urls if not self.cluster.answers(url)] == []
        self.cluster.go_on()
        self.cluster.seconds += SECONDS_A_LOOK

    def until(self, true: Callable[[], Any], what: str) -> Any:
        for _ in range(LOOKS):
            if found := true():
                return found
            self.look()
            time.sleep(0.001)  # data is read in a thread
        told = {path: item.get("status") for path, item in self.cluster.objects.objects.items() if MODELS in path}
        raise AssertionError(f"never: {what}: {json.dumps(told, indent=1)[-3000:]}")

    def ready(self, name: str) -> dict[str, Any]:
        conditions = self.cluster.objects.objects[f"{MODELS}/{name}"].get("status", {}).get("conditions", [])
        return next((item for item in conditions if item["type"] == "Ready"), {"status": "", "reason": ""})

    def served(self, name: str) -> None:
        generation = self.cluster.objects.objects[f"{MODELS}/{name}"]["metadata"]["generation"]

        def is_ready() -> bool:
            told = self.ready(name)
            return (told["status"], told.get("observedGeneration")) == ("True", generation)

        self.until(is_ready, f"{name} is served")

    def heads_of(self, name: str) -> set[str]:
        """RayClusters whose Serve has an application of a model."""
        return {at for at, ray in self.cluster.rays.items() for app in ray.apps if app.startswith(f"{name}-")}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    folder = tmp_path / "source"
    write_model(folder)
    with several_heads(tmp_path / "cluster") as cluster:
        yield World(cluster, f"file://{folder}")


def test_a_dedicated_model_works_in_a_ray_cluster_of_its_own(world: World) -> None:
    cluster = world.cluster
    world.apply("common")
    world.apply("alone", cluster="dedicated")
    world.served("common")
    world.served("alone")
    (shared,), (own,) = cluster.clusters("shared"), cluster.clusters("alone")
    assert own.startswith("alone-")
    assert (world.heads_of("common"), world.heads_of("alone")) == ({shared}, {own})
    ran = {name: [job.rsplit("-", 3)[0] for job in ray.ran] for name, ray in cluster.rays.items()}
    assert ran == {shared: ["common"], own: []} or ran == {shared: [], own: ["alone"]}, (
        "they share the source's artifact"
    )
    assert all(url.startswith(f"http://{own}/") for url in cluster.targets("alone"))
    made = cluster.objects.objects[f"{CLUSTERS}/{own}"]
    assert [owner["kind"] for owner in made["metadata"]["ownerReferences"]] == ["Model"]
    assert "fastserve-ray-token" not in json.dumps(made["spec"])
    token = cluster.objects.objects[f"{SECRETS}/alone-ray-token"]["data"]["auth_token"]
    assert len(base64.b64decode(token)) >= 32
    template = cluster.objects.objects[f"{CLUSTERS}/{shared}"]
    assert [owner["kind"] for owner in template["metadata"]["ownerReferences"]] == ["ConfigMap"]
    cluster.objects.delete(f"{MODELS}/alone")
    world.until(lambda: not cluster.clusters("alone"), "its RayCluster goes with it")
    world.until(lambda: f"{MODELS}/alone" not in cluster.objects.objects, "it is gone")
    assert f"{SECRETS}/alone-ray-token" not in cluster.objects.objects
    assert cluster.clusters() == [shared]
    assert world.ready("common")["status"] == "True"


def test_a_head_that_does_not_come_up_hinders_only_its_own_model(world: World) -> None:
    cluster = world.cluster
    world.apply("alone", cluster="dedicated")
    world.until(lambda: cluster.clusters("alone"), "it is made")
    cluster.held = set(cluster.clusters("alone"))
    cluster.rays = {name: ray for name, ray in cluster.rays.items() if name not in cluster.held}
    for name in cluster.held:
        cluster.objects.objects[f"{CLUSTERS}/{name}"].pop("status", None)
    world.apply("common")
    world.served("common")
    world.until(lambda: world.ready("alone")["reason"] == "ClusterFailed", "it says so")
    assert "no head service yet" in world.ready("alone")["message"]
    cluster.objects.delete(f"{MODELS}/alone")
    world.until(lambda: f"{MODELS}/alone" not in cluster.objects.objects, "it can be deleted all the same")
    assert cluster.clusters("alone") == []


def test_a_head_that_answers_what_nobody_understands_hinders_only_its_own_model(world: World) -> None:
    cluster = world.cluster
    world.apply("alone", cluster="dedicated")
    world.served("alone")
    (own,) = cluster.clusters("alone")
    sound = cluster.rays[own].answer
    cluster.rays[own].answer = lambda *_: (200, ["no jobs", "and nothing else that is known"])
    world.apply("common")
    world.served("common")
    world.until(lambda: world.ready("alone")["reason"] == "ClusterFailed", "it says so")
    assert "is not understood" in world.ready("alone")["message"]
    cluster.rays[own].answer = sound
    world.served("alone")


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_a_model_moves_to_a_ray_cluster_of_its_own_and_back_without_a_gap(world: World, seed: int | None) -> None:
    cluster = world.cluster
    world.apply("chat")
    world.served("chat")
    (shared,) = cluster.clusters("shared")
    before = cluster.targets("chat")[0].partition("/m/")[2]
    world.always = ["chat"]
    world.restarts = None if seed is None else random.Random(seed)
    world.apply("chat", cluster="dedicated")

    def moved() -> bool:
        assert "model.chat" not in json.dumps(cluster.objects.objects[f"{MODELS}/chat"].get("status")), "a pool's name"
        return world.heads_of("chat") == set(cluster.clusters("chat")) != set()

    world.until(moved, "it has moved")
    (own,) = cluster.clusters("chat")
    assert [url.partition("/m/")[2] for url in cluster.targets("chat")] == [before], "the revision is the same"
    world.apply("chat", cluster="shared")
    world.until(lambda: world.heads_of("chat") == {shared}, "it has moved back")
    world.until(lambda: own not in cluster.clusters(), "its own RayCluster is given up")
    world.served("chat")


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_another_image_rolls_the_ray_cluster_without_a_gap(world: World, seed: int | None) -> None:
    cluster = world.cluster
    for name in ("a", "b"):
        world.apply(name)
        world.served(name)
    (old,) = cluster.clusters()
    world.always = ["a", "b"]
    world.restarts = None if seed is None else random.Random(seed)
    cluster.chart(image="two")
    world.until(lambda: len(cluster.clusters()) == 2, "the next one is made")
    world.until(lambda: old not in cluster.clusters(), "the old one is given up")
    (new,) = cluster.clusters()
    assert (world.heads_of("a"), world.heads_of("b")) == ({new}, {new})
    pod = cluster.objects.objects[f"{CLUSTERS}/{new}"]["spec"]["headGroupSpec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == "two"
    for name in ("a", "b"):
        world.served(name)


class Often(Moments):
    """Ends the operator at one call of 100, before or after it was carried out: every few looks."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.chance = random.Random(seed)

    def around(self, what: str, call: Callable[[], Any], reads: bool = False) -> Any:
        if self.chance.random() < 0.005:
            raise Killed
        answer = call()
        if self.chance.random() < 0.005:
            raise Killed
        return answer


@pytest.mark.parametrize("seed", range(6))
def test_the_operator_may_die_anywhere_while_models_move(world: World, seed: int) -> None:
    cluster = world.cluster
    for name in ("a", "b"):
        world.apply(name)
        world.served(name)
    (old,) = cluster.clusters()
    world.always = ["a", "b"]
    cluster.moments = Often(seed)
    world.tended = cluster.operator()
    cluster.chart(image="two")
    world.apply("b", cluster="dedicated")

    def moved() -> bool:
        shared, own = set(cluster.clusters("shared")), set(cluster.clusters("b"))
        return old not in shared and len(shared) == len(own) == 1 and world.heads_of("b") == own

    world.until(moved, "both have moved")
    assert world.heads_of("a") == set(cluster.clusters("shared"))
    for name in ("a", "b"):
        world.served(name)


def test_without_room_for_the_next_one_the_old_one_serves_on(world: World) -> None:
    cluster = world.cluster
    world.apply("chat")
    world.served("chat")
    (old,) = cluster.clusters()
    world.always = ["chat"]
    cluster.chart(image="two")
    attempted(world.tended.tend)
    (new,) = set(cluster.clusters()) - {old}
    cluster.held = {new}
    for _ in range(20):
        world.look()
    assert world.heads_of("chat") == {old}
    assert world.ready("chat")["status"] == "True"
    told = [item for path, item in cluster.objects.objects.items() if "/events/" in path]
    (rolling,) = (item for item in told if item["involvedObject"]["name"] == old)
    assert rolling["reason"] == "Replacing"
    assert f"`kubectl delete raycluster {old}` makes room" in rolling["message"]
    world.always = []
    cluster.objects.delete(f"{CLUSTERS}/{old}")  # the way out that is told: room for a gap
    cluster.held = set()
    world.until(lambda: world.heads_of("chat") == {new}, "it is served by the next one")
    world.served("chat")


def waiting_pod(cluster: str) -> dict[str, Any]:
    """A worker of a RayCluster that no node has room for."""
    labels = {"ray.io/cluster": cluster, "ray.io/node-type": "worker", "ray.io/group": "local"}
    said = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes: no cpu"}
    status = {"phase": "Pending", "conditions": [said]}
    return {"metadata": {"name": f"{cluster}-w", "namespace": "demo", "labels": labels}, "status": status}


def test_without_machines_for_the_next_one_the_model_says_so(world: World) -> None:
    """Its head is up, so its RayCluster is as it should be; and the model answers, so it is Ready."""
    cluster, place = world.cluster, "/api/v1/namespaces/demo/pods"
    world.apply("chat")
    world.served("chat")
    (old,) = cluster.clusters()
    world.always = ["chat"]
    cluster.chart(image="two")
    attempted(world.tended.tend)
    (new,) = set(cluster.clusters()) - {old}
    cluster.crowded = {new}
    cluster.objects.put(f"{place}/{new}-w", waiting_pod(new))

    def told() -> str:
        conditions = cluster.objects.objects[f"{MODELS}/chat"]["status"]["conditions"]
        return str(next(item["message"] for item in conditions if item["type"] == "Serve"))

    world.until(lambda: "no cpu" in told(), "it says what it waits for")
    assert f"It moves to RayCluster {new}" in told()
    assert told().rpartition("It moves")[2] in cluster.objects.objects[f"{MODELS}/chat"]["status"]["why"][-1]
    assert world.ready("chat")["status"] == "True"
    cluster.crowded = set()
    cluster.objects.delete(f"{place}/{new}-w")
    world.until(lambda: world.heads_of("chat") == {new}, "it has moved")
    world.until(lambda: "It moves" not in told(), "it says no more")


def test_a_ray_cluster_that_cannot_be_made_is_told_by_the_model_that_moves_there(world: World) -> None:
    cluster = world.cluster
    world.apply("chat")
    world.served("chat")
    world.always = ["chat"]
    cluster.objects.put(f"{SECRETS}/chat-ray-token", {"metadata": {"name": "chat-ray-token", "namespace": "demo"}})
    world.apply("chat", cluster="dedicated")

    def told() -> list[str]:
        return list(cluster.objects.objects[f"{MODELS}/chat"].get("status", {}).get("why", []))

    world.until(lambda: any("Secret chat-ray-token is there" in why for why in told()), "it says what is in the way")
    cluster.objects.delete(f"{SECRETS}/chat-ray-token")
    world.until(lambda: world.heads_of("chat") == set(cluster.clusters("chat")) != set(), "it moves all the same")


def test_a_model_that_moves_again_soon_gives_its_first_machines_to_its_last_place(world: World) -> None:
    """There are machines for two places of it, and it has both when a third one is wanted."""
    cluster = world.cluster
    world.apply("chat")
    world.served("chat")
    (first,) = cluster.clusters()
    world.always = ["chat"]
    cluster.chart(image="two")
    world.until(lambda: len(cluster.clusters()) == 2, "the second one is made")
    (second,) = set(cluster.clusters()) - {first}
    world.until(lambda: all(second in url for url in cluster.targets("chat")), "requests go to the second one")
    world.apply("chat", cluster="dedicated")
    world.until(lambda: cluster.clusters("chat"), "the third one is made")
    cluster.crowded = set(cluster.clusters("chat"))
    world.until(lambda: first not in cluster.clusters(), "the first one is given up")
    cluster.crowded = set()
    world.until(lambda: world.heads_of("chat") == set(cluster.clusters("chat")), "it has moved")


def test_a_job_that_runs_is_waited_for(world: World) -> None:
    cluster = world.cluster
    world.apply("chat")
    world.served("chat")
    (old,) = cluster.clusters()
    job = {"submission_id": "other-train-0123456789ab-1", "status": "RUNNING", "entrypoint": ""}
    cluster.rays[old].jobs[job["submission_id"]] = job
    cluster.chart(image="two")
    world.until(lambda: world.heads_of("chat").isdisjoint({old}), "it has moved")
    for _ in range(10):
        world.look()
    assert old in cluster.clusters()
    cluster.rays[old].jobs[job["submission_id"]]["status"] = "SUCCEEDED"
    world.until(lambda: old not in cluster.clusters(), "it is given up")


def test_more_machines_and_new_kinds_are_written_into_the_one_that_runs(world: World) -> None:
    cluster = world.cluster
    world.until(lambda: cluster.clusters(), "it is made")
    (name,) = cluster.clusters()
    found = cluster.objects.objects[f"{CLUSTERS}/{name}"]
    groups = [{**group, "replicas": 2} for group in found["spec"]["workerGroupSpecs"]]
    cluster.objects.put(f"{CLUSTERS}/{name}", {**found, "spec": {**found["spec"], "workerGroupSpecs": groups}})
    cluster.chart(most=5, profiles=("local", "l4"))
    world.look()
    local, l4 = cluster.objects.objects[f"{CLUSTERS}/{name}"]["spec"]["workerGroupSpecs"]
    assert (local["replicas"], local["maxReplicas"], l4["groupName"], l4["maxReplicas"]) == (2, 5, "l4", 5)
    assert cluster.clusters() == [name]
    writes = [call for call in cluster.objects.calls if call[0] != "GET" and CLUSTERS in call[1]]
    world.look()
    assert [call for call in cluster.objects.calls if call[0] != "GET" and CLUSTERS in call[1]] == writes
    cluster.chart(most=5)  # a kind of machine less
    world.look()
    assert len(cluster.clusters()) == 2


@pytest.mark.parametrize("restarts", [False, True])
def test_a_model_whose_state_cannot_be_read_stays_where_it_is(world: World, restarts: bool) -> None:
    cluster = world.cluster
    world.apply("alone", cluster="dedicated")
    world.served("alone")
    (own,) = cluster.clusters("alone")
    world.always = ["alone"]
    state = cluster.objects.objects["/api/v1/namespaces/demo/configmaps/alone-state"]
    text, state["data"]["model.json"] = state["data"]["model.json"], '{"spec": "of another version"}'
    cluster.objects.objects[f"{MODELS}/alone"]["spec"]["serve"] = {"context": "nonsense"}  # so it is not accepted anew
    if restarts:
        world.tended = cluster.operator()
    for _ in range(12):
        world.look()
    assert (world.heads_of("alone"), cluster.clusters("alone")) == ({own}, [own])
    cluster.objects.objects["/api/v1/namespaces/demo/configmaps/alone-state"]["data"]["model.json"] = text
    for _ in range(3):
        world.look()
    assert (world.heads_of("alone"), cluster.clusters("alone")) == ({own}, [own])


def test_without_a_template_a_model_says_what_is_missing(world: World) -> None:
    del world.cluster.objects.objects[TEMPLATE]
    world.apply("chat")
    world.until(lambda: world.ready("chat")["reason"] == "ClusterFailed", "it says so")
    assert "ray.enabled" in world.ready("chat")["message"]
    world.cluster.chart()
    world.served("chat")


def test_a_lost_head_is_given_everything_anew(world: World) -> None:
    """Its RayCluster is the same; a head that starts again has neither applications nor jobs."""
    cluster = world.cluster
    world.apply("chat")
    world.served("chat")
    (name,) = cluster.clusters()
    ray = cluster.rays.pop(name)
    cluster.held = {name}
    world.look()
    told = cluster.targets("chat")
    assert told, "who cannot be reached is not gone"
    assert world.ready("chat")["reason"] == "ClusterFailed"
    cluster.held = set()
    world.until(lambda: world.heads_of("chat") == {name}, "it is served again")
    assert cluster.rays[name] is not ray
    world.served("chat")
    assert cluster.targets("chat") == told
