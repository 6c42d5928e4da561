"""Faults on a real API server with the operator as a process. The Ray head beside it is a small one, whose stages take
no time, so that what is tried here is the operator; tests/unit/operator/test_faults.py goes through every call.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from control_plane import Cluster, ControlPlane
from model_files import write_inputs
from operator_process import Operator, stages, tending
from small_cluster import Ray, served_ray

from fastserve.spec.crd import crds

pytestmark = pytest.mark.kube

RETRY = "fastserve.dev/retry"
STORE_BYTES = 1 << 20


@dataclass
class SmallHead:
    """Where the small Ray head answers."""

    ray: Ray
    dashboard_url: str
    token_path: Path
    python: str = "python"

    @property
    def serve_url(self) -> str:
        return self.dashboard_url


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of six tokens, and rows for it."""
    return write_inputs(tmp_path_factory.mktemp("files"))


@pytest.fixture
def head(tmp_path: Path) -> Iterator[SmallHead]:
    ray = Ray()
    (tmp_path / "token").write_text("any\n")
    with served_ray(ray) as url:
        yield SmallHead(ray, url, tmp_path / "token")


@pytest.fixture
def operator(
    definitions: Cluster, operator_kubeconfig: Path, namespace: str, head: SmallHead, tmp_path: Path
) -> Iterator[Operator]:
    with tending(Operator(definitions, operator_kubeconfig, namespace, tmp_path, head)) as found:
        yield found


def whole(files: Path, **more: Any) -> dict[str, Any]:
    """Every stage, and served."""
    return {
        "source": f"file://{files}/model",
        "train": {"method": "full", "dataset": f"file://{files}/train.jsonl", "batchTokens": 64, "maxLength": 32},
        "compress": [{"quantize": {"format": "int8", "method": "roundToNearest"}}],
        "evaluate": {"data": f"file://{files}/held.jsonl"},
        "serve": {"context": 32},
        **more,
    }


def ready(operator: Operator, name: str, seconds: float = 300) -> None:
    operator.kubectl("wait", "--for=condition=Ready", f"model/{name}", f"--timeout={seconds:.0f}s")


def acts(operator: Operator) -> bool:
    """Whether the last that it said of it is that it acts."""
    said = [line for line in operator.log().splitlines() if "this replica" in line]
    return bool(said) and "this replica acts" in said[-1]


def refused(operator: Operator, name: str, reason: str) -> Callable[[], bool]:
    return lambda: operator.condition(f"model/{name}").get("reason") == reason


def once_each(operator: Operator, head: SmallHead) -> None:
    """Every stage has one artifact and was begun once, and nothing runs any more."""
    assert stages(operator) == {"source", "train", "compress", "evaluate"}
    assert len(head.ray.ran) == 4, head.ray.ran
    assert not head.ray.running


@contextlib.contextmanager
def a_second(operator: Operator) -> Iterator[Operator]:
    """Another replica. To be made before the first one is started."""
    found = replace(operator, name="second")
    try:
        yield found
    finally:
        found.stop()


def decisions(operator: Operator) -> list[str]:
    """What an operator said of Models."""
    return [line for line in operator.log().splitlines() if f" INFO {operator.namespace}/" in line]


def test_a_leader_that_was_stopped_for_longer_than_its_lease_does_not_act_again(
    operator: Operator, head: SmallHead, files: Path
) -> None:
    with a_second(operator) as second:
        operator.start()
        operator.until(lambda: acts(operator), "it does not act", 60)
        second.start()
        head.ray.holds = True
        operator.apply("Model", "whole", whole(files))
        operator.until(lambda: any("is running" in line for line in decisions(operator)), "nothing runs", 60)
        operator.pause()  # it has nothing to say until the stage ends
        second.until(lambda: acts(second), "the other one does not take over", 60)
        head.ray.holds = False
        second.until(lambda: len(head.ray.ran) > 1, "the other one does not go on", 60)
        said = len(decisions(operator))
        operator.go_on()
        operator.until(lambda: not acts(operator), "the first one still believes that it leads", 60)
        ready(second, "whole")
        once_each(second, head)
        assert len(decisions(operator)) == said, "it decided without the lease"
        second.kill()
        operator.until(lambda: acts(operator), "nobody took over from the other one", 60)


def test_an_api_server_that_is_away_in_the_middle_is_waited_for(
    operator: Operator, head: SmallHead, own_cluster: ControlPlane, files: Path
) -> None:
    """What runs meanwhile goes on, and its end is seen when the API server is back."""
    operator.start()
    head.ray.holds = True
    operator.apply("Model", "whole", whole(files))
    operator.until(lambda: head.ray.running, "nothing runs", 60)
    own_cluster.stop_api()
    try:
        operator.until(lambda: not acts(operator), "without a lease it still acts", 60)
        head.ray.holds = False
        operator.until(lambda: len(head.ray.ran) == 1 and not head.ray.running, "the stage does not go on", 60)
    finally:
        own_cluster.start_api()
    ready(operator, "whole", 90)
    once_each(operator, head)


