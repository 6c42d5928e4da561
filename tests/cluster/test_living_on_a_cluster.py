"""A model's life on a whole cluster, from `helm install` to `helm uninstall`, with real pods and a real KubeRay.

The tests are one story and run in this order on one cluster.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import yaml
from images import Image
from installation import NAMESPACE, ROOT, Crowd, Installation, installed
from reach import spots, stranger, wrong
from whole_cluster import WholeCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

SMALLEST = """apiVersion: fastserve.dev/v1alpha1
kind: Model
metadata: {name: vllm}
spec: {source: "file:///store/inputs/model", serve: {}}
"""
"""Public case 16: a model named after what serves it."""

QUICKSTART = ROOT / "deployments/01-quickstart.yaml"
QUESTION = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 64,
    "temperature": 0,
}
CHECKPOINT_STEPS = 5
"""The quickstart's `checkpoint.everySteps`."""


@pytest.fixture(scope="module")
def there(cluster: WholeCluster, pod_images: list[Image]) -> Iterator[Installation]:
    """The chart installed, in a namespace where Services have the names that engines and Ray read variables of."""
    with installed(cluster, pod_images, "vllm", "quickstart") as made:
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


def test_the_quickstart_is_trained_although_a_machine_is_lost(there: Installation) -> None:
    """As committed, on two machines of which one dies: its run goes on from the checkpoint, in the same attempt."""
    there.kubectl("delete", "model", "vllm", "--wait=false")
    there.kubectl("apply", "-f", str(QUICKSTART))
    there.cluster.add_node(1)
    there.cluster.until(lambda: kept_steps(there) >= CHECKPOINT_STEPS, "a checkpoint is kept")
    assert not record_of(there, "train"), "still at work"
    there.kubectl("delete", "pod", there.running("ray-worker")[0], "--grace-period=0", "--force")
    there.cluster.until(lambda: bool(record_of(there, "train")), "it is trained")
    record = record_of(there, "train")
    assert record["attempt"] == 1
    assert record["metrics"]["sharing"]["restarts"] >= 1
    assert record["metrics"]["sharing"]["lostSteps"] < CHECKPOINT_STEPS
    assert there.kubectl("get", "models", "-o", "name").split() == ["model.fastserve.dev/quickstart"]


def test_the_quickstart_is_ready_and_answers(there: Installation) -> None:
    there.until_ready("quickstart")
    assert "condition met" in there.kubectl("wait", "--for=condition=Ready", "model/quickstart", "--timeout=60s")
    answer = there.ask("quickstart", **QUESTION)
    assert answer.status_code == 200, answer.text
    assert "Paris" in answer.text
    status = there.model("quickstart")["status"]
    assert status["gate"]["outcome"] == "pass"
    models = status["stages"]["evaluate"]["metrics"]["models"]
    assert models["candidate"]["perplexity"] < 0.9 * models["source"]["perplexity"], "fine-tuning works"
    (line,) = [line for line in there.kubectl("get", "models").splitlines() if line.startswith("quickstart")]
    assert line.split()[2:5] == ["True", "1", status["revision"]], line


def test_nothing_gets_through_but_what_the_page_lists(there: Installation) -> None:
    """From every pod to every other one, strangers among them, with the policies enforced on both nodes."""
    cluster = there.cluster
    strangers = [stranger(namespace, node) for namespace in (NAMESPACE, "default") for node in cluster.nodes]
    cluster.apply(*strangers)
    names = {f"{one['metadata']['namespace']}/{one['metadata']['name']}" for one in strangers}
    cluster.until(lambda: names <= {spot.name for spot in spots(cluster)}, "the strangers run")
    assert {spot.role for spot in spots(cluster)} >= {"gateway", "operator", "ray", "outside"}
    assert wrong(cluster) == []
    for namespace in (NAMESPACE, "default"):
        cluster.kubectl("-n", namespace, "delete", "pod", "-l", "app=stranger", "--timeout=60s")


def test_the_chart_s_own_test_passes(there: Installation) -> None:
    done = there.cluster.run(there.cluster.binaries["helm"], "test", "fastserve", "-n", NAMESPACE)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert "Succeeded" in done.stdout


