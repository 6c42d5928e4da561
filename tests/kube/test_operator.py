"""The operator as a process, against a real API server, with a real Ray head beside it and whole pipelines in it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from control_plane import Cluster, ControlPlane
from operator_process import LEASE_SECONDS, Operator, answered, pipeline, stages, tending
from tiny import tiny_model, tiny_rows

from fastserve.cluster.home import Home
from fastserve.cluster.ray_head import Endpoint, RayHead
from fastserve.cluster.ray_jobs import Jobs
from fastserve.cluster.ray_serve import ServeApi

pytestmark = pytest.mark.kube

KILLS = 4


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A real Ray head; the operator is given its address, as it would be given any other's."""
    home = Home(tmp_path_factory.mktemp("ray") / "home")
    home.create()
    found = RayHead(home.path)
    try:
        yield found.start()
    finally:
        found.stop()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and rows for it."""
    folder = tmp_path_factory.mktemp("files")
    tiny_model(folder / "model")
    tiny_rows(folder / "train.jsonl", 0, 64)
    tiny_rows(folder / "held.jsonl", 1000, 16)
    (folder / "bad.jsonl").write_text('{"messages": []}\n{"nothing": "of use"}\n')
    return folder


@pytest.fixture
def operator(
    definitions: Cluster, operator_kubeconfig: Path, namespace: str, head: Endpoint, tmp_path: Path
) -> Iterator[Operator]:
    with tending(Operator(definitions, operator_kubeconfig, namespace, tmp_path, head)) as found:
        yield found


def test_a_pipeline_comes_about_once_however_often_the_operator_is_killed(
    operator: Operator, files: Path, head: Endpoint
) -> None:
    seed = random.randrange(10**6)
    moments = random.Random(seed)
    operator.apply("Model", "tiny", pipeline(files))
    for _ in range(KILLS):
        operator.start()
        time.sleep(moments.uniform(1.0, LEASE_SECONDS + 6.0))
        operator.kill()
    operator.start()
    operator.kubectl("wait", "--for=condition=Ready", "model/tiny", "--timeout=300s")
    assert stages(operator) == {"source", "train", "compress", "evaluate"}
    jobs = [name for name in Jobs(head.dashboard_url, head.token).all() if name.startswith("tiny-")]
    assert len(jobs) == 4, f"a stage ran twice, seed {seed}: {jobs}"
    for stage in ("Source", "Train", "Compress", "Evaluate"):
        assert operator.condition("model/tiny", stage)["status"] == "True"
    told = json.loads(operator.kubectl("get", "events", "-o", "json"))["items"]
    ours = [item for item in told if item["involvedObject"]["name"] == "tiny"]
    assert {"Working", "Ready"} <= {item["reason"] for item in ours}
    assert len(ours) <= 20, "one a decision, not one a beat"
    operator.kubectl("delete", "model/tiny", "--timeout=300s")
    operator.until(lambda: not operator.left(), f"left: {operator.left()}", 30)
    assert len(stages(operator)) == 4, "artifacts stay"


def test_what_cannot_run_is_a_condition_within_seconds_and_hinders_nobody(operator: Operator, files: Path) -> None:
    operator.start()
    good = {"source": f"file://{files}/model"}
    operator.until(lambda: "this replica acts" in operator.log(), "it does not act", 30)
    wrong = {
        "nowhere": ({"source": "file:///there/is/nothing/here"}, "SourceNotFound"),
        "nobody": ({**good, "serve": {"profiles": ["h100"]}}, "NotExecutable"),
        "norows": (
            {**good, "train": {"method": "lora", "dataset": f"file://{files}/bad.jsonl"}},
            "DatasetInvalid",
        ),
        "task": ({**good, "evaluate": {"data": f"file://{files}/none.jsonl"}}, "SourceNotFound"),
    }
    for name, (spec, _) in wrong.items():
        operator.apply("Model", name, spec)
    operator.apply("Model", "good", good)
    operator.apply("AccessKey", "team", {"models": ["good"]})
    for name, (_, reason) in wrong.items():
        operator.until(partial(answered, operator, f"model/{name}"), f"{name} has no answer", 10)
        told = operator.condition(f"model/{name}")
        assert (told["status"], told["reason"], told["observedGeneration"]) == ("False", reason, 1), told
    operator.kubectl("wait", "--for=condition=Ready", "model/good", "accesskey/team", "--timeout=300s")
    key = json.loads(operator.kubectl("get", "secret/team-key", "-o", "json"))
    value = base64.b64decode(key["data"]["key"]).decode()
    assert value.startswith("fs-")
    everything = operator.kubectl("get", "models,accesskeys,configmaps,events", "-o", "yaml") + operator.log()
    assert value not in everything
    operator.apply("Model", "nowhere", good)  # mended, and the artifact is there: another Model made it
    operator.kubectl("wait", "--for=condition=Ready", "model/nowhere", "--timeout=300s")
    operator.kubectl("delete", "models,accesskeys", "--all", "--timeout=300s")
    operator.until(lambda: not operator.left(), f"left: {operator.left()}", 30)


def test_another_replica_takes_over_and_an_api_server_that_was_away_is_found_again(
    operator: Operator, own_cluster: ControlPlane, files: Path
) -> None:
    (operator.folder / "second").mkdir()
    second = replace(operator, folder=operator.folder / "second")
    operator.start()
    operator.until(lambda: "this replica acts" in operator.log(), "it does not act", 30)
    second.start()
    try:
        own_cluster.stop_api()
        time.sleep(LEASE_SECONDS)
        own_cluster.start_api()
        operator.apply("Model", "nowhere", {"source": "file:///there/is/nothing/here"})
        operator.until(partial(answered, operator, "model/nowhere"), "nobody tends it", 30)
        first, other = (operator, second) if "this replica acts" not in second.log() else (second, operator)
        before = len(other.log())
        first.kill()
        operator.apply("Model", "nothing", {"source": "file:///nothing/here/either"})
        operator.until(partial(answered, operator, "model/nothing"), "nobody took over", 30)
        assert "this replica acts" in other.log()[before:]
    finally:
        second.stop()


def test_a_served_model_answers_through_the_gateway_that_reads_the_config_map(
    operator: Operator, files: Path, head: Endpoint
) -> None:
    operator.start()
    operator.apply("Model", "chat", {"source": f"file://{files}/model", "serve": {"context": 1024}})
    operator.apply("AccessKey", "team", {"models": ["chat"]})
    operator.kubectl("wait", "--for=condition=Ready", "model/chat", "accesskey/team", "--timeout=300s")
    status = json.loads(operator.kubectl("get", "model/chat", "-o", "json"))["status"]
    assert (status["replicas"], status["stage"]) == (1, "-")
    assert status["url"] == f"http://fastserve-gateway.{operator.namespace}.svc:8100/v1"
    secret = json.loads(operator.kubectl("get", "secret/team-key", "-o", "json"))
    key = base64.b64decode(secret["data"]["key"]).decode()
    with gateway(operator) as base:
        body = {"model": "chat", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(f"{base}/v1/chat/completions", json=body, headers=headers, timeout=300)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] > 0
        assert httpx.post(f"{base}/v1/chat/completions", json=body, timeout=300).status_code == 401
    operator.kubectl("delete", "model/chat", "accesskey/team", "--timeout=300s")
    operator.until(lambda: not operator.left(), f"left: {operator.left()}", 30)
    assert ServeApi(head.dashboard_url, head.token).get() == {}
    assert orders(operator)["models"] == {}


def orders(operator: Operator) -> dict[str, Any]:
    found = json.loads(operator.kubectl("get", "configmap/fastserve-gateway", "-o", "json"))
    return dict(json.loads(found["data"]["config.json"]))


@contextlib.contextmanager
def gateway(operator: Operator) -> Iterator[str]:
    """The gateway's process with the orders of the ConfigMap in its file, as a mounted volume would give them."""
    port, admin = 18100 + os.getpid() % 400 * 2, 18101 + os.getpid() % 400 * 2
    path = operator.folder / "config.json"
    path.write_text(json.dumps({**orders(operator), "host": "127.0.0.1", "port": port, "adminPort": admin}))
    with open(operator.folder / "gateway.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fastserve.gateway", "--config", str(path)], stdout=log, stderr=log
        )
    try:
        base = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{base}/healthz", timeout=2).status_code == 200
            return False

        operator.until(answers, "the gateway does not answer", 30)
        yield base
    finally:
        process.terminate()
        process.wait(300)
