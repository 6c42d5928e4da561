"""The operator does its work with the rights that the chart gives it, and says what a schema cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from control_plane import Cluster

from fastserve.gateway import config as gateway_config
from fastserve.spec.model import API_VERSION

pytestmark = [pytest.mark.kube, pytest.mark.timeout(900)]

NOBODY = "http://127.0.0.1:9"
"""No head answers there: what needs one is told as a condition, and all else goes on."""

READY = "jsonpath={.status.conditions[?(@.type=='Ready')].REASON}"


class Tended:
    """A namespace that an operator with the chart's rights tends."""

    def __init__(self, cluster: Cluster, namespace: str, log: Path) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self.log = log

    def kubectl(self, *words: str, text: str | None = None) -> str:
        return self._cluster.kubectl("-n", self._namespace, *words, text=text, check=False).stdout

    def apply(self, kind: str, name: str, spec: dict[str, Any]) -> None:
        value = {"apiVersion": API_VERSION, "kind": kind, "metadata": {"name": name}, "spec": spec}
        assert self.kubectl("apply", "-f", "-", text=json.dumps(value))

    def ready(self, what: str, key: str = "reason") -> str:
        return self.kubectl("get", what, "-o", READY.replace("REASON", key))

    def until(self, true: Callable[[], Any], seconds: float = 300) -> Any:
        end = time.monotonic() + seconds
        while not (found := true()):
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.2)
        return found


@pytest.fixture
def tended(definitions: Cluster, namespace: str, operator_kubeconfig: Path, tmp_path: Path) -> Iterator[Tended]:
    (tmp_path / "token").write_text("t")
    words = [sys.executable, "-m", "fastserve_operator", "--namespace", namespace, "--store", str(tmp_path / "store")]
    words += ["--ray-address", NOBODY, "--ray-token-file", str(tmp_path / "token"), "--scratch", str(tmp_path / "s")]
    log = tmp_path / "operator.log"
    with open(log, "wb") as opened:
        environment = {**os.environ, "KUBECONFIG": str(operator_kubeconfig)}
        process = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, stdout=opened, stderr=opened)
    try:
        yield Tended(definitions, namespace, log)
    finally:
        process.terminate()
        ended = process.wait(300)
    said = log.read_text()
    assert ended == 0, said[-3000:]
    assert "orbidden" not in said
    assert " 403" not in said


def test_the_gateway_gets_its_orders_at_once(tended: Tended, tmp_path: Path) -> None:
    """Its pods wait for them, and `helm install --wait` for the pods: before any Model is there, and any Ray."""
    name = "configmap/fastserve-gateway"
    text = tended.until(lambda: tended.kubectl("get", name, "-o", r"jsonpath={.data.config\.json}"))
    (tmp_path / "config.json").write_text(text)
    orders = gateway_config.read(tmp_path / "config.json")
    assert (orders.host, orders.port, orders.admin_port) == ("0.0.0.0", 8100, 8101)  # as the chart's pods and Services
    assert "secret/fastserve-gateway-admin" in tended.kubectl("get", "secrets", "-o", "name")


def test_it_tends_models_and_keys(tended: Tended, tmp_path: Path) -> None:
    tended.apply("Model", "a", {"source": f"file://{tmp_path}/none", "serve": {}})
    tended.apply("AccessKey", "a", {"models": ["a"]})
    assert tended.until(lambda: tended.ready("model/a"))
    assert tended.until(lambda: tended.ready("accesskey/a")) == "Ready"
    assert "secret/a-key" in tended.kubectl("get", "secrets", "-o", "name")
    assert tended.until(lambda: tended.kubectl("get", "lease/fastserve-operator", "-o", "name"))
    tended.kubectl("delete", "model/a", "accesskey/a", "--wait=false")
    tended.until(lambda: not tended.kubectl("get", "models,accesskeys", "-o", "name"))


def test_what_a_schema_cannot_refuse_becomes_a_condition(tended: Tended) -> None:
    evaluate = {"data": "file:///rows.jsonl"}
    gates: dict[str, dict[str, Any]] = {
        "misspelled": {"klDivergense": 0.1},
        "unknown-task": {"task.triage": {"min": 0.5}},
        "lost-null": {"klDivergence": None},
    }
    for name, gate in gates.items():
        tended.apply("Model", name, {"source": "file:///model", "evaluate": {**evaluate, "gate": gate}})
    for name, gate in gates.items():
        tended.until(lambda name=name: tended.ready(f"model/{name}") == "ManifestInvalid")
        message = tended.ready(f"model/{name}", "message")
        assert f"spec.evaluate.gate.{next(iter(gate))}" in message
        assert tended.ready(f"model/{name}", "status") == "False"