def test_other_writers_at_the_same_objects_hold_up_nothing(operator: Operator, head: SmallHead, files: Path) -> None:
    """Somebody annotates the Model, its state and the gateway's orders, and writes into its status, all the while."""
    kube = operator.cluster.api
    spaces = f"/api/v1/namespaces/{operator.namespace}/configmaps"
    model = f"/apis/fastserve.dev/v1alpha1/namespaces/{operator.namespace}/models/whole"
    over, written = threading.Event(), []

    def write() -> None:
        patch = {"Content-Type": "application/merge-patch+json"}
        while not over.wait(0.2):
            body = json.dumps({"metadata": {"annotations": {"somebody": str(len(written))}}})
            for path in (model, f"{spaces}/whole-state", f"{spaces}/fastserve-gateway"):
                written.append(kube.patch(path, content=body, headers=patch).status_code)
            status = json.dumps({"status": {"stage": "what?", "conditions": []}})
            kube.patch(f"{model}/status", content=status, headers=patch)

    operator.start()
    operator.apply("Model", "whole", whole(files))
    operator.apply("Model", "whole", whole(files))  # twice is as once
    thread = threading.Thread(target=write)
    thread.start()
    try:
        operator.until(lambda: len(head.ray.ran) == 4 and head.ray.apps, "it does not get on", 120)
    finally:
        over.set()
        thread.join()
    assert 200 in written
    ready(operator, "whole")
    once_each(operator, head)
    operator.kubectl("delete", "model/whole", "--timeout=300s")
    assert not head.ray.apps
    operator.until(lambda: not operator.left(), "something is left", 30)


@pytest.mark.parametrize("cascade", ["background", "foreground"])
def test_a_model_that_is_deleted_while_it_trains_takes_its_run_along(
    operator: Operator, head: SmallHead, files: Path, cascade: str
) -> None:
    """In the foreground, as Argo CD deletes, what was kept of it is gone first."""
    head.ray.keeps = "-train-"
    operator.start()
    operator.apply("Model", "whole", whole(files))
    operator.until(lambda: any("-train-" in name for name in head.ray.running), "training does not begin", 60)
    operator.kubectl("delete", "model/whole", f"--cascade={cascade}", "--timeout=300s")
    assert not head.ray.running
    operator.until(lambda: not operator.left(), f"left: {operator.left()}", 30)


def test_a_secret_that_is_missing_is_made_anew_or_said(operator: Operator, head: SmallHead, files: Path) -> None:
    def key() -> str:
        found = json.loads(operator.kubectl("get", "secret", "team-key", "-o", "json", "--ignore-not-found") or "{}")
        return base64.b64decode(found.get("data", {}).get("key", "")).decode()

    def known() -> list[str]:
        text = operator.kubectl("get", "configmap", "fastserve-gateway", "-o", "json", "--ignore-not-found") or "{}"
        orders = json.loads(json.loads(text).get("data", {}).get("config.json", "{}"))
        return [item["sha256"] for item in orders.get("keys", [])]

    operator.start()
    operator.apply("AccessKey", "team", {"models": ["whole"]})
    operator.until(lambda: key() and known(), "there is no key", 60)
    before, told = key(), known()
    operator.kubectl("delete", "secret/team-key")
    operator.until(lambda: key() not in ("", before) and known() not in ([], told), "there is no new key", 60)
    head.token_path.rename(head.token_path.with_suffix(".away"))  # the Secret with Ray's token, as its pod mounts it
    operator.apply("Model", "whole", whole(files))
    operator.until(
        lambda: "--ray-token-file" in operator.condition("model/whole").get("message", ""),
        "nobody says that the token is missing",
        60,
    )
    head.token_path.with_suffix(".away").rename(head.token_path)
    ready(operator, "whole")


@pytest.fixture
def small_store(tmp_path: Path, missing: Callable[[str], None]) -> Iterator[Path]:
    """The store's folder on a file system of its own that holds a megabyte."""
    place = tmp_path / "store"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={STORE_BYTES}", "tmpfs", str(place)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        missing(f"needs to mount a small file system: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path, leave: int = 0) -> Path:
    """A file that takes all the room but `leave` bytes."""
    found = place / "ballast"
    with contextlib.suppress(OSError), found.open("ab") as file:
        while True:
            file.write(b"0" * 4096)
            file.flush()
    if leave:
        os.truncate(found, found.stat().st_size - leave)
    return found


