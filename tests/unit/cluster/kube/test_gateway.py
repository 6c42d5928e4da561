from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import pytest
from kube_objects import KubeObjects

from fastserve.cluster.kube.api import SECRETS, KubeApi
from fastserve.cluster.kube.gateway import KubeGateway
from fastserve.errors import NameConflict
from fastserve.gateway import config as gateway_config
from fastserve.gateway.config import Key, Served

CONFIG = "/api/v1/namespaces/demo/configmaps/fastserve-gateway"
ADMIN = "/api/v1/namespaces/demo/secrets/fastserve-gateway-admin"


def test_orders_are_read_back_as_given_and_hold_no_secret(api: KubeApi, objects: KubeObjects) -> None:
    gateway = KubeGateway(api, "demo", None)
    assert not gateway.alive()
    models, keys = {"small": Served("generate", 1)}, (Key("team", "a" * 64, ("small",)),)
    assert gateway.configure(models, keys, 8100)
    assert gateway.alive()
    written = gateway_config.parse(json.loads(objects.objects[CONFIG]["data"]["config.json"]))
    assert (written.models, written.keys, written.host, written.port) == (models, keys, "0.0.0.0", 8100)
    token = base64.b64decode(objects.objects[ADMIN]["data"]["token"]).decode()
    assert written.admin_sha256 == hashlib.sha256(token.encode()).hexdigest()
    assert token not in json.dumps(objects.objects[CONFIG])


def test_the_same_orders_are_not_written_twice(api: KubeApi, objects: KubeObjects) -> None:
    gateway = KubeGateway(api, "demo", None)
    assert gateway.configure({}, (), 8100)
    assert not gateway.configure({}, (), 8100)
    assert not KubeGateway(api, "demo", None).configure({}, (), 8100)
    assert gateway.configure({"small": Served("generate", 1)}, (), 8100)


def test_keys_change_without_the_routes(api: KubeApi, objects: KubeObjects) -> None:
    gateway = KubeGateway(api, "demo", None)
    gateway.admit(())
    written = gateway_config.parse(json.loads(objects.objects[CONFIG]["data"]["config.json"]))
    assert (written.models, written.keys) == ({}, ())
    models, keys = {"small": Served("generate", 1)}, (Key("team", "a" * 64, ("small",)),)
    gateway.configure(models, keys, 8100)
    gateway.admit(())
    written = gateway_config.parse(json.loads(objects.objects[CONFIG]["data"]["config.json"]))
    assert (written.models, written.keys) == (models, ())


def test_orders_that_somebody_removed_come_again_with_all_routes(api: KubeApi, objects: KubeObjects) -> None:
    """A pod that was sent orders without any would say of each model that there is none."""
    sent: list[dict[str, Any]] = []
    gateway = KubeGateway(api, "demo", None)
    gateway._pods.send = lambda text, token: sent.append(json.loads(text))  # type: ignore[method-assign]
    models, keys = {"small": Served("generate", 1)}, (Key("team", "a" * 64, ("small",)),)
    gateway.configure(models, keys, 8100)
    serial = sent[-1]["serial"]
    objects.delete(CONFIG)
    assert gateway.orders() == models
    gateway.admit(keys)
    assert gateway_config.parse(json.loads(objects.objects[CONFIG]["data"]["config.json"])).models == models
    assert all(orders["models"] for orders in sent)
    assert sent[-1]["serial"] >= serial
    objects.objects[CONFIG]["data"]["config.json"] = "{"
    assert gateway.orders() == models


@pytest.mark.parametrize("orders", ["{", "[]", '{"of": "another version"}'])
def test_orders_that_are_not_understood_wait_for_new_ones(api: KubeApi, objects: KubeObjects, orders: str) -> None:
    gateway = KubeGateway(api, "demo", None)
    gateway.configure({}, (), 8100)
    objects.objects[CONFIG]["data"]["config.json"] = orders
    gateway.admit(())
    assert objects.objects[CONFIG]["data"]["config.json"] == orders
    assert gateway.configure({}, (), 8100)


@pytest.mark.parametrize("path", [CONFIG, ADMIN])
def test_what_is_somebody_elses_is_left_alone(api: KubeApi, objects: KubeObjects, path: str) -> None:
    theirs = objects.put(path, {"metadata": {"name": path.rsplit("/", 1)[-1]}, "data": {"token": "eA=="}})
    before = json.dumps(theirs)
    with pytest.raises(NameConflict, match=path.rsplit("/", 1)[-1]):
        KubeGateway(api, "demo", None).configure({}, (), 8100)
    assert json.dumps(objects.objects[path]) == before


def test_the_url_is_the_service_unless_another_is_given(api: KubeApi) -> None:
    assert KubeGateway(api, "demo", None).url == "http://fastserve-gateway.demo.svc:8100/v1"
    assert KubeGateway(api, "demo", "https://llm.example/v1").url == "https://llm.example/v1"


def test_what_it_makes_goes_with_the_charts_secret(api: KubeApi, objects: KubeObjects) -> None:
    made = api.create(
        SECRETS,
        {
            "metadata": {"name": "fastserve-gateway-orders", "namespace": "demo"},
            "data": {"token": base64.b64encode(b"t").decode()},
        },
    )
    KubeGateway(api, "demo", None).configure({}, (), 8100)
    for place in (CONFIG, ADMIN):
        (owner,) = objects.objects[place]["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["uid"]) == ("Secret", made["metadata"]["uid"])
