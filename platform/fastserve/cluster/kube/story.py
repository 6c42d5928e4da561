"""Models as a person sees them on a cluster: read from the objects alone, in the keys of `cluster.status.status_of`.

Attempts, progress and records are in an artifact store that a laptop may not reach; what the operator found there
stands in the status of the Model. So whoever may read Models can be told the whole story, and the same one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastserve.cluster.kube.api import MODELS, NAMESPACES, KubeApi, Object
from fastserve.cluster.kube.config import nearest
from fastserve.errors import ClusterFailed, UsageInvalid

NOT_LOOKED_AT = (
    "No operator has looked at it yet. Is one running for this namespace? `kubectl get lease -A` shows who tends."
)


class KubeModels:
    """The Models of one namespace."""

    def __init__(self, api: KubeApi, namespace: str) -> None:
        self._api = api
        self.namespace = namespace

    def all(self) -> list[Object]:
        """Every Model object. Raises UsageInvalid when there is no such namespace, ClusterFailed when the cluster does
        not know the kind."""
        found = self._api.list(MODELS, self.namespace)
        if not found:
            self.require_namespace()
        return sorted(found, key=lambda item: str(item["metadata"]["name"]))

    def get(self, name: str) -> Object:
        """One Model object. Raises UsageInvalid, with names that are like it, when there is none."""
        found = self._api.get(MODELS, self.namespace, name)
        if found is not None:
            return {"apiVersion": MODELS.api_version, "kind": MODELS.kind, **found}
        names = [item["metadata"]["name"] for item in self.all()]
        raise UsageInvalid(f"no model named {name} is in namespace {self.namespace}; {nearest(name, names)}")

    def find(self, name: str) -> Object | None:
        """One Model object; None when there is none."""
        return self._api.get(MODELS, self.namespace, name)

    def require_namespace(self) -> None:
        """Raise UsageInvalid when there is no such namespace. Who may not look at namespaces is not told."""
        try:
            if self._api.get(NAMESPACES, None, self.namespace) is not None:
                return
            names = [str(item["metadata"]["name"]) for item in self._api.list(NAMESPACES, None)]
        except ClusterFailed:
            return
        raise UsageInvalid(f"there is no namespace {self.namespace} on the cluster; {nearest(self.namespace, names)}")


def story_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """How a Model stands, with every key that `cluster.status.status_of` has.

    found: the object. `progress`, `gate` and the rest are as the operator wrote them; figures of the moment that it
    does not write (a rollout's, a place's bounds) are not there.
    """
    status = dict(found.get("status") or {})
    ready = ready_of(found)
    others = [item for item in status.get("conditions") or () if item["type"] != "Ready"]
    why = list(status.get("why") or [ready["message"]])
    if ready["message"] not in why:
        why.insert(0, ready["message"])
    return {
        "name": found["metadata"]["name"],
        "stages": {name: {"state": "-", "key": None, **stage} for name, stage in (status.get("stages") or {}).items()},
        "gate": status.get("gate"),
        "adapters": [{"state": "-", **item} for item in status.get("adapters") or ()],
        "revisions": [_revision(item) for item in status.get("revisions") or ()],
        "rollout": _rollout(status.get("rollout")),
        "pin": status.get("pin"),
        "url": status.get("url"),
        "conditions": [ready, *others],
        "why": why,
        "stage": status.get("stage") or "-",
        "rollback": status.get("rollback"),
        "generation": found["metadata"].get("generation"),
        "observedGeneration": status.get("observedGeneration"),
    }


def ready_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """The condition `Ready` of an object; Unknown while nobody has looked at it as it is now."""
    metadata, status = found["metadata"], found.get("status") or {}
    ready = next((dict(item) for item in status.get("conditions") or () if item["type"] == "Ready"), None)
    if ready is None:
        return {"type": "Ready", "status": "Unknown", "reason": "NotLookedAt", "message": NOT_LOOKED_AT}
    if is_behind(found):
        told = f"The last change has not been looked at yet; before it: {ready['message']}"
        return {**ready, "status": "Unknown", "reason": "NotLookedAt", "message": told}
    if metadata.get("deletionTimestamp") and ready["reason"] != "Deleting":
        return {**ready, "status": "Unknown", "reason": "Deleting", "message": "It was deleted; the operator ends it."}
    return ready


def is_behind(found: Mapping[str, Any]) -> bool:
    """Whether the status speaks of an older generation of the object."""
    seen = (found.get("status") or {}).get("observedGeneration") or 0
    return bool(seen < (found["metadata"].get("generation") or 0))


def _revision(item: Mapping[str, Any]) -> dict[str, Any]:
    places = [{"state": "-", "replicas": 0, "wanted": 0, "message": "", **place} for place in item.get("places") or ()]
    return {"state": "-", "weight": 0, "replicas": 0, "message": "", **item, "places": places}


def _rollout(rollout: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """With the sentence of where it stands; its figures are the gateway's to tell."""
    if rollout is None:
        return None
    steps, revision = rollout.get("steps") or [], str(rollout.get("revision", ""))
    share = f"revision {revision[:8]} has {rollout.get('weight')} % of traffic"
    told = f"step {rollout.get('step')} of {len(steps)}: {share}, {str(rollout.get('from', ''))[:8]} the rest"
    return {**rollout, "message": told}
