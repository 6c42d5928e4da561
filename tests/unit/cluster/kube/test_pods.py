"""What pods say, in one word and a sentence with what to do."""

from __future__ import annotations

import unicodedata
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kube_objects import KubeObjects, served

from fastserve.cluster.kube.pods import (
    ASK_SECONDS,
    MOST_ASKED,
    MOST_CHARACTERS,
    Pods,
    is_stuck,
    trouble_of_cluster,
    trouble_of_pod,
)

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


SCHEDULED = {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2027-01-02T03:03:00Z"}


def creating(**more: Any) -> dict[str, Any]:
    state = {"state": {"waiting": {"reason": "ContainerCreating"}}}
    return pod(**{"conditions": [SCHEDULED], "containerStatuses": [state], **more})


def event(reason: str, message: str, uid: str = "u", at: str = JUST_NOW) -> dict[str, Any]:
    return {
        "metadata": {"name": f"{reason}.{uid}.{at}", "creationTimestamp": at},
        "type": "Warning",
        "reason": reason,
        "message": message,
        "involvedObject": {"kind": "Pod", "uid": uid},
        "lastTimestamp": at,
    }


@pytest.mark.parametrize(
    ("told", "reason", "words"),
    [
        (("FailedMount", 'MountVolume.SetUp failed for volume "t": secret "hub" not found'), "SecretMissing", "hub"),
        (("FailedMount", 'MountVolume.SetUp failed for "d": configmap "c" not found'), "SecretMissing", "make what"),
        (("FailedMount", "mount.nfs: Connection timed out"), "MountFailed", "timed out; look whether"),
        (("FailedAttachVolume", "Multi-Attach error for volume pvc-1"), "MountFailed", "Multi-Attach error"),
        (("FailedMapVolume", "no such device"), "MountFailed", "kubectl get pvc"),
        (("FailedCreatePodSandBox", "plugin cni failed: no addresses"), "SandboxFailed", "no addresses; the node's"),
    ],
)
def test_what_only_events_say_has_its_word_too(told: tuple[str, str], reason: str, words: str) -> None:
    found = trouble_of_pod(creating(), NOW, [event(*told)])
    assert found is not None
    assert found.reason == reason
    assert words in found.message


def test_the_newest_event_counts_and_an_old_one_not_at_all() -> None:
    older = event("FailedMount", "mount timed out", at="2027-01-02T03:01:00Z")
    newer = event("FailedMount", "no such device", at="2027-01-02T03:02:00Z")
    found = trouble_of_pod(creating(), NOW, [older, newer])
    assert found is not None
    assert "no such device" in found.message
    assert trouble_of_pod(creating(), NOW, [event("FailedMount", "it was so", at=LONG_AGO)]) is None
    assert trouble_of_pod(creating(), NOW, [event("Unhealthy", "probe failed")]) is None
    again = {**event("FailedMount", "still so", at=LONG_AGO), "series": {"lastObservedTime": JUST_NOW}}
    assert trouble_of_pod(creating(), NOW, [again]) is not None


@pytest.mark.parametrize(
    ("found", "stuck"),
    [
        (creating(), True),
        (creating(containerStatuses=[]), True),
        (creating(initContainerStatuses=[{"state": {"waiting": {"reason": "PodInitializing"}}}]), True),
        (creating(initContainerStatuses=[{"state": {"running": {}}}]), False),
        (creating(containerStatuses=[{"state": {"waiting": {"reason": "ErrImagePull"}}}]), False),
        (creating(conditions=[SCHEDULED, {"type": "PodReadyToStartContainers", "status": "True"}]), False),
        (creating(conditions=[SCHEDULED, {"type": "PodReadyToStartContainers", "status": "False"}]), True),
        (creating(conditions=[{**SCHEDULED, "lastTransitionTime": "2027-01-02T03:04:00Z"}]), False),
        (creating(conditions=[{**SCHEDULED, "status": "False"}]), False),
        (creating(phase="Running"), False),
        (pod(), False),
    ],
)
def test_a_pod_is_stuck_when_it_has_a_node_and_nothing_begins(found: dict[str, Any], stuck: bool) -> None:
    assert is_stuck(found, NOW) is stuck


def test_events_are_asked_for_a_few_stuck_pods_and_not_at_every_look() -> None:
    objects, place, clock = KubeObjects(), "/api/v1/namespaces/demo", [NOW]
    for number in range(6):
        found = creating()
        found["metadata"] |= {"name": f"p{number}", "uid": f"u{number}"}
        objects.put(f"{place}/pods/p{number}", found)
    objects.put(f"{place}/pods/runs", pod(None, "runs", phase="Running"))
    said = [event("FailedMount", "mount timed out", "u2"), event("FailedMount", "somebody else's", "u9")]
    for item in (*said, {**event("FailedMount", "no warning", "u1"), "type": "Normal"}):
        objects.put(f"{place}/events/{item['metadata']['name']}", item)

    def asked() -> int:
        return objects.calls.count(("GET", f"{place}/events"))

    with served(objects) as api:
        pods = Pods(api, "demo", lambda: clock[0])
        (told,) = pods.troubles()
        assert (told.group, told.reason) == ("l4", "MountFailed")
        assert told.message.startswith("pod p2 of profile l4: FailedMount: mount timed out; ")
        assert pods.troubles() == (told,)
        assert asked() == MOST_ASKED
        clock[0] += ASK_SECONDS
        assert pods.troubles() == (told,)
        assert asked() == 2 * MOST_ASKED
        for number in range(6):
            found = creating(phase="Running")
            found["metadata"] |= {"name": f"p{number}", "uid": f"u{number}"}
            objects.put(f"{place}/pods/p{number}", found)
        clock[0] += ASK_SECONDS
        assert pods.troubles() == ()
        assert asked() == 2 * MOST_ASKED


def test_who_may_not_read_events_is_told_what_the_pods_say() -> None:
    class Forbidding(KubeObjects):
        def _read(self, path: str, query: dict[str, list[str]]) -> tuple[int, Any]:
            return (403, {"message": "events is forbidden"}) if path.endswith("/events") else super()._read(path, query)

    objects, place = Forbidding(), "/api/v1/namespaces/demo/pods"
    for name, found in (("stuck", creating()), ("unscheduled", unscheduled("no room"))):
        found["metadata"]["name"] = name
        objects.put(f"{place}/{name}", found)
    with served(objects) as api:
        assert [item.reason for item in Pods(api, "demo", lambda: NOW).troubles()] == ["Unschedulable"]
