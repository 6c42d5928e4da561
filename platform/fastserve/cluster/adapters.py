"""Which adapters the replicas of a revision are told to have: those that the manifest names and the store holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastserve.artifacts import attempts
from fastserve.artifacts.store import Store
from fastserve.plan.adapters import adapter_keys
from fastserve.plan.revision import Revision
from fastserve.plan.stages import Stage
from fastserve.spec.model import Model


def adapters_for(store: Store, model: Model, digests: Mapping[str, str], revision: Revision) -> list[dict[str, str]]:
    """`name`, `key` and `digest` of each adapter, in the manifest's order.

    digests: of the outside sources. An adapter whose rank is above what the revision's engine was started for is left
    out: it comes with the next revision.
    """
    found = []
    for name, key in adapter_keys(model, digests).items():
        record = attempts.find(store, Stage.SOURCE, key) if revision.lora_rank else None
        if record is not None and int(record.metrics["rank"]) <= revision.lora_rank:
            found.append({"name": name, "key": key, "digest": record.digest})
    return found


def carriers(
    store: Store, model: Model, digests: Mapping[str, str], revisions: Mapping[str, Mapping[str, Any]]
) -> dict[str, frozenset[str]]:
    """Digests of the revisions whose engines can apply each adapter that is in the store, by its name.

    revisions: values of `Revision.to_json` by digest. An adapter that only a coming revision can apply has none yet.
    """
    ranks = {digest: Revision.from_json(value).lora_rank for digest, value in revisions.items()}
    found = {}
    for name, key in adapter_keys(model, digests).items():
        record = attempts.find(store, Stage.SOURCE, key)
        if record is not None:
            rank = int(record.metrics["rank"])
            found[name] = frozenset(digest for digest, limit in ranks.items() if limit >= rank)
    return found
