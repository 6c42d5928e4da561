"""The gateway's orders on a cluster: one ConfigMap, which its pods mount, and the same text sent to each of them.

The ConfigMap is the truth: a pod that starts finds it. A kubelet renews a volume within a minute or so, which is too
late for a rollout or a key that was taken away; so the orders are also sent to the pods that are there, on their admin
port. They have a number, so that a volume that comes late changes nothing.

The ConfigMap holds no secret: keys stand there as SHA-256 only, and so do the tokens of the admin port. The tokens are
in two Secrets that the gateway does not need to read: one opens the figures, the other takes orders. Of the latter it
mounts the SHA-256 alone, so that a pod which comes up before the first orders can be sent them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from fastserve.cluster.kube.api import (
    CONFIG_MAPS,
    MANAGED_BY,
    MANAGER,
    SECRETS,
    KubeApi,
    Object,
    is_ours,
    owner_reference,
)
from fastserve.cluster.kube.gateway_pods import GatewayPods, addresses_of
from fastserve.errors import NameConflict, StateChanged, UsageInvalid
from fastserve.gateway import config as gateway_config

NAME = "fastserve-gateway"
ADMIN = "fastserve-gateway-admin"
"""Of the Secret with the token for figures, and of the Service without an address of its own, whose name leads to every
pod."""

ORDERS = "fastserve-gateway-orders"
"""Secret with the token for orders."""

CONFIG_KEY = "config.json"
TOKEN_KEY = "token"
SHA_KEY = "sha256"
PORT = 8100
ADMIN_PORT = 8101
REMEMBERED_SECONDS = 30.0
"""How long a token is kept in mind; a Secret that somebody removed is made anew after that."""


class KubeGateway:
    """Writes the orders of one namespace's gateway; the pods are the chart's. Several threads may call it at once."""

    def __init__(
        self,
        api: KubeApi,
        namespace: str,
        url: str | None,
        admin_url: str | None = None,
        addresses: Callable[[str], list[str]] = addresses_of,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """url: where clients reach the gateway; by default its Service in the cluster. admin_url: where its admin port
        is reached; every address that its name leads to is a gateway. addresses: asks for them. clock: seconds that
        never go back."""
        self._api = api
        self._namespace = namespace
        self._url = url or f"http://{NAME}.{namespace}.svc:{PORT}/v1"
        where = (admin_url or f"http://{ADMIN}.{namespace}.svc:{ADMIN_PORT}").rstrip("/")
        self._pods = GatewayPods(where, addresses, clock)
        self._clock = clock
        self._tokens: dict[str, tuple[str, float]] = {}
        self._lock = threading.RLock()
        self._routed: Mapping[str, gateway_config.Served] = {}
        """The models as they were routed last; for a ConfigMap that somebody removes."""

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
        """Write the orders when they differ from what is there, and send them. True when written.

        Raises NameConflict when the ConfigMap is not ours, StateChanged when somebody wrote in between.
        """
        with self._lock:
            return self._configure(self._api.get(CONFIG_MAPS, self._namespace, NAME), models, keys, port)

    def _configure(
        self, found: Object | None, models: Mapping[str, Any], keys: tuple[gateway_config.Key, ...], port: int
    ) -> bool:
        wanted = gateway_config.Config(
            host="0.0.0.0",
            port=port,
            models=dict(models),
            keys=keys,
            admin_port=ADMIN_PORT,
            admin_sha256=_sha256(self._token(ADMIN)),
            orders_sha256=_sha256(self._token(ORDERS)),
        )
        self._routed = wanted.models
        if found is None:
            text = _text(wanted, 0)
            self._api.create(CONFIG_MAPS, {"metadata": self._metadata(NAME), "data": {CONFIG_KEY: text}})
            self._send(text)
            return True
        self._require_ours("ConfigMap", found)
        there = (found.get("data") or {}).get(CONFIG_KEY) or ""
        before = _read(there)
        if before is not None and replace(before, serial=0) == wanted:
            self._send(there)
            return False
        text = _text(wanted, before.serial if before is not None else 0)
        version = found["metadata"]["resourceVersion"]
        self._api.merge(CONFIG_MAPS, self._namespace, NAME, {"data": {CONFIG_KEY: text}}, version)
        self._send(text)
        return True

    def _send(self, text: str) -> None:
        """Send the orders to the pods that have not got them. One that does not answer reads them from its volume."""
        self._pods.send(text, self._token(ORDERS))

    def admit(self, keys: tuple[gateway_config.Key, ...]) -> None:
        """Change who may ask and nothing else, so that a key that is taken away opens nothing even while Ray is away.
        Without orders yet, the first ones are written: a gateway that nothing is served by. Orders that somebody
        removed are written anew as they were."""
        with self._lock:
            found = self._api.get(CONFIG_MAPS, self._namespace, NAME)
            before = _orders(found)
            if before is not None:  # else they are replaced whole when Ray is there
                self._configure(found, self._routed if found is None else before.models, keys, PORT)

    def orders(self) -> Mapping[str, gateway_config.Served]:
        """The models as the orders that are there route them; where none can be read, as they were routed last."""
        found = self._api.get(CONFIG_MAPS, self._namespace, NAME)
        try:
            return gateway_config.parse(json.loads(found["data"][CONFIG_KEY])).models if found else self._routed
        except (UsageInvalid, ValueError, KeyError, TypeError):
            return self._routed

    def stats(self, since: float) -> dict[str, Any] | None:
        """What all gateways have counted since that Unix second; None while none of them answers."""
        return self._pods.stats(since, self._token(ADMIN)) if self.alive() else None

    def start(self, port: int) -> None:
        """The pods run without us."""

    def stop(self) -> None:
        """The pods run without us."""

    def _token(self, name: str) -> str:
        """A token of the admin port; made once."""
        known = self._tokens.get(name)
        if known is None or self._clock() > known[1] + REMEMBERED_SECONDS:
            known = (self._read_token(name), self._clock())
            self._tokens[name] = known
        return known[0]

    def _read_token(self, name: str) -> str:
        found = self._api.get(SECRETS, self._namespace, name)
        if found is None:
            token = secrets.token_hex(32)
            plain = {TOKEN_KEY: token, SHA_KEY: _sha256(token)}
            data = {key: base64.b64encode(text.encode()).decode() for key, text in plain.items()}
            try:
                found = self._api.create(SECRETS, {"metadata": self._metadata(name), "type": "Opaque", "data": data})
            except StateChanged:
                found = self._api.get(SECRETS, self._namespace, name)
        if found is None:
            raise StateChanged(f"Secret {name} came and went; the next look decides again")
        if name != ORDERS:  # the chart makes that one, so that the first pods have it
            self._require_ours("Secret", found)
        kept = (found.get("data") or {}).get(TOKEN_KEY)
        if not kept:
            raise NameConflict(f"the Secret {name} holds no {TOKEN_KEY}; remove it, and a new one is made")
        return base64.b64decode(kept).decode()

    def _metadata(self, name: str) -> Object:
        """Of an object that we make. Where a chart made the Secret of the orders it goes with that one, so that nothing
        is left of a release."""
        metadata: Object = {"name": name, "namespace": self._namespace, "labels": {MANAGED_BY: MANAGER}}
        chart = self._api.get(SECRETS, self._namespace, ORDERS) if name != ORDERS else None
        if chart is not None and not is_ours(chart):
            metadata["ownerReferences"] = [owner_reference(SECRETS, chart)]
        return metadata

    def _require_ours(self, kind: str, found: Object) -> None:
        if not is_ours(found):
            name = found["metadata"]["name"]
            raise NameConflict(
                f"the {kind} {name} is there without the label {MANAGED_BY}: {MANAGER}; it is left alone: "
                f"give it that label if it may be written, or remove it"
            )


def _sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def is_empty(found: Object) -> bool:
    """Whether a gateway's ConfigMap lets nobody in and routes nothing."""
    orders = _orders(found)
    return orders is not None and not orders.models and not orders.keys


def _orders(found: Object | None) -> gateway_config.Config | None:
    """The orders in a ConfigMap, empty ones where there is none; None when they are of another version, or damaged."""
    return gateway_config.Config() if found is None else _read((found.get("data") or {}).get(CONFIG_KEY) or "")


def _read(text: str) -> gateway_config.Config | None:
    try:
        return gateway_config.parse(json.loads(text))
    except (UsageInvalid, ValueError):
        return None


def _text(wanted: gateway_config.Config, before: int) -> str:
    """Orders as text. Their number is higher than that of the orders before, and than that of any that stood in a
    ConfigMap which somebody removed."""
    numbered = replace(wanted, serial=max(before + 1, time.time_ns() // 1_000_000))
    return json.dumps(gateway_config.to_json(numbered), sort_keys=True)
