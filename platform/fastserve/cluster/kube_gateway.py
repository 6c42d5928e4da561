"""The gateway's orders on a cluster: one ConfigMap, which the gateway's pods mount and read again when it changes.

It holds no secret: keys stand there as SHA-256 only, and so does the token of the admin port. The token itself is in a
Secret that the gateway does not need to read.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import time
from collections.abc import Mapping
from typing import Any

import httpx

from fastserve.cluster.kube_api import CONFIG_MAPS, MANAGED_BY, MANAGER, SECRETS, KubeApi, Object, is_ours
from fastserve.errors import NameConflict, StateChanged, UsageInvalid
from fastserve.gateway import config as gateway_config

NAME = "fastserve-gateway"
ADMIN = "fastserve-gateway-admin"
CONFIG_KEY = "config.json"
TOKEN_KEY = "token"
PORT = 8100
ADMIN_PORT = 8101
STATS_SECONDS = 3.0
SILENT_SECONDS = 15.0
"""A gateway that did not tell its figures is not asked by every model again."""


class KubeGateway:
    """Writes the orders of one namespace's gateway; the pods are the chart's."""

    def __init__(self, api: KubeApi, namespace: str, url: str | None, admin_url: str | None = None) -> None:
        """url: where clients reach the gateway; by default its Service in the cluster. admin_url: the same for its
        admin port."""
        self._api = api
        self._namespace = namespace
        self._url = url or f"http://{NAME}.{namespace}.svc:{PORT}/v1"
        self._silent_until = 0.0
        self._admin_url = (admin_url or f"http://{NAME}.{namespace}.svc:{ADMIN_PORT}").rstrip("/")

    @property
    def url(self) -> str | None:
        """Base URL for OpenAI clients."""
        return self._url

    def alive(self) -> bool:
        """Whether it was ever given orders."""
        return self._api.get(CONFIG_MAPS, self._namespace, NAME) is not None

    def choose_port(self, wanted: int | None) -> int:
        """The port of the pods' own network, so it is always the same."""
        return PORT

    def configure(self, models: Mapping[str, Any], keys: tuple[gateway_config.Key, ...], port: int) -> bool:
        """Write the orders when they differ from what is there. True when written.

        Raises NameConflict when the ConfigMap is not ours, StateChanged when somebody wrote in between.
        """
        wanted = gateway_config.Config(
            host="0.0.0.0",
            port=port,
            models=dict(models),
            keys=keys,
            admin_port=ADMIN_PORT,
            admin_sha256=hashlib.sha256(self._admin_token().encode()).hexdigest(),
        )
        data = {CONFIG_KEY: json.dumps(gateway_config.to_json(wanted), sort_keys=True)}
        found = self._api.get(CONFIG_MAPS, self._namespace, NAME)
        if found is None:
            self._api.create(CONFIG_MAPS, {"metadata": self._metadata(NAME), "data": data})
            return True
        self._require_ours("ConfigMap", found)
        if (found.get("data") or {}).get(CONFIG_KEY) == data[CONFIG_KEY]:
            return False
        self._api.merge(CONFIG_MAPS, self._namespace, NAME, {"data": data}, found["metadata"]["resourceVersion"])
        return True

    def admit(self, keys: tuple[gateway_config.Key, ...]) -> None:
        """Change who may ask and nothing else, so that a key that is taken away opens nothing even while Ray is away.
        Without orders yet, the first ones are written: a gateway that nothing is served by."""
        found = self._api.get(CONFIG_MAPS, self._namespace, NAME)
        try:
            models = gateway_config.parse(json.loads(found["data"][CONFIG_KEY])).models if found else {}
        except (UsageInvalid, ValueError, KeyError, TypeError):
            return  # orders of another version, or damaged: they are replaced whole when Ray is there
        self.configure(models, keys, PORT)

    def stats(self, since: float) -> dict[str, Any] | None:
        """What the gateway has counted since that Unix second; None while it does not answer."""
        if time.monotonic() < self._silent_until or not self.alive():
            return None
        headers = {"Authorization": f"Bearer {self._admin_token()}"}
        try:
            with httpx.Client(trust_env=False, timeout=STATS_SECONDS) as client:
                answer = client.get(f"{self._admin_url}/stats", params={"since": since}, headers=headers)
                return dict(answer.json()) if answer.is_success else None
        except (httpx.HTTPError, ValueError):
            self._silent_until = time.monotonic() + SILENT_SECONDS
            return None

    def start(self, port: int) -> None:
        """The pods run without us."""

    def stop(self) -> None:
        """The pods run without us."""

    def _admin_token(self) -> str:
        """The token of the admin port; made once."""
        found = self._api.get(SECRETS, self._namespace, ADMIN)
        if found is None:
            value = base64.b64encode(secrets.token_hex(32).encode()).decode()
            try:
                found = self._api.create(
                    SECRETS, {"metadata": self._metadata(ADMIN), "type": "Opaque", "data": {TOKEN_KEY: value}}
                )
            except StateChanged:
                found = self._api.get(SECRETS, self._namespace, ADMIN)
        if found is None:
            raise StateChanged(f"Secret {ADMIN} came and went; the next look decides again")
        self._require_ours("Secret", found)
        return base64.b64decode(found["data"][TOKEN_KEY]).decode()

    def _metadata(self, name: str) -> Object:
        return {"name": name, "namespace": self._namespace, "labels": {MANAGED_BY: MANAGER}}

    def _require_ours(self, kind: str, found: Object) -> None:
        if not is_ours(found):
            name = found["metadata"]["name"]
            raise NameConflict(
                f"the {kind} {name} is there without the label {MANAGED_BY}: {MANAGER}; it is left alone: "
                f"give it that label if it may be written, or remove it"
            )
