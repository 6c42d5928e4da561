"""What pods say, in one word and a sentence with what to do."""

from __future__ import annotations

import unicodedata
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kube_objects import KubeObjects, served

from fastserve.cluster.kube.pods import MOST_CHARACTERS, Pods, trouble_of_cluster, trouble_of_pod

NOW = datetime(2027, 1, 2, 3, 4, 5, tzinfo=UTC).timestamp()
JUST_NOW, LONG_AGO = "2027-01-02T03:00:00Z", "2027-01-02T01:00:00Z"


def pod(group: str | None = "l4", name: str = "p", **status: Any) -> dict[str, Any]:
    labels = {"ray.io/cluster": "fastserve", "ray.io/node-type": "worker" if group else "head"}
    return {
        "metadata": {"name": name, "labels": labels | {"ray.io/group": group or "headgroup"}},
        "status": {"phase": "Pending", **status},
    }


def unscheduled(message: str) -> dict[str, Any]:
    return pod(conditions=[{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}])


def waiting(reason: str, message: str = "", **more: Any) -> dict[str, Any]:
    return pod(containerStatuses=[{"state": {"waiting": {"reason": reason, "message": message}}, **more}])


def ended(reason: str, at: str, code: int = 137, now: str = "running") -> dict[str, Any]:
    terminated = {"reason": reason, "exitCode": code, "finishedAt": at}
    return pod(phase="Running", containerStatuses=[{"state": {now: {}}, "lastState": {"terminated": terminated}}])


@pytest.mark.parametrize(
    ("found", "reason", "words"),
    [
        (unscheduled("0/3 nodes are available: 3 Insufficient cpu."), "Unschedulable", "Insufficient cpu; add such"),
        (unscheduled("0/1 nodes: 1 Insufficient nvidia.com/gpu."), "Unschedulable", "profile l4"),
        (unscheduled("pod has unbound immediate PersistentVolumeClaims."), "PendingStorage", "kubectl get pvc"),
        (unscheduled('persistentvolumeclaim "store" not found'), "PendingStorage", '"store" not found'),
        (waiting("ImagePullBackOff", 'Back-off pulling image "x/y"'), "ImagePull", "x/y"),
        (waiting("ErrImageNeverPull"), "ImagePull", "ray.image"),
        (waiting("CreateContainerConfigError", 'secret "s3" not found'), "SecretMissing", '"s3" not found'),
        (waiting("CrashLoopBackOff", "back-off 40s"), "CrashLoop", "kubectl logs --previous"),
        (ended("OOMKilled", JUST_NOW), "OutOfMemory", "exit code 137; raise"),
        (ended("Error", JUST_NOW, 1, now="waiting"), "CrashLoop", "exit code 1"),
        (pod(phase="Failed", reason="Evicted", message="low on resource: memory"), "Evicted", "low on resource"),
        (pod(initContainerStatuses=[{"state": {"waiting": {"reason": "ErrImagePull"}}}]), "ImagePull", "ErrImagePull"),
    ],
)
def test_each_cause_has_its_word_and_says_what_to_do(found: dict[str, Any], reason: str, words: str) -> None:
    told = trouble_of_pod(found, NOW)
    assert told is not None
    assert told.reason == reason
    assert words in told.message
    assert told.message.startswith("pod p of profile l4: ")


def test_what_killed_it_comes_before_that_it_is_started_again() -> None:
    killed = {"lastState": {"terminated": {"reason": "OOMKilled", "exitCode": 137, "finishedAt": JUST_NOW}}}
    told = trouble_of_pod(waiting("CrashLoopBackOff", "back-off 5m0s", **killed), NOW)
    assert told is not None
    assert told.reason == "OutOfMemory"


@pytest.mark.parametrize(
    "found",
    [
        pod(phase="Running", containerStatuses=[{"state": {"running": {}}, "lastState": {}}]),
        pod(containerStatuses=[{"state": {"waiting": {"reason": "ContainerCreating"}}}]),
        pod(conditions=[{"type": "PodScheduled", "status": "True"}]),
        ended("OOMKilled", LONG_AGO),
        ended("Error", JUST_NOW, 1),
        ended("Completed", JUST_NOW, 0),
        pod(phase="Succeeded"),
        {"metadata": {"name": "p", "deletionTimestamp": JUST_NOW}, "status": unscheduled("no room")["status"]},
        {"metadata": {"name": "p"}},
    ],
)
def test_a_pod_that_runs_or_is_about_to_is_no_trouble(found: dict[str, Any]) -> None:
    assert trouble_of_pod(found, NOW) is None


def cluster(message: str) -> dict[str, Any]:
    condition = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreateWorkerPod", "message": message}
    return {"metadata": {"name": "fastserve"}, "status": {"conditions": [condition]}}


def test_a_pod_that_may_not_be_made_is_told_of_its_raycluster() -> None:
    told = trouble_of_cluster(cluster('pods "x" is forbidden: exceeded quota: small, requested: cpu=4'))
    assert told is not None
    assert (told.reason, told.group) == ("QuotaExceeded", None)
    assert "ResourceQuota" in told.message
    told = trouble_of_cluster(cluster("violates PodSecurity"))
    assert told is not None
    assert told.reason == "PodRefused"
    assert trouble_of_cluster({"metadata": {"name": "fastserve"}, "status": {"conditions": []}}) is None


@given(st.text(max_size=5000), st.text(max_size=5000))
def test_what_others_wrote_stays_short_and_on_one_line(reason: str, message: str) -> None:
    for found in (trouble_of_pod(unscheduled(message), NOW), trouble_of_cluster(cluster(message))):
        assert found is not None
        assert len(found.message) < 3 * MOST_CHARACTERS
        assert len(found.message.splitlines()) == 1
        assert not {"Cc", "Cf"} & {unicodedata.category(letter) for letter in found.message}
    told = trouble_of_pod(waiting(reason, message), NOW)
    assert told is None or told.reason.isalpha()


def test_troubles_of_heads_come_first_and_other_pods_are_not_asked_for() -> None:
    objects = KubeObjects()
    place = "/api/v1/namespaces/demo/pods"
    for number, found in enumerate((unscheduled("no room"), waiting("ErrImagePull"), pod(None, phase="Running"))):
        found["metadata"]["name"] = f"p{number}"
        objects.put(f"{place}/p{number}", found)
    head = pod(None, "head", phase="Failed", reason="Evicted")
    objects.put(f"{place}/head", head)
    theirs = unscheduled("not ours")
    theirs["metadata"] = {"name": "theirs", "labels": {}}
    objects.put(f"{place}/theirs", theirs)
    with served(objects) as api:
        found = Pods(api, "demo", lambda: NOW).troubles()
    assert [(item.group, item.reason) for item in found] == [
        (None, "Evicted"),
        ("l4", "Unschedulable"),
        ("l4", "ImagePull"),
    ]
    assert found[0].concerns(["a"])
    assert found[1].concerns(["a", "l4"])
    assert not found[1].concerns(["a"])
