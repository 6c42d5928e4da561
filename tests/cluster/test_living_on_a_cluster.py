"""A model's life on a whole cluster, from `helm install` to `helm uninstall`, with real pods and a real KubeRay.

The tests are one story and run in this order on one cluster.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from images import Image
from installation import NAMESPACE, Crowd, Installation, installed
from whole_cluster import WholeCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

SMALLEST = """apiVersion: fastserve.dev/v1alpha1
kind: Model
metadata: {name: vllm}
spec: {source: "file:///store/inputs/model", serve: {}}
"""
"""Public case 16: a model named after what serves it."""

ALL_STAGES = """apiVersion: fastserve.dev/v1alpha1
kind: Model
metadata: {name: vllm}
spec:
  source: file:///store/inputs/model
  train:
    method: lora
    dataset: file:///store/inputs/train.jsonl
    batchTokens: 512
    maxLength: 64
  compress: [{quantize: {format: int8}}]
  evaluate: {data: file:///store/inputs/held.jsonl}
  serve: {context: 1024}
"""


@pytest.fixture(scope="module")
def there(cluster: WholeCluster, pod_images: list[Image]) -> Iterator[Installation]:
    """The chart installed, in a namespace where Services have the names that engines and Ray read variables of."""
    with installed(cluster, pod_images, "vllm") as made:
        for name in ("vllm", "ray"):
            service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": NAMESPACE}}
            cluster.apply({**service, "spec": {"ports": [{"port": 8000}]}})
        yield made


def test_the_smallest_manifest_is_ready_and_answers(there: Installation) -> None:
    there.kubectl("apply", "-f", "-", text=SMALLEST)
    there.until_ready("vllm")
    answer = there.ask("vllm")
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["role"] == "assistant"
    assert there.model("vllm")["status"]["url"].startswith("http://fastserve-gateway.models.svc")


def test_containers_know_nothing_that_they_need_not(there: Installation) -> None:
    """No variables of Services, and no token of the API but the operator's and the autoscaler's."""
    pods = there.pods()
    parts = {pod["metadata"]["labels"].get("app.kubernetes.io/component") for pod in pods}
    assert parts >= {"gateway", "operator", "ray-head", "ray-worker"}
    for pod in pods:
        name, spec = pod["metadata"]["name"], pod["spec"]
        assert spec["enableServiceLinks"] is False, name
        for container in spec["containers"]:
            mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
            has_token = "/var/run/secrets/kubernetes.io/serviceaccount" in mounted
            assert has_token == (container["name"] in ("operator", "autoscaler")), container["name"]
            read = ("exec", name, "-c", container["name"], "--", "cat", "/proc/1/environ")
            variables = dict(item.partition("=")[::2] for item in there.kubectl(*read).split("\0") if item)
            linked = [key for key, value in variables.items() if value.startswith("tcp://") and key[:4] != "KUBE"]
            assert linked == [], name
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, name


def test_a_changed_manifest_goes_through_all_stages_and_back(there: Installation) -> None:
    """On two nodes: the machine that trains has no place on the one where the model is served."""
    there.cluster.add_node(1)
    (before,) = revisions(there)
    with Crowd().asking(there, "vllm") as crowd:
        there.kubectl("apply", "-f", "-", text=ALL_STAGES)
        there.cluster.until(lambda: revisions(there) != [before], "another revision serves")
        there.until_ready("vllm")
        there.fastserve("rollback", "vllm")
        there.cluster.until(lambda: revisions(there) == [before], "the revision of before serves")
        crowd.until_answered(there)
    assert crowd.lost == []
    stages = {condition["type"] for condition in there.model("vllm")["status"]["conditions"]}
    assert stages >= {"Source", "Train", "Compress", "Evaluate", "Serve"}


def test_the_command_line_speaks_of_the_cluster(there: Installation) -> None:
    assert "vllm" in there.fastserve("status")
    assert before_of(there)[:8] in there.fastserve("why", "vllm")
    assert there.fastserve("logs", "vllm", "train").strip()
    there.fastserve("chat", "vllm", "hello")  # it may well have nothing to say: its weights are random


def test_it_is_taken_away_again(there: Installation) -> None:
    cluster = there.cluster
    there.kubectl("delete", "model", "vllm", "--timeout=180s")
    there.kubectl("delete", "accesskey", "--all", "--timeout=60s")
    done = cluster.run(cluster.binaries["helm"], "uninstall", "fastserve", "-n", NAMESPACE, "--wait")
    assert done.returncode == 0, done.stderr
    cluster.until(lambda: there.pods() == [], "no pod is left")
    kinds = "all,configmaps,secrets,serviceaccounts,roles,rolebindings,rayclusters,networkpolicies,pdb,leases"
    cluster.until(lambda: not left(there.kubectl("get", kinds, "-o", "yaml")), "nothing is left")
    everywhere = there.kubectl("get", "clusterroles,clusterrolebindings,hardwareprofiles", "-o", "name")
    assert [line for line in everywhere.splitlines() if "fastserve" in line or "hardware" in line] == []
    definitions = cluster.kubectl("get", "crd", "-o", "name").stdout
    assert "models.fastserve.dev" in definitions
    assert list((there.inputs.parent).rglob("record.json")), "artifacts stay"


def revisions(there: Installation) -> list[str]:
    """What serves all traffic."""
    return [there.model("vllm")["status"]["revision"]]


def before_of(there: Installation) -> str:
    (found,) = revisions(there)
    return found


def left(text: str) -> list[str]:
    """Names of objects that Kubernetes does not make in every namespace."""
    found: list[dict[str, Any]] = yaml.safe_load(text)["items"]
    names = [f"{item['kind']}/{item['metadata']['name']}" for item in found]
    usual = ("ConfigMap/kube-root-ca.crt", "ServiceAccount/default", "Service/vllm", "Service/ray")
    return [name for name in names if name not in usual]
