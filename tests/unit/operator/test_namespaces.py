"""The command line, and one operator over several namespaces."""

from __future__ import annotations

import copy
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kube_objects import KubeObjects, served

from fastserve_operator.__main__ import Operator, _thread, parse

ALL = ["--all-namespaces", "--lease-namespace", "own"]


def test_each_namespace_has_a_store_of_its_own_and_is_no_matter_of_another(tmp_path: Path) -> None:
    objects = KubeObjects()
    for namespace in ("alpha", "beta"):
        value = {
            "apiVersion": "fastserve.dev/v1alpha1",
            "kind": "Model",
            "metadata": {"name": "same", "namespace": namespace},
            "spec": {"source": f"file:///nowhere/{namespace}"},
        }
        objects.put(f"/apis/fastserve.dev/v1alpha1/namespaces/{namespace}/models/same", value)
    with served(objects) as api:
        options = parse([*ALL, "--store", str(tmp_path / "store"), "--scratch", str(tmp_path / "scratch")])
        operator = Operator(api, options)
        end = time.monotonic() + 120
        told: dict[str, str] = {}
        while len(told) < 2:
            assert time.monotonic() < end, told
            operator.tend()
            for namespace in ("alpha", "beta"):
                found = objects.objects[f"/apis/fastserve.dev/v1alpha1/namespaces/{namespace}/models/same"]
                for condition in found.get("status", {}).get("conditions", []):
                    if condition["reason"] == "SourceNotFound":
                        told[namespace] = condition["message"]
        stores = {name: tended._home.store_uri for name, tended in operator._namespaces.items()}
    assert "/nowhere/alpha" in told["alpha"]
    assert "/nowhere/beta" in told["beta"]
    assert stores == {name: f"{tmp_path}/store/{name}" for name in ("alpha", "beta")}


MODELS = "/apis/fastserve.dev/v1alpha1/namespaces/{}/models/m"
KEYS = "/apis/fastserve.dev/v1alpha1/namespaces/{}/accesskeys/team"
ORDERS = "/api/v1/namespaces/{}/configmaps/fastserve-gateway"


class Everywhere(KubeObjects):
    """Answers a list over all namespaces, as the real server does; objects are not made in a namespace that is gone."""

    gone: frozenset[str] = frozenset()

    def answer(self, method: str, path: str, query: Any, body: Any, content: str) -> tuple[int, Any]:
        place = f"/namespaces/{path.split('/namespaces/')[-1].split('/')[0]}/"
        if method == "POST" and any(place == f"/namespaces/{name}/" for name in self.gone):
            return 404, {"message": "namespaces not found"}
        plural = path.rpartition("/")[2]
        if method == "GET" and "/namespaces/" not in path and plural in ("models", "accesskeys"):
            items = [item for where, item in sorted(self.objects.items()) if where.split("/")[-2] == plural]
            return 200, {"items": copy.deepcopy(items), "metadata": {}}
        return super().answer(method, path, query, body, content)


def test_a_namespace_in_which_nobody_asks_for_anything_is_left_when_its_gateway_knows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    objects = Everywhere()
    head = {"apiVersion": "fastserve.dev/v1alpha1"}
    for namespace in ("alpha", "beta", "gamma"):
        metadata = {"name": "m", "namespace": namespace}
        model = {**head, "kind": "Model", "metadata": metadata, "spec": {"source": "file:///nowhere"}}
        objects.put(MODELS.format(namespace), model)
        key = {**head, "kind": "AccessKey", "metadata": {**metadata, "name": "team"}, "spec": {"models": ["m"]}}
        objects.put(KEYS.format(namespace), key)
    with served(objects) as api:
        options = parse([*ALL, "--store", str(tmp_path / "store"), "--scratch", str(tmp_path / "scratch")])
        operator = Operator(api, options)

        def tend_until(true: Callable[[], bool]) -> None:
            end = time.monotonic() + 60
            while not true():
                assert time.monotonic() < end, operator._namespaces
                operator.tend()
                time.sleep(0.02)

        def keys(namespace: str) -> list[str]:
            orders = objects.objects.get(ORDERS.format(namespace))
            return [key["name"] for key in json.loads(orders["data"]["config.json"])["keys"]] if orders else []

        tend_until(lambda: all(keys(namespace) == ["team"] for namespace in ("alpha", "beta", "gamma")))
        for place in (MODELS, KEYS):
            objects.delete(place.format("beta"))
        objects.gone = frozenset({"gamma"})
        for path in [path for path in objects.objects if "/namespaces/gamma/" in path]:
            del objects.objects[path]
        tend_until(lambda: set(operator._namespaces) == {"alpha"})
        assert keys("beta") == []
        caplog.clear()
        before = len(objects.calls)
        for _ in range(3):
            operator.tend()
        assert [call for call in objects.calls[before:] if "/beta/" in call[1] or "/gamma/" in call[1]] == []
        assert [record for record in caplog.records if "gamma" in record.getMessage()] == []
        objects.gone = frozenset()
        metadata = {"name": "m", "namespace": "gamma"}
        objects.put(MODELS.format("gamma"), {**head, "kind": "Model", "metadata": metadata, "spec": {"source": "x"}})
        tend_until(lambda: "status" in objects.objects[MODELS.format("gamma")])  # it may come again


@pytest.mark.parametrize("breaks", [True, False])
def test_a_thread_that_ends_takes_the_process_with_it(monkeypatch: pytest.MonkeyPatch, breaks: bool) -> None:
    """Else it would live on, hold the lease, and look at nothing."""
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *words: sent.append(words))
    stop, died = threading.Event(), list[str]()

    def work() -> None:
        if breaks:
            raise MemoryError

    thread = _thread("look", work, stop, died)
    thread.start()
    thread.join()
    assert (sent, died) == ([(os.getpid(), signal.SIGTERM)], ["look"])
    stop.set()
    thread = _thread("lease", lambda: None, stop, died)
    thread.start()
    thread.join()
    assert died == ["look"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--store", "s3://b"], "one of the arguments --namespace --all-namespaces is required"),
        (["--namespace", "a"], "--store"),
        (["--all-namespaces", "--store", "s3://b"], "--lease-namespace"),
        ([*ALL, "--store", "s3://b", "--ray-address", "http://ray:8265"], "--ray-address serves one namespace"),
        (["--namespace", "a", "--all-namespaces", "--store", "s3://b"], "not allowed with"),
    ],
)
def test_words_that_do_not_fit_together_are_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_lease_is_in_the_namespace_that_is_tended() -> None:
    options = parse(["--namespace", "a", "--store", "s3://b"])
    assert (options.lease_namespace, options.ray_cluster, options.stage_python) == ("a", "fastserve", "python")
