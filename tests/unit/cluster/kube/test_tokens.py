"""Which Secrets sources may name, and what is said of one that is not there."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from kube_objects import KubeObjects

from fastserve.cluster.kube.api import KubeApi
from fastserve.cluster.kube.tokens import read_secret
from fastserve.errors import SecretMissing

PLACE = "/api/v1/namespaces/demo/secrets"


def secret(
    objects: KubeObjects, name: str, data: bytes = b"abc", labels: dict[str, str] | None = None, **more: Any
) -> None:
    value = {"metadata": {"name": name, "labels": labels or {}}, "data": {"token": base64.b64encode(data).decode()}}
    objects.put(f"{PLACE}/{name}", value | more)


def test_a_secret_of_the_namespace_is_read_by_its_name(api: KubeApi, objects: KubeObjects) -> None:
    secret(objects, "hub", type="Opaque")
    assert read_secret(api, "demo", "hub") == {"token": "abc"}
    secret(objects, "untyped")
    assert read_secret(api, "demo", "untyped") == {"token": "abc"}
    with pytest.raises(SecretMissing, match=r"no Secret hub in namespace other.*kubectl -n other create secret"):
        read_secret(api, "other", "hub")


@pytest.mark.parametrize(
    "more",
    [
        {"type": "kubernetes.io/service-account-token"},
        {"type": "helm.sh/release.v1"},
        {"labels": {"app.kubernetes.io/managed-by": "fastserve"}},
        {"labels": {"app.kubernetes.io/part-of": "fastserve"}},
    ],
)
def test_secrets_of_others_are_not_for_sources(api: KubeApi, objects: KubeObjects, more: dict[str, Any]) -> None:
    secret(objects, "theirs", **more)
    with pytest.raises(SecretMissing, match="not for sources"):
        read_secret(api, "demo", "theirs")


def test_what_is_no_text_is_refused_without_being_shown(api: KubeApi, objects: KubeObjects) -> None:
    secret(objects, "hub", b"\xff\xfeabc")
    with pytest.raises(SecretMissing, match="something else than text") as caught:
        read_secret(api, "demo", "hub")
    assert "abc" not in str(caught.value)
