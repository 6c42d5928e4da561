"""From what Ray tells to bounds, targets and needs."""

from __future__ import annotations

from typing import Any

from fastserve.cluster.nodes import Machine, hardware_of, profiles_of, room
from fastserve.cluster.placements import Ground, bounds_of, needs_of, scaling_of, targets_of
from fastserve.cluster.ray_serve import AppStatus, DeploymentStatus, ReplicaStatus, app_name
from fastserve.plan.facts import Hardware
from fastserve.plan.revision import Revision
from fastserve.plan.stages import Stage
from fastserve.spec.hardware import HardwareProfileSpec
from fastserve.spec.model import Model
from fastserve.spec.serve import Serve

LAPTOP = Hardware(cpus=2, memory_bytes=8 * 2**30)
CARD = {"type": "L4", "memory": "24GiB", "count": 4}
L4 = HardwareProfileSpec.model_validate({"cpus": 16, "memory": "64GiB", "accelerator": CARD, "pricePerHour": 0.8})
SPOT = HardwareProfileSpec.model_validate({"cpus": 8, "memory": "32GiB", "spot": True})
REVISION = Revision("chat", Stage.COMPRESS, "k" * 64, "d" * 64, {})
BOTH = Serve.model_validate({"profiles": ["l4", "local"], "replicas": {"min": 1, "max": 4}})


def machine(profile: str, cpus: float = 4, accelerators: float = 0) -> Machine:
    return Machine(profile, cpus, accelerators)


def app(profile: str, replicas: int = 1, waiting: float | None = None, **more: Any) -> tuple[str, AppStatus]:
    name = app_name("chat", REVISION.digest, profile)
    those = [ReplicaStatus(10 + number, "RUNNING", str(number), "node") for number in range(replicas)]
    if waiting is not None:
        those.append(ReplicaStatus(None, "STARTING", "w", None, waiting))
    usual: dict[str, Any] = {
        "state": "RUNNING",
        "replicas": replicas,
        "wanted": len(those),
        "waiting_since": waiting,
        "requests_each": 20,
        "deployments": {"engine": DeploymentStatus("HEALTHY", "", tuple(those))},
    }
    return name, AppStatus(name, **{**usual, **more})


def test_a_node_says_with_a_label_what_it_is_a_machine_of() -> None:
    rows: list[dict[str, Any]] = [
        {"labels": {"fastserve.dev/profile": "l4"}, "resources_total": {"CPU": 16.0, "GPU": 4.0}},
        {"labels": {}, "resources_total": {"CPU": 2.0}},
        {"labels": None, "resources_total": None},
    ]
    found = [Machine.from_json(row) for row in rows]
    assert found == [machine("l4", 16, 4), machine("", 2), machine("", 0)]
    assert profiles_of(found) == {"l4"}


def test_how_many_replicas_the_machines_of_a_profile_hold() -> None:
    nodes = [machine("local", 64), machine("l4", 16, 4), machine("l4", 16, 3), machine("cpu"), machine("cpu")]
    described = {"l4": L4, "cpu": SPOT}
    assert room(nodes, "l4", hardware_of("l4", described, LAPTOP), 1) == 7
    assert room(nodes, "l4", hardware_of("l4", described, LAPTOP), 2) == 3
    assert room(nodes, "cpu", hardware_of("cpu", described, LAPTOP), 1) == 2, "a replica computes on all cores"
    assert room(nodes, "local", LAPTOP, 1) == 64
    assert room(nodes, "gone", LAPTOP, 1) == 0


def test_hardware_comes_from_the_profile_and_from_this_machine_where_nobody_describes_it() -> None:
    found = hardware_of("l4", {"l4": L4}, LAPTOP)
    assert (found.cpus, found.accelerators, found.accelerator_type) == (16, 4, "L4")
    assert found.accelerator_memory_bytes == 24 * 2**30
    assert hardware_of("l4", {}, LAPTOP) == LAPTOP


