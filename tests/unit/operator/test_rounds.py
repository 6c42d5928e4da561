"""Looks and surveys that do not wait for each other."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from kube_objects import KubeObjects, served
from model_files import write_model

from fastserve.cluster.kube.cluster import KubeCluster
from fastserve.cluster.kube.gateway import KubeGateway
from fastserve.cluster.kube.home import KubeHome
from fastserve.cluster.kube.ray import RayClusterHead
from fastserve_operator import acceptance
from fastserve_operator.__main__ import Operator, parse
from fastserve_operator.conditions import Trouble
from fastserve_operator.model import Namespace
from fastserve_operator.rounds import Rounds

BASE = "/apis/fastserve.dev/v1alpha1/namespaces"


def test_one_that_hangs_is_waited_for_a_little_and_holds_up_nobody() -> None:
    go_on, seen = threading.Event(), []

    def look(name: str) -> bool:
        seen.append(name)
        if name == "hangs":
            assert go_on.wait(60)
        if name == "breaks":
            raise ValueError("broken")
        return name == "busy"

    rounds = Rounds(patience_seconds=0.2)
    first = rounds.go(["hangs", "busy", "breaks", "calm"], look)
    assert (first["busy"], first["calm"]) == (True, False)
    assert isinstance(first["breaks"], Trouble)
    assert rounds.under_way == ["hangs"]
    rounds.go(["hangs", "busy"], look)
    assert (seen.count("hangs"), seen.count("busy")) == (1, 2)
    go_on.set()
    rounds.close(60)
    assert rounds.go([], look) == {"hangs": False}
    assert rounds.under_way == []


def test_when_all_places_are_taken_each_name_has_its_turn() -> None:
    rounds, seen = Rounds(at_once=3, patience_seconds=60), set()
    names = [f"n{number}" for number in range(10)]
    for _ in range(4):
        ended = rounds.go(names, lambda name: True)
        assert len(ended) == 3
        seen |= set(ended)
    assert seen == set(names)


class Silent:
    """A server that takes connections and never says a word."""

    def __init__(self, stack: ExitStack) -> None:
        self._socket = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=64))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._taken: list[socket.socket] = []
        stack.callback(self.close)
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        while True:
            try:
                self._taken.append(self._socket.accept()[0])
            except OSError:
                return

    def close(self) -> None:
        """Let everybody go who still waits."""
        self._socket.shutdown(socket.SHUT_RDWR)
        for taken in self._taken:
            taken.close()


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Silent]:
    with ExitStack() as stack:
        found = Silent(stack)
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
        yield found


def wish(objects: KubeObjects, namespace: str, name: str, source: str) -> None:
    value = {
        "apiVersion": "fastserve.dev/v1alpha1",
        "kind": "Model",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"source": source},
    }
    objects.put(f"{BASE}/{namespace}/models/{name}", value)


def reason(objects: KubeObjects, namespace: str, name: str) -> str:
    status = objects.objects[f"{BASE}/{namespace}/models/{name}"].get("status", {})
    return next((item["reason"] for item in status.get("conditions", []) if item["type"] == "Ready"), "")


def test_a_source_that_never_answers_holds_up_no_other_model(
    silent: Silent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance, "SLOW_SECONDS", 0.5)
    write_model(tmp_path / "source")
    objects = KubeObjects()
    for number in range(5):
        wish(objects, "demo", f"a{number}", f"s3://bucket/{number}")
    wish(objects, "demo", "good", f"file://{tmp_path}/source")
    with served(objects) as api:
        home = KubeHome(api, "demo", tmp_path / "scratch", str(tmp_path / "store"))
        home.create()
        head = RayClusterHead(api, "demo", "fastserve", "python")
        tended = Namespace(api, "demo", KubeCluster(api, home, head, KubeGateway(api, "demo", None)))
        end = time.monotonic() + 60
        while reason(objects, "demo", "good") != "ClusterFailed":  # it is accepted, and waits for a Ray cluster
            assert time.monotonic() < end, objects.objects
            tended.tend()
            time.sleep(0.02)
        assert {reason(objects, "demo", f"a{number}") for number in range(5)} == {"Surveying"}


def keys_of(objects: KubeObjects, namespace: str) -> list[str]:
    orders: dict[str, Any] = objects.objects.get(f"/api/v1/namespaces/{namespace}/configmaps/fastserve-gateway", {})
    return [key["name"] for key in json.loads(orders["data"]["config.json"])["keys"]] if orders else []


def test_a_namespace_that_hangs_holds_up_no_other_and_not_even_its_own_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = KubeObjects()
    go_on = threading.Event()
    for namespace in ("alpha", "beta"):
        wish(objects, namespace, "m", f"file:///nowhere/{namespace}")
        place = f"{BASE}/{namespace}/accesskeys/team"
        key = {"apiVersion": "fastserve.dev/v1alpha1", "kind": "AccessKey", "spec": {"models": ["m"]}}
        objects.put(place, key | {"metadata": {"name": "team", "namespace": namespace}})
    for number, item in enumerate([dict(item) for item in objects.objects.values() if item["kind"] == "Model"]):
        objects.objects[f"/apis/fastserve.dev/v1alpha1/models/{number}"] = (
            item  # as a list over all namespaces has them
        )
    look = KubeCluster.keep

    def hangs(self: KubeCluster) -> Any:
        assert self.kube_home.namespace != "alpha" or go_on.wait(120)
        return look(self)

    monkeypatch.setattr(KubeCluster, "keep", hangs)
    words = ["--all-namespaces", "--lease-namespace", "own", "--store", str(tmp_path / "s")]
    with served(objects) as api:
        operator = Operator(api, parse([*words, "--scratch", str(tmp_path / "scratch")]))
        operator._rounds = Rounds(patience_seconds=0.1)
        try:
            end = time.monotonic() + 60
            while reason(objects, "beta", "m") != "SourceNotFound" or keys_of(objects, "alpha") != ["team"]:
                assert time.monotonic() < end
                assert operator.tend(), "one is under way, so the next look is due soon"
            assert reason(objects, "alpha", "m") == ""
            objects.delete(f"{BASE}/alpha/accesskeys/team")
            while keys_of(objects, "alpha"):
                assert time.monotonic() < end
                operator.tend()
        finally:
            go_on.set()
            operator.close(60)
