"""Events: one for each decision, for whoever runs `kubectl describe`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastserve.cluster.kube.api import EVENTS, FIELD_MANAGER, KubeApi, Resource

MOST_CHARACTERS = 1000
"""Of a note; the API server takes 1024 bytes."""


def tell(
    api: KubeApi, resource: Resource, found: Mapping[str, Any], reason: str, message: str, now: str, warning: bool
) -> None:
    """Make an Event about an object. now: RFC 3339. Raises ClusterFailed."""
    metadata = found["metadata"]
    about = {
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "name": metadata["name"],
        "namespace": metadata["namespace"],
        "uid": metadata["uid"],
        "resourceVersion": metadata["resourceVersion"],
    }
    api.create(
        EVENTS,
        {
            "metadata": {"generateName": f"{metadata['name']}.", "namespace": metadata["namespace"]},
            "involvedObject": about,
            "type": "Warning" if warning else "Normal",
            "reason": reason,
            "message": message.encode()[:MOST_CHARACTERS].decode(errors="ignore"),
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
            "source": {"component": FIELD_MANAGER},
            "reportingComponent": FIELD_MANAGER,
        },
    )
