"""Calls to a Kubernetes API server: one place that knows paths, conflicts, and what each failure means.

Objects are plain values, as they travel. Names go into a path percent-encoded, so that no name can become a path.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, urlencode

import urllib3
from kubernetes import client, config
from kubernetes.client import rest
from kubernetes.client.exceptions import ApiException

from fastserve.errors import ClusterFailed, ManifestInvalid, Problem, StateChanged
from fastserve.spec.model import API_VERSION

FIELD_MANAGER = "fastserve-operator"
BY_HAND = "fastserve"
"""Field manager of what a person writes with the command line."""

MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGER = "fastserve"
PAGE = 500
ANSWER_SECONDS = 30.0
CONNECT_SECONDS = 10.0
WATCH_SECONDS = 300
"""After so long the API server ends a watch, and it is asked for anew."""

CONNECTIONS = 100
"""That are kept open: each namespace is looked at by threads of its own, and a new one costs a handshake."""

ASKED_AGAIN = "it is asked again"

Object = dict[str, Any]


class KindUnknown(ClusterFailed):
    """The cluster has no definition of a kind of object, so there is none of that kind."""

    @property
    def reason(self) -> str:
        """As of the others: what a person sees is a cluster that lacks something."""
        return ClusterFailed.__name__


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind of object and where the API server keeps it."""

    api_version: str
    kind: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str | None, name: str | None = None) -> str:
        """Path of the collection, or of one object. namespace None: over all namespaces."""
        parts = ["", "api" if self.api_version == "v1" else "apis", *self.api_version.split("/")]
        if self.namespaced and namespace is not None:
            parts += ["namespaces", quote(namespace, safe="")]
        parts.append(self.plural)
        if name is not None:
            parts.append(quote(name, safe=""))
        return "/".join(parts)


MODELS = Resource(API_VERSION, "Model", "models")
ACCESS_KEYS = Resource(API_VERSION, "AccessKey", "accesskeys")
PROFILES = Resource(API_VERSION, "HardwareProfile", "hardwareprofiles", namespaced=False)
CONFIG_MAPS = Resource("v1", "ConfigMap", "configmaps")
SECRETS = Resource("v1", "Secret", "secrets")
NAMESPACES = Resource("v1", "Namespace", "namespaces", namespaced=False)
EVENTS = Resource("v1", "Event", "events")
LEASES = Resource("coordination.k8s.io/v1", "Lease", "leases")
RAY_CLUSTERS = Resource("ray.io/v1", "RayCluster", "rayclusters")
PODS = Resource("v1", "Pod", "pods")


