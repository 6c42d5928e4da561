"""`fastserve logs` on a cluster: of a job and of a replica of a real Ray head, through a forwarded port."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import clerk
import port_forward
import pytest
from kube_objects import KubeObjects, kubeconfig, served

from fastserve.cluster.home import Home
from fastserve.cluster.kube.config import reach
from fastserve.cluster.kube.door import Door
from fastserve.cluster.kube.logs import curve_of, log_of
from fastserve.cluster.ray_head import Endpoint, RayHead
from fastserve.cluster.ray_jobs import Jobs
from fastserve.cluster.ray_serve import ServeApi, app_for
from fastserve.errors import ClusterFailed, UsageInvalid
from fastserve.plan.facts import Hardware, ModelFacts
from fastserve.plan.placement import Bounds
from fastserve.plan.revision import Revision
from fastserve.plan.stages import Stage
from fastserve.spec.serve import Serve
from fastserve.telemetry.curve import told

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

FACTS = ModelFacts(
    architecture="LlamaForCausalLM", parameters=10**6, weight_bytes=2 * 10**6, layers=2, hidden=64, intermediate=128,
    heads=2, kv_heads=1, head_dim=32, vocab=256, max_context=256, tied_embeddings=True, dtype="bfloat16",
)  # fmt: skip
REVISION = Revision("clerk", Stage.SOURCE, "k" * 64, "d" * 64, {})
KEY = "0123456789ab"


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("PYTHONPATH", str(clerk.FOLDER))
    home = Home(tmp_path / "home")
    home.create()
    found = RayHead(home.path)
    try:
        yield found.start()
    finally:
        found.stop()


@pytest.fixture
def door(head: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    """A namespace whose RayCluster is that head."""
    objects = KubeObjects()
    for name in ("clerk", "other"):
        objects.put(f"/apis/fastserve.dev/v1alpha1/namespaces/demo/models/{name}", {"metadata": {"name": name}})
    cluster = {
        "metadata": {"name": "fastserve", "creationTimestamp": "2027-01-01T00:00:00Z"},
        "spec": {"authOptions": {"mode": "token"}},
        "status": {"head": {"serviceName": "fastserve-head-svc"}},
    }
    objects.put("/apis/ray.io/v1/namespaces/demo/rayclusters/fastserve", cluster)
    token = {"auth_token": base64.b64encode(head.token.encode()).decode()}
    objects.put("/api/v1/namespaces/demo/secrets/fastserve", {"metadata": {"name": "fastserve"}, "data": token})
    dashboard = urlsplit(head.dashboard_url).port
    assert dashboard is not None
    port_forward.install(tmp_path / "bin", {"fastserve-head-svc:8265": dashboard})
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with served(objects) as api:
        yield Door(reach(kubeconfig(api, tmp_path / "kubeconfig"), "small", None))


def until(true: Callable[[], object], what: str) -> None:
    end = time.monotonic() + 240
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.2)


def test_logs_of_stages_and_replicas_come_through(head: Endpoint, door: Door, tmp_path: Path) -> None:
    jobs = Jobs(head.dashboard_url, head.token)
    loss = told({"step": 3, "loss": 2.5}, 9)
    for stage, word in (("source", "first"), ("train", "second")):
        name = f"clerk-{stage}-{KEY}-1"
        jobs.submit(name, f"python -c \"print('the {word} one'); print('{loss}')\"", env={})
        jobs.await_end(name, 120)
    bounds = Bounds("local", 1, 1, "")
    serve = Serve.model_validate({})
    made = app_for(REVISION, serve, "file:///nowhere", FACTS, Hardware(cpus=1, memory_bytes=2**32), bounds)
    api = ServeApi(head.dashboard_url, head.token)
    api.put([clerk.app(made, seconds=0.1, slots=1)], head.serve_port)
    assert "the first one" in log_of(door, "clerk", "source", 50)
    assert "the second one" in log_of(door, "clerk", None, 50), "the newest"
    trained = {"name": "clerk", "stages": {"train": {"state": "committed"}}}
    assert curve_of(door, trained) == [{"step": 3, "loss": 2.5}]
    assert curve_of(door, {"name": "clerk", "stages": {}}) == [], "nobody has looked at it yet"
    with pytest.raises(UsageInvalid, match="leave --plot out"):
        curve_of(door, {"name": "clerk", "stages": {"source": {"state": "committed"}}})
    until(lambda: all(app.state == "RUNNING" for app in api.get().values()), "it does not come up")
    assert f"replica_clerk-{REVISION.digest[:8]}-local" in log_of(door, "clerk", "serve", 50)
    with pytest.raises(UsageInvalid, match="has a log of any stage of other"):
        log_of(door, "other", None, 50)
    with pytest.raises(UsageInvalid, match="has a log of evaluate"):
        log_of(door, "clerk", "evaluate", 50)
    (tmp_path / "bin" / "kubectl").unlink()
    port_forward.install(tmp_path / "bin", {})
    with pytest.raises(ClusterFailed, match=r'port-forward service/fastserve-head-svc.*services "fastserve-head-svc"'):
        log_of(door, "clerk", None, 50)
