"""The Ray head of a namespace: a RayCluster object that KubeRay runs, or an address that the operator was given.

Nothing is started here. A RayCluster is brought up by the chart or by whoever owns it; what is not there is said so,
in a condition of every Model that waits for it.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from fastserve.cluster.kube.api import RAY_CLUSTERS, SECRETS, KubeApi, Object
from fastserve.cluster.nodes import PROFILE_LABEL, Machine
from fastserve.errors import ClusterFailed

DASHBOARD_PORT = 8265
SERVE_PORT = 8000
TOKEN_KEY = "auth_token"
"""Key of the Secret that KubeRay makes, or is given, for token authentication."""

NO_LOGS = Path("/nonexistent")


@dataclass(frozen=True, slots=True)
class KubeEndpoint:
    """A head somewhere in the network."""

    dashboard_url: str
    token: str
    serve_url: str
    serve_host: str = "0.0.0.0"
    """Serve's proxy is reached from other pods; who may reach it is for a NetworkPolicy to say."""

    python: str = "python"
    temp_dir: Path = NO_LOGS
    promised: tuple[Machine, ...] = ()

    @property
    def serve_port(self) -> int:
        """Port of Serve's proxy."""
        return urlsplit(self.serve_url).port or SERVE_PORT


Address = Callable[[str, str], tuple[str, str]]
"""From the namespace and the head's Service to the base URLs of the dashboard and of Serve's proxy."""


def in_cluster(namespace: str, service: str) -> tuple[str, str]:
    """How a pod reaches a head: by the full name of its Service."""
    host = f"http://{service}.{namespace}.svc"
    return f"{host}:{DASHBOARD_PORT}", f"{host}:{SERVE_PORT}"


