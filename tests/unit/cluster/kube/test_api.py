"""How the API server is reached, and what its answers mean."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from kubernetes.config import incluster_config

from fastserve.cluster.kube import api as module
from fastserve.cluster.kube.api import KubeApi
from fastserve_operator.rounds import AT_ONCE


def test_a_token_that_the_kubelet_renews_is_sent_from_then_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod's token lives for an hour; a client that keeps the first one is shut out after that, and for good."""
    token, certificate = tmp_path / "token", tmp_path / "ca.crt"
    token.write_text("first")
    certificate.write_text("a certificate")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(certificate))
    monkeypatch.setattr(module, "Path", lambda _: token)
    now = [datetime.datetime(2027, 1, 1)]

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # type: ignore[override]
            return now[0]

    monkeypatch.setattr(incluster_config.datetime, "datetime", Clock)
    api = KubeApi.connect()

    def sent() -> str:
        asked = api._client.param_serialize(
            method="GET", resource_path="/", header_params={}, auth_settings=["BearerToken"]
        )
        return str(asked[2]["authorization"])

    assert api._client.configuration.connection_pool_maxsize >= AT_ONCE, "looks at as many namespaces at once"
    assert sent() == "bearer first"
    token.write_text("second")
    now[0] += datetime.timedelta(minutes=2)
    assert sent() == "bearer second"
    assert sent() == "bearer second"