def test_a_full_store_is_said_and_tears_nothing(
    small_store: Path, operator: Operator, head: SmallHead, files: Path
) -> None:
    ballast = fill(small_store)
    operator.start()
    operator.apply("Model", "whole", whole(files))
    operator.until(refused(operator, "whole", "StoreFull"), "nobody says that the store is full", 60)
    told = operator.condition("model/whole")
    assert told["status"] == "Unknown", "it comes right by itself"
    assert "no space left" in told["message"]
    assert not head.ray.jobs
    os.truncate(ballast, ballast.stat().st_size - 32 * 1024)  # room to begin, and none for an artifact
    operator.until(lambda: head.ray.ran, "it does not go on by itself", 60)
    operator.until(
        lambda: refused(operator, "whole", "StoreFull")() and operator.condition("model/whole")["status"] == "False",
        "nobody says that the artifact did not fit, and that it is not tried for ever",
        60,
    )
    assert not list(small_store.glob("*/artifacts/*/*/record.json"))
    assert not [path for path in small_store.rglob("*") if path.is_file() and "/files/" in str(path)], "torn files"
    ballast.unlink()
    operator.kubectl("annotate", "model/whole", f"{RETRY}=1")
    ready(operator, "whole")
    assert stages(operator) == {"source", "train", "compress", "evaluate"}


OLD = {
    "a-word": {"source": 3, "train": "yes"},
    "b-none": None,
    "c-list": [1, 2],
    "d-nested": {"source": {"uri": {"deep": [None, {"": 1}]}}, "serve": [], "compress": {"quantize": 8}},
    "e-later": {"source": "file:///x", "serve": {"replicas": {"min": "many"}}, "newKey": {"of": "2031"}},
}


@pytest.fixture
def of_an_older_version(definitions: Cluster, namespace: str) -> list[str]:
    """Models that were stored when the definition checked nothing."""
    name = "models.fastserve.dev"
    crd = json.loads(json.dumps(crds()["models"]))
    loose = json.loads(json.dumps(crd))
    (version,) = loose["spec"]["versions"]
    whatever = {"x-kubernetes-preserve-unknown-fields": True}
    version["schema"]["openAPIV3Schema"] = {
        "type": "object",
        "properties": {"spec": whatever, "status": {"type": "object", **whatever}},
    }
    version.pop("additionalPrinterColumns", None)
    version["subresources"] = {"status": {}}
    try:
        definitions.kubectl("replace", "-f", "-", text=json.dumps(with_version(definitions, loose)))
        path = f"/apis/fastserve.dev/v1alpha1/namespaces/{namespace}/models"
        for model, spec in OLD.items():
            value = {"apiVersion": "fastserve.dev/v1alpha1", "kind": "Model", "metadata": {"name": model}, "spec": spec}
            put_when_taken(definitions, path, value)
    finally:
        definitions.kubectl("replace", "-f", "-", text=json.dumps(with_version(definitions, crd)))
        definitions.established(name)
    return list(OLD)


def with_version(cluster: Cluster, crd: dict[str, Any]) -> dict[str, Any]:
    found = cluster.get(f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{crd['metadata']['name']}")
    return {**crd, "metadata": {**crd["metadata"], "resourceVersion": found["metadata"]["resourceVersion"]}}


def put_when_taken(cluster: Cluster, path: str, value: dict[str, Any]) -> None:
    """The API server takes a moment until it checks by a definition as it is now."""
    end = time.monotonic() + 300
    while not (answer := cluster.api.post(path, json=value)).is_success:
        assert time.monotonic() < end, answer.text
        time.sleep(0.1)


def told(operator: Operator, name: str) -> tuple[str, str]:
    """What is said of a Model: by its condition, or, where the API server takes no status for it, by an Event."""
    found = operator.condition(f"model/{name}")
    if found:
        return found["status"], found["reason"]
    items = json.loads(operator.kubectl("get", "events", "-o", "json"))["items"]
    reasons = [item["reason"] for item in items if item["involvedObject"]["name"] == name]
    return ("False", "ManifestInvalid") if "ManifestInvalid" in reasons else ("", "")


def test_bad_objects_of_an_older_version_are_said_and_hinder_nobody(
    of_an_older_version: list[str], operator: Operator, files: Path
) -> None:
    operator.start()
    operator.apply("Model", "whole", whole(files))
    invalid = ("False", "ManifestInvalid")
    for name in of_an_older_version:
        operator.until(lambda name=name: told(operator, name) == invalid, f"{name} has no answer", 60)
    ready(operator, "whole")
    operator.kubectl("delete", "models", "--all", "--timeout=60s")
    operator.until(lambda: not operator.left(), f"left: {operator.left()}", 30)