class GivenRay:
    """A head whose address is given: an existing Ray cluster, or one beside the operator."""

    def __init__(self, dashboard_url: str, token_file: Path | None, serve_url: str | None, python: str) -> None:
        """serve_url: of Serve's proxy; by default port 8000 of the same host. python: what runs a stage there."""
        parts = urlsplit(dashboard_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ClusterFailed(f"--ray-address {dashboard_url} is no address; write http://HOST:{DASHBOARD_PORT}")
        self._dashboard_url = dashboard_url.rstrip("/")
        self._token_file = token_file
        self._serve_url = (serve_url or f"{parts.scheme}://{parts.hostname}:{SERVE_PORT}").rstrip("/")
        self._python = python

    def load(self) -> KubeEndpoint:
        """The head, whether it answers or not: who cannot be reached is not gone. Raises ClusterFailed without its
        token."""
        token = ""
        if self._token_file is not None:
            try:
                token = self._token_file.read_text().strip()
            except OSError as error:
                raise ClusterFailed(f"--ray-token-file {self._token_file} cannot be read ({error})") from error
        return KubeEndpoint(self._dashboard_url, token, self._serve_url, python=self._python)

    def start(self) -> KubeEndpoint:
        """The head; it is not ours to start."""
        return self.load()

    def stop(self) -> None:
        """It is not ours to stop."""


class RayClusterHead:
    """The head of a RayCluster object."""

    def __init__(self, api: KubeApi, namespace: str, name: str, python: str, address: Address = in_cluster) -> None:
        """python: what runs a stage there. address: how its Service is reached."""
        self._api = api
        self._namespace = namespace
        self._name = name
        self._python = python
        self._address = address

    @property
    def cluster_name(self) -> str:
        """Name of the RayCluster."""
        return self._name

    def load(self) -> KubeEndpoint | None:
        """The head; None when there is no such RayCluster, so that whatever ran in it is gone.

        Raises ClusterFailed while it has no head service yet, or its token is missing.
        """
        found = self._api.get(RAY_CLUSTERS, self._namespace, self._name)
        return None if found is None else self.endpoint(found)

    def endpoint(self, found: Object) -> KubeEndpoint:
        """The head of the object as it is. Raises ClusterFailed as `load` does."""
        service = service_of(found)
        if not service:
            raise ClusterFailed(f"RayCluster {self._name} has no head service yet; see `kubectl get raycluster`")
        dashboard_url, serve_url = self._address(self._namespace, service)
        return KubeEndpoint(
            dashboard_url, self._token(found), serve_url, python=self._python, promised=promised_by(found)
        )

    def start(self) -> KubeEndpoint:
        """The head. Raises ClusterFailed when there is no such RayCluster."""
        endpoint = self.load()
        if endpoint is None:
            raise ClusterFailed(
                f"there is no RayCluster named {self._name} in namespace {self._namespace}; make one, "
                "or start the operator with --ray-cluster NAME"
            )
        return endpoint

    def stop(self) -> None:
        """It is not ours to stop."""

    def _token(self, found: Object) -> str:
        """The token of a cluster that asks for one. Raises ClusterFailed for one that asks for none: whoever reaches
        an open head runs any code there."""
        place = _token_place(found)
        if place is None:
            raise ClusterFailed(
                f"RayCluster {self._name} asks for no token, so anybody who reaches it can run code in it; "
                "set spec.authOptions.mode: token, or RAY_AUTH_MODE and RAY_AUTH_TOKEN of its containers"
            )
        name, key = place
        secret = self._api.get(SECRETS, self._namespace, name)
        token = ((secret or {}).get("data") or {}).get(key)
        if token is None:
            raise ClusterFailed(f"RayCluster {self._name}: Secret {name} with the key {key} is not there yet")
        return base64.b64decode(token).decode().strip()


def service_of(found: Object) -> str:
    """Name of the Service of a RayCluster's head; empty before KubeRay made one, and with it any pod."""
    return str(((found.get("status") or {}).get("head") or {}).get("serviceName") or "")


def is_up(found: Object) -> bool:
    """Whether the head of a RayCluster runs, as KubeRay says."""
    status = found.get("status") or {}
    conditions = {item["type"]: item["status"] for item in status.get("conditions") or ()}
    return bool(service_of(found)) and (conditions.get("HeadPodReady") == "True" or status.get("state") == "ready")


def promised_by(found: Object) -> tuple[Machine, ...]:
    """The machines that a RayCluster's worker groups may grow to."""
    machines: list[Machine] = []
    for group in found["spec"].get("workerGroupSpecs") or ():
        profile = str((group.get("labels") or {}).get(PROFILE_LABEL) or "")
        containers: list[Object] = group.get("template", {}).get("spec", {}).get("containers") or [{}]
        amounts = (containers[0].get("resources") or {}).get("limits") or {}
        accelerators = sum(_amount(amount) for name, amount in amounts.items() if name.endswith("/gpu"))
        machine = Machine(profile, _amount(amounts.get("cpu", "0")), accelerators)
        if profile:
            machines += [machine] * int(group.get("maxReplicas") or 0)
    return tuple(machines)


_SUFFIXES = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9}
"""Powers of ten; CPUs and accelerators are counted in no others."""


def _amount(quantity: object) -> float:
    """`8`, `8.5` or `500m` as a number. Raises ClusterFailed for what is no quantity."""
    text = str(quantity).strip()
    suffix = text[-1:] if text[-1:] in _SUFFIXES else ""
    try:
        return float(text.removesuffix(suffix)) * 10.0 ** _SUFFIXES[suffix]
    except ValueError:
        raise ClusterFailed(f"a RayCluster asks for '{text}' CPUs or accelerators, which is no number") from None


def _token_place(found: Object) -> tuple[str, str] | None:
    """Name and key of the Secret with a RayCluster's token; None when it asks for none."""
    options = found["spec"].get("authOptions") or {}
    if options.get("mode") == "token":
        return options.get("secretName") or found["metadata"]["name"], TOKEN_KEY
    pod = found["spec"].get("headGroupSpec", {}).get("template", {}).get("spec", {})
    for container in pod.get("containers") or ():
        env = {item["name"]: item for item in container.get("env") or ()}
        ref = (env.get("RAY_AUTH_TOKEN", {}).get("valueFrom") or {}).get("secretKeyRef")
        if ref and env.get("RAY_AUTH_MODE", {}).get("value") == "token":
            return ref["name"], ref["key"]
    return None
