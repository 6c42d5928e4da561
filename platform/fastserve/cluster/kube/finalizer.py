"""Our finalizer on a Model: it cannot go while something of it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastserve.cluster.kube.api import MODELS, KubeApi, Object
from fastserve.errors import StateChanged

FINALIZER = "fastserve.dev/runs"
"""Stands on a Model from before its first stage starts until nothing of it runs any more."""


def is_held(found: Mapping[str, Any]) -> bool:
    """Whether our finalizer is on a Model."""
    return FINALIZER in _finalizers(found)


def hold(api: KubeApi, found: Object) -> None:
    """Put our finalizer on a Model; `found` has it afterwards. Raises StateChanged when it is another one by now."""
    _set(api, found, sorted({*_finalizers(found), FINALIZER}))


def release(api: KubeApi, found: Object) -> None:
    """Take it off. Raises StateChanged as `hold` does."""
    _set(api, found, [item for item in _finalizers(found) if item != FINALIZER])


def _set(api: KubeApi, found: Object, wanted: list[str]) -> None:
    if wanted == _finalizers(found):
        return
    namespace, name = found["metadata"]["namespace"], found["metadata"]["name"]
    patch = {"metadata": {"finalizers": wanted}}
    try:
        changed = api.merge(MODELS, namespace, name, patch, found["metadata"]["resourceVersion"])
    except StateChanged:
        # Somebody may annotate it all the time: what counts is that it is still the object of this look.
        fresh = api.get(MODELS, namespace, name)
        if fresh is None or _marks(fresh) != _marks(found):
            raise
        changed = api.merge(MODELS, namespace, name, patch, fresh["metadata"]["resourceVersion"])
    found["metadata"] = changed["metadata"]


def _finalizers(found: Mapping[str, Any]) -> list[str]:
    return list(found["metadata"].get("finalizers") or ())


def _marks(found: Mapping[str, Any]) -> tuple[Any, ...]:
    """What must not have changed when our finalizer is put on or taken off."""
    metadata = found["metadata"]
    return metadata["uid"], metadata["generation"], bool(metadata.get("deletionTimestamp")), _finalizers(found)