class KubeApi:
    """The API server that a kubeconfig or the pod's own service account leads to."""

    def __init__(self, api_client: client.ApiClient, manager: str = FIELD_MANAGER, advice: str = ASKED_AGAIN) -> None:
        """manager: field manager of what is written. advice: what is done about a server that does not answer."""
        self._client = api_client
        self._manager = manager
        self._advice = advice
        self._acts: Callable[[], bool] = lambda: True

    @classmethod
    def connect(cls) -> Self:
        """By the service account in a pod, else by KUBECONFIG. Raises ClusterFailed when neither is there."""
        configuration = client.Configuration()
        try:
            if Path("/var/run/secrets/kubernetes.io/serviceaccount/token").exists():
                config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
            else:
                config.load_kube_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        except config.ConfigException as error:
            raise ClusterFailed(f"no Kubernetes cluster is configured ({error}); set KUBECONFIG") from error
        configuration.retries = False
        configuration.connection_pool_maxsize = CONNECTIONS
        return cls(client.ApiClient(configuration))

    def acting_only_while(self, acts: Callable[[], bool]) -> Self:
        """The same API server, for a process that may change something only while `acts` says so: a leader that was
        stopped in the middle of a look, and goes on when another one leads, must not finish it."""
        found = copy.copy(self)
        found._acts = acts
        return found

    def require_lead(self) -> None:
        """Raise StateChanged when this process may change nothing any more."""
        if not self._acts():
            raise StateChanged("this replica does not hold the lease any more; the one that does looks for itself")

    def get(self, resource: Resource, namespace: str | None, name: str) -> Object | None:
        """One object; None when there is none of that name."""
        status, answer = self._call("GET", resource.path(namespace, name))
        return None if status == 404 else self._good(status, answer, f"read {resource.kind} {name}")

    def list(self, resource: Resource, namespace: str | None, labels: str = "", fields: str = "") -> list[Object]:
        """Every object, page by page. namespace None: of all namespaces. labels, fields: selectors."""
        return [item for page, _ in self.pages(resource, namespace, labels, fields) for item in page]

    def pages(
        self, resource: Resource, namespace: str | None, labels: str = "", fields: str = ""
    ) -> Iterator[tuple[Sequence[Object], str]]:
        """As `list`, a page at a time, each with the resourceVersion at which the whole list was true."""
        query: dict[str, Any] = {"limit": PAGE, **_selectors(labels, fields)}
        while True:
            status, answer = self._call("GET", resource.path(namespace), query=query)
            page = self._good(status, answer, f"list {resource.plural}")
            metadata = page.get("metadata") or {}
            items = [{"apiVersion": resource.api_version, "kind": resource.kind, **item} for item in page["items"]]
            yield items, str(metadata.get("resourceVersion", ""))
            if not metadata.get("continue"):
                return
            query["continue"] = metadata["continue"]

    def watch(
        self, resource: Resource, namespace: str | None, version: str, labels: str = "", silent_seconds: float = 100.0
    ) -> Iterator[Object]:
        """What changes after a resourceVersion, as it comes: each with its `type` and its `object`, bookmarks too.

        Returns when the API server has taken it up; what is returned ends when the server ends it. silent_seconds: a
        watch that brings nothing for so long, no bookmark either, is broken. Raises ClusterFailed when it is refused,
        or breaks.
        """
        query = {"watch": "true", "resourceVersion": version, "allowWatchBookmarks": "true", **_selectors(labels, "")}
        query["timeoutSeconds"] = str(WATCH_SECONDS)
        with self._answering():
            response = self._asked("GET", resource.path(namespace), None, query, "application/json", silent_seconds)
        if response.status == 410:  # as the server otherwise says it in the first thing that comes
            response.read()  # type: ignore[no-untyped-call]
            return iter([{"type": "ERROR", "object": {"code": 410}}])
        if response.status != 200:
            with self._answering():
                status, answer = _decoded(response)
            self._good(status, answer, f"watch {resource.plural}")
        return self._lines(response)

    def _lines(self, response: rest.RESTResponse) -> Iterator[Object]:
        try:
            with self._answering():
                for line in response.response:
                    if line.strip():
                        yield json.loads(line)
        except ValueError as error:
            raise ClusterFailed(f"a watch of the Kubernetes API server brought half a line; {self._advice}") from error
        finally:
            response.response.close()  # it may be in the middle: nobody else may go on with it
            response.response.release_conn()

    def create(self, resource: Resource, value: Mapping[str, Any]) -> Object:
        """Make an object. Raises StateChanged when there is one of that name."""
        metadata = value["metadata"]
        body = {"apiVersion": resource.api_version, "kind": resource.kind, **value}
        status, answer = self._call(
            "POST", resource.path(metadata.get("namespace")), body=body, query={"fieldManager": self._manager}
        )
        return self._good(status, answer, f"create {resource.kind} {metadata.get('name', '')}")

    def merge(
        self, resource: Resource, namespace: str | None, name: str, patch: Mapping[str, Any], version: str
    ) -> Object:
        """Change some keys of an object (RFC 7386). Raises StateChanged when it is no longer at resourceVersion
        `version`, or gone."""
        metadata = {**patch.get("metadata", {}), "resourceVersion": version}
        status, answer = self._call(
            "PATCH",
            resource.path(namespace, name),
            body={**patch, "metadata": metadata},
            query={"fieldManager": self._manager},
            content="application/merge-patch+json",
        )
        if status == 404:
            raise StateChanged(f"{resource.kind} {name} is gone; the next look decides again")
        return self._good(status, answer, f"change {resource.kind} {name}")

    def apply(self, resource: Resource, value: Mapping[str, Any], dry_run: bool = False) -> Object:
        """Server-side apply of a whole object, defaults filled in. dry_run: only say what would come of it.

        Raises StateChanged when another manager has written a key otherwise, ManifestInvalid when the server refuses
        the object.
        """
        metadata = value["metadata"]
        body = {"apiVersion": resource.api_version, "kind": resource.kind, **value}
        status, answer = self._call(
            "PATCH",
            resource.path(metadata.get("namespace"), metadata["name"]),
            body=body,
            query={
                "fieldManager": self._manager,
                "fieldValidation": "Strict",
                **({"dryRun": "All"} if dry_run else {}),
            },
            content="application/apply-patch+yaml",
        )
        what = f"{resource.kind} {metadata['name']}"
        if status in (400, 422):
            told = answer.get("message", "").removeprefix(f"{resource.kind}.{resource.api_version.split('/')[0]} ")
            raise ManifestInvalid([Problem("", f"{what} is refused by the API server: {told}")])
        return self._good(status, answer, f"apply {what}")

    def delete(self, resource: Resource, namespace: str | None, name: str) -> bool:
        """Delete an object; its finalizers may hold it for a while. False when there is none."""
        status, answer = self._call("DELETE", resource.path(namespace, name), query={"propagationPolicy": "Background"})
        if status == 404:
            return False
        self._good(status, answer, f"delete {resource.kind} {name}")
        return True

    def apply_status(self, resource: Resource, found: Mapping[str, Any], status_value: Mapping[str, Any]) -> bool:
        """Server-side apply of the whole status, with a field manager of our own. Nothing when the object is gone.

        False when the server takes no status for the object as it is stored: it broke the rules of a definition that
        came later.
        """
        metadata = found["metadata"]
        kept = {key: metadata[key] for key in ("name", "namespace", "uid") if key in metadata}
        body = {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": kept, "status": status_value}
        path = resource.path(metadata.get("namespace"), metadata["name"]) + "/status"
        query = {"fieldManager": self._manager, "force": "true"}
        status, answer = self._call("PATCH", path, body=body, query=query, content="application/apply-patch+yaml")
        if status == 500 and "typed" in answer.get("message", ""):
            # Stored when the definition was another one: such an object can be merged with, not applied to.
            gone = dict.fromkeys((found.get("status") or {}).keys() - status_value.keys())
            body = {"metadata": {"uid": metadata["uid"]}, "status": {**gone, **status_value}}
            query = {"fieldManager": self._manager}
            status, answer = self._call("PATCH", path, body=body, query=query, content="application/merge-patch+json")
            if status == 422:
                return False
        if status != 404:
            self._good(status, answer, f"write the status of {resource.kind} {metadata['name']}")
        return True

    def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, Any] | None = None,
        content: str = "application/json",
    ) -> tuple[int, Object]:
        if method != "GET":
            self.require_lead()
        return self._send(method, path, body, query, content)

    def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None, query: Mapping[str, Any] | None, content: str
    ) -> tuple[int, Object]:
        with self._answering():
            return _decoded(self._asked(method, path, body, query, content, ANSWER_SECONDS))

    def _asked(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        query: Mapping[str, Any] | None,
        content: str,
        answer_seconds: float,
    ) -> rest.RESTResponse:
        asked = self._client.param_serialize(
            method=method,
            resource_path=path + (f"?{urlencode(query)}" if query else ""),
            header_params={"Accept": "application/json", "Content-Type": content},
            body=body,
            auth_settings=["BearerToken"],
        )
        return self._client.call_api(*asked, _request_timeout=(CONNECT_SECONDS, answer_seconds))

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Say in our words that the API server does not answer."""
        try:
            yield
        except (urllib3.exceptions.HTTPError, ApiException, OSError) as error:
            raise ClusterFailed(f"the Kubernetes API server does not answer ({error}); {self._advice}") from error

    def _good(self, status: int, answer: Object, what: str) -> Object:
        if status == 409:
            raise StateChanged(f"could not {what}: {answer.get('message', 'conflict')}; the next look decides again")
        if status in (401, 403):
            raise ClusterFailed(_refused(status, answer, what))
        told = str(answer.get("message", "")).strip()
        if status == 404 and ("page not found" in told or "could not find the requested resource" in told):
            owner = "KubeRay" if "raycluster" in what.lower() else "FastServe"
            raise KindUnknown(
                f"the cluster cannot {what}: it knows no such kind, so {owner} is not installed there; "
                "install its chart first"
            )
        if not 200 <= status < 300:
            raise ClusterFailed(f"the Kubernetes API server would not {what} ({status}: {told})")
        return answer


def _refused(status: int, answer: Object, what: str) -> str:
    """Who may not do what, in the server's own words, which name the verb and the resource."""
    said = answer.get("message") or "it gives no reason"
    if status == 401:
        return f"the Kubernetes API server does not know you, so you may not {what} (401: {said}); sign in again"
    return f"you may not {what} (403: {said}); ask for a Role with that verb on that resource"


def _decoded(response: rest.RESTResponse) -> tuple[int, Object]:
    """Status and body of an answer, read to its end."""
    raw = response.read()  # type: ignore[no-untyped-call]
    try:
        return response.status, json.loads(raw)
    except ValueError:
        return response.status, {"message": raw[:300].decode(errors="replace")}


def _selectors(labels: str, fields: str) -> dict[str, str]:
    return {key: said for key, said in (("labelSelector", labels), ("fieldSelector", fields)) if said}


def owner_reference(resource: Resource, owner: Mapping[str, Any]) -> Object:
    """What an object says of the one that it goes with."""
    return {
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": False,
    }


def is_ours(found: Mapping[str, Any], owner_uid: str | None = None) -> bool:
    """Whether an object is one that FastServe made, for this owner where one is given."""
    metadata = found["metadata"]
    owners = {owner["uid"] for owner in metadata.get("ownerReferences") or ()}
    ours = (metadata.get("labels") or {}).get(MANAGED_BY) == MANAGER
    return ours and (owner_uid is None or owner_uid in owners)