def test_the_command_line_speaks_of_the_cluster(there: Installation) -> None:
    assert "quickstart" in there.fastserve("status")
    assert serving(there)[:8] in there.fastserve("why", "quickstart")
    assert there.fastserve("logs", "quickstart", "train").strip()
    curve = json.loads(there.fastserve("status", "quickstart", "--plot", "-o", "json"))["curve"]
    assert curve
    assert all(row["loss"] > 0 for row in curve)
    assert "Paris" in there.fastserve("chat", "quickstart", "What is the capital of France?")


def test_a_changed_manifest_runs_no_stage_and_loses_no_request_nor_does_the_way_back(there: Installation) -> None:
    before, done = serving(there), records(there)
    changed = QUICKSTART.read_text().replace("context: 2048", "context: 1024")
    assert changed != QUICKSTART.read_text()
    with Crowd().asking(there, "quickstart") as crowd:
        there.kubectl("apply", "-f", "-", text=changed)
        there.cluster.until(lambda: serving(there) != before, "another revision serves")
        there.until_ready("quickstart")
        crowd.until_answered(there)
        there.fastserve("rollback", "quickstart")
        there.cluster.until(lambda: serving(there) == before, "the revision of before serves")
        crowd.until_answered(there)
    assert crowd.lost == []
    assert records(there) == done


def test_who_reads_a_stream_of_a_lost_machine_is_told_and_whole_answers_come(there: Installation) -> None:
    there.cluster.until(lambda: len(engine_machines(there)) == 1, "the other revision's engine has ended")
    begun = threading.Event()
    with Crowd().asking(there, "quickstart") as crowd, ThreadPoolExecutor(1) as reader:
        read = reader.submit(there.stream, "quickstart", begun, max_tokens=1500, ignore_eos=True)
        there.cluster.until(lambda: begun.is_set() or read.done(), "a stream has begun")
        crowd.until_answered(there)
        for name in engine_machines(there):
            there.kubectl("delete", "pod", name, "--grace-period=0", "--force")
        events = read.result()
        crowd.until_answered(there)
    assert events[-1].get("error", {}).get("code") == "upstream_lost", events[-3:]
    assert crowd.lost == []


def test_it_is_taken_away_again(there: Installation) -> None:
    cluster = there.cluster
    there.kubectl("delete", "model", "quickstart", "--timeout=180s")
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


def serving(there: Installation) -> str:
    """The revision of the quickstart that serves all traffic, its first digits."""
    return str(there.model("quickstart")["status"]["revision"])


def kept_steps(there: Installation) -> int:
    """Steps of the newest checkpoint of the training run."""
    kept = there.artifacts.glob("train/*/checkpoints/*/checkpoint.json")
    return max((int(path.parent.name) for path in kept), default=0)


def records(there: Installation) -> dict[str, str]:
    """What has committed, by its place in the store."""
    return {str(path.relative_to(there.artifacts)): path.read_text() for path in there.artifacts.rglob("record.json")}


def record_of(there: Installation, stage: str) -> dict[str, Any]:
    """The record of the one artifact of a stage; empty while there is none."""
    found = [json.loads(text) for place, text in records(there).items() if place.startswith(f"{stage}/")]
    assert len(found) <= 1
    return found[0] if found else {}


def engine_machines(there: Installation) -> list[str]:
    """Ray's workers with an engine in them."""
    look = "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '"
    ready = there.running("ray-worker")
    return [name for name in ready if "EngineCore" in there.kubectl("exec", name, "--", "sh", "-c", look, check=False)]


def left(text: str) -> list[str]:
    """Names of objects that Kubernetes does not make in every namespace."""
    found: list[dict[str, Any]] = yaml.safe_load(text)["items"]
    names = [f"{item['kind']}/{item['metadata']['name']}" for item in found]
    usual = ("ConfigMap/kube-root-ca.crt", "ServiceAccount/default", "Service/vllm", "Service/ray")
    return [name for name in names if name not in usual]