def test_bounds_follow_from_machines_applications_and_what_policies_noted() -> None:
    ground = Ground([machine("local", 64)], LAPTOP, {}, {})
    found = bounds_of(REVISION, BOTH, (1, 4), {"l4": L4}, ground, 1000.0)
    assert [(item.profile, item.least, item.most) for item in found] == [("l4", 0, 0), ("local", 1, 4)]
    name, status = app("l4", replicas=1)
    busy = {name: {"at": 999.0, "requests": 19.5, "peakRequests": 20.0, "tokensPerSecond": 40.0}}
    ground = Ground([machine("local", 64), machine("l4", 16, 1)], LAPTOP, {name: status}, busy)
    found = bounds_of(REVISION, BOTH, (1, 4), {"l4": L4}, ground, 1000.0)
    assert [(item.profile, item.least, item.most) for item in found] == [("l4", 1, 1), ("local", 1, 3)]
    assert "full" in found[1].because
    later = bounds_of(REVISION, BOTH, (1, 4), {"l4": L4}, ground, 1100.0)
    assert [item.most for item in later] == [1, 0], "what was noted long ago says nothing of now"
    told = scaling_of(REVISION, found, ground)
    assert [(place["profile"], place["min"], place["requests"]) for place in told] == [("l4", 1, 19.5), ("local", 1, 0)]


def test_an_engine_that_failed_on_one_profile_leaves_the_next_one() -> None:
    name, status = app("l4", replicas=0, state="DEPLOY_FAILED")
    ground = Ground([machine("local", 64), machine("l4", 16, 1)], LAPTOP, {name: status}, {})
    found = bounds_of(REVISION, BOTH, (1, 4), {"l4": L4}, ground, 1000.0)
    assert [(item.profile, item.most) for item in found] == [("l4", 0), ("local", 4)]


def test_targets_have_the_slots_of_the_replicas_that_answer() -> None:
    apps = dict([app("local", 1), app("l4", 2)])
    found = targets_of("chat", REVISION.digest, ["l4", "local"], apps, "http://x:1")
    assert [(target.profile, target.slots, target.rank) for target in found] == [("l4", 40, 0), ("local", 20, 1)]
    assert found[0].url == f"http://x:1/m/chat/{REVISION.digest[:8]}/l4"


def test_a_profile_without_ready_replicas_is_left_out_beside_one_that_has_some() -> None:
    apps = dict([app("l4", 0, waiting=900.0), app("local", 1)])
    (target,) = targets_of("chat", REVISION.digest, ["l4", "local"], apps, "http://x:1")
    assert target.profile == "local"


def test_with_nothing_ready_the_first_that_can_start_one_gets_one_replicas_requests() -> None:
    def only(*apps: tuple[str, AppStatus]) -> tuple[str, int]:
        (target,) = targets_of("chat", REVISION.digest, ["l4", "local"], dict(apps), "http://x:1")
        return target.profile, target.slots

    assert only(app("local", 0), app("l4", 0)) == ("l4", 20)
    assert only(app("local", 0), app("l4", 0, waiting=900.0)) == ("local", 20)
    assert only(app("local", 0), app("l4", 0, state="DEPLOY_FAILED")) == ("local", 20)
    gone = dict([app("local", 1, state="DELETING")])
    assert targets_of("chat", REVISION.digest, ["local"], gone, "http://x:1") == ()


def test_what_training_may_be_asked_for() -> None:
    model = Model.model_validate(
        {
            "apiVersion": "fastserve.dev/v1alpha1",
            "kind": "Model",
            "metadata": {"name": "chat"},
            "spec": {"source": "file:///m", "serve": {"profiles": ["l4", "local"]}},
        }
    )
    apps = dict([app("l4", 2, waiting=900.0)])
    first, second = needs_of(model, [REVISION], apps)
    assert (first.profile, first.replicas, first.waiting, first.since) == ("l4", 2, 1, 900.0)
    assert (second.profile, second.replicas, second.waiting, second.since) == ("local", 0, 0, None)


def test_ready_replicas_that_say_where_they_answer_are_gone_to_directly_and_serves_proxy_stands_last() -> None:
    name, status = app("local", replicas=2)
    engines = {"0": "http://127.0.0.1:1", "1": "http://127.0.0.1:2", "gone": "http://127.0.0.1:3"}
    found = targets_of("chat", REVISION.digest, ["local"], {name: status}, "http://serve", engines)
    assert [(target.url, target.slots, target.last) for target in found] == [
        ("http://127.0.0.1:1", 20, False),
        ("http://127.0.0.1:2", 20, False),
        (f"http://serve/m/chat/{REVISION.short}/local", 40, True),
    ]


def test_one_replica_that_does_not_say_where_it_answers_keeps_all_behind_serves_proxy() -> None:
    name, status = app("local", replicas=2)
    found = targets_of("chat", REVISION.digest, ["local"], {name: status}, "http://serve", {"0": "http://127.0.0.1:1"})
    assert [(target.slots, target.last) for target in found] == [(40, False)]
