"""Causes that stand in pods and Secrets, on a real API server: a cluster without machines has no other kind of pod."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from control_plane import Cluster
from tiny import tiny_model

from fastserve.spec.model import API_VERSION

pytestmark = [pytest.mark.kube, pytest.mark.timeout(900)]

READY = "jsonpath={.status.conditions[?(@.type=='Ready')].REASON}"
CLUSTER = {
    "apiVersion": "ray.io/v1",
    "kind": "RayCluster",
    "metadata": {"name": "fastserve"},
    "spec": {
        "headGroupSpec": {
            "rayStartParams": {},
            "template": {"spec": {"containers": [{"name": "ray-head", "image": "none/of-this-name:0"}]}},
        },
    },
}
POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "head", "labels": {"ray.io/cluster": "fastserve", "ray.io/node-type": "head"}},
    "spec": {"containers": [{"name": "ray-head", "image": "none/of-this-name:0"}]},
}


class Tended:
    """A namespace with a RayCluster that nobody brings up, and an operator with the chart's rights."""

    def __init__(self, cluster: Cluster, namespace: str, log: Path) -> None:
        self._cluster = cluster
        self.namespace = namespace
        self.log = log

    def kubectl(self, *words: str, text: str | None = None) -> str:
        return self._cluster.kubectl("-n", self.namespace, *words, text=text).stdout

    def model(self, source: object) -> None:
        value = {"apiVersion": API_VERSION, "kind": "Model", "metadata": {"name": "m"}, "spec": {"source": source}}
        self.kubectl("apply", "-f", "-", text=json.dumps(value))

    def pod_says(self, **status: Any) -> None:
        self.kubectl("patch", "pod/head", "--subresource=status", "--type=merge", "-p", json.dumps({"status": status}))

    def kubelet_warns(self, reason: str, message: str) -> None:
        """An Event about the pod, as a kubelet makes it."""
        keys = ("kind", "namespace", "name", "uid")
        found = json.loads(self.kubectl("get", "pod/head", "-o", "json"))
        about = {key: {**found, **found["metadata"]}[key] for key in keys}
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        value = {"apiVersion": "v1", "kind": "Event", "metadata": {"generateName": "head."}, "type": "Warning"}
        value |= {"involvedObject": about, "reason": reason, "message": message, "lastTimestamp": now}
        self.kubectl("create", "-f", "-", text=json.dumps(value))

    def becomes(self, reason: str) -> str:
        """The message, once the Model is not ready for that reason."""
        self._until(lambda: self._ready("reason") == reason, reason)
        return self._ready("message")

    def _ready(self, key: str) -> str:
        return self.kubectl("get", "model/m", "-o", READY.replace("REASON", key))

    def _until(self, true: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + 300
        while not true():
            now = self.kubectl("get", "model/m", "-o", "json")
            assert time.monotonic() < end, f"not {what}: {now}\n{self.log.read_text()[-3000:]}"
            time.sleep(0.2)


@pytest.fixture
def tended(ray_definitions: Cluster, namespace: str, operator_kubeconfig: Path, tmp_path: Path) -> Iterator[Tended]:
    found = Tended(ray_definitions, namespace, tmp_path / "operator.log")
    # The chart's operator makes its RayClusters and finds them by label; this one is given one by name.
    found.kubectl("create", "role", "by-name", "--verb=get", "--resource=rayclusters.ray.io")
    account = f"--serviceaccount={namespace}:fastserve-operator"
    found.kubectl("create", "rolebinding", "by-name", "--role=by-name", account)
    found.kubectl("apply", "-f", "-", text=json.dumps(CLUSTER))
    words = [sys.executable, "-m", "fastserve_operator", "--namespace", namespace, "--ray-cluster", "fastserve"]
    words += ["--store", str(tmp_path / "store"), "--scratch", str(tmp_path / "s")]
    words += ["--gateway-admin-url", "http://127.0.0.1:9"]
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
    with open(found.log, "wb") as opened:
        environment = {**os.environ, "KUBECONFIG": str(operator_kubeconfig), **hub}
        process = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, stdout=opened, stderr=opened)
    try:
        yield found
    finally:
        process.terminate()
        ended = process.wait(300)
    said = found.log.read_text()
    assert ended == 0, said[-3000:]
    assert "orbidden" not in said


def test_what_a_pod_says_becomes_the_condition_and_goes_with_it(tended: Tended, tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    tended.model(f"file://{tmp_path}/model")
    tended.becomes("ClusterFailed")  # no pod at all: KubeRay does not run here
    tended.kubectl("apply", "-f", "-", text=json.dumps(POD))
    no_room = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "3 Insufficient memory.",
    }
    tended.pod_says(conditions=[no_room])
    assert "pod head of the head: Unschedulable: 3 Insufficient memory; add" in tended.becomes("Unschedulable")
    waits = {"name": "ray-head", "image": "x", "imageID": "", "ready": False, "restartCount": 0}
    waiting = {"reason": "ImagePullBackOff", "message": "Back-off pulling image none/of-this-name:0"}
    tended.pod_says(conditions=[], containerStatuses=[{**waits, "state": {"waiting": waiting}}])
    assert "none/of-this-name:0; check `ray.image`" in tended.becomes("ImagePull")
    stuck = [{"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}]
    creating = {"reason": "ContainerCreating"}
    tended.pod_says(conditions=stuck, containerStatuses=[{**waits, "state": {"waiting": creating}}])
    tended.kubelet_warns("FailedMount", "MountVolume.SetUp failed for volume store: mount timed out")
    assert "volume store: mount timed out; look whether" in tended.becomes("MountFailed")
    tended.kubectl("delete", "pod/head", "--force", "--grace-period=0")
    quota = {
        "type": "ReplicaFailure",
        "status": "True",
        "reason": "FailedCreateHeadPod",
        "message": "exceeded quota: q",
    }
    quota["lastTransitionTime"] = "2027-01-01T00:00:00Z"
    status = json.dumps({"status": {"conditions": [quota]}})
    tended.kubectl("patch", "raycluster/fastserve", "--subresource=status", "--type=merge", "-p", status)
    assert "exceeded quota: q; raise" in tended.becomes("QuotaExceeded")


def test_a_source_whose_secret_is_missing_goes_on_when_it_is_made(tended: Tended) -> None:
    tended.model({"uri": "hf://acme/private", "tokenSecret": "hub"})
    assert f"no Secret hub in namespace {tended.namespace}" in tended.becomes("SecretMissing")
    tended.kubectl("create", "secret", "generic", "hub", "--from-literal=token=of-nobody")
    message = tended.becomes("SourceNotFound")  # it asked the hub, which is not there
    assert "of-nobody" not in message + tended.kubectl("get", "configmaps,events", "-o", "json")
