"""AccessKeys: the key itself stands in one Secret, its SHA-256 everywhere else.

The Secret `<name>-key` is made once and belongs to its AccessKey, so it goes with it. Whoever removes the Secret gets a
new key. A limit that nothing keeps yet is refused by name, and a refused key opens nothing.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NoReturn

from fastserve.cluster.kube.api import (
    ACCESS_KEYS,
    MANAGED_BY,
    MANAGER,
    SECRETS,
    KubeApi,
    Object,
    is_ours,
    owner_reference,
)
from fastserve.errors import ClusterFailed, NameConflict
from fastserve.gateway.keys import digest, new_key
from fastserve.plan.executable import check_access_key
from fastserve.spec import status as schemas
from fastserve.spec.load import read
from fastserve.spec.model import AccessKey
from fastserve_operator import conditions
from fastserve_operator.conditions import Trouble, attempted
from fastserve_operator.story import pruned, same

KEY = "key"

log = logging.getLogger("fastserve.operator")


def tend_key(api: KubeApi, found: Mapping[str, Any], now: str) -> dict[str, Any] | None:
    """See that an AccessKey has its Secret, and tell how it stands. Returns name, sha256, models and expires as the
    gateway needs them; None when the key opens nothing.

    now: RFC 3339.
    """
    entry = attempted(lambda: _entry(api, found))
    if isinstance(entry, Trouble):
        ready, facts = conditions.of_trouble(entry, found, now), {}
    else:
        expired = entry["expires"] is not None and entry["expires"] < datetime.now(UTC).date().isoformat()
        message = f"The key is in the Secret {_secret_name(found)}, under {KEY}."
        ready = (
            conditions.condition("Ready", "False", "Expired", f"Its last day was {entry['expires']}.", found, now)
            if expired
            else conditions.condition("Ready", "True", "Ready", message, found, now)
        )
        facts = {"secret": _secret_name(found), "sha256": entry["sha256"]}
    wanted = {"observedGeneration": found["metadata"]["generation"], "conditions": [ready], **facts}
    status = pruned(schemas.of_access_key(), wanted)
    if not same(status, found.get("status")):
        told = attempted(lambda: api.apply_status(ACCESS_KEYS, found, status))
        if isinstance(told, Trouble) and told.reason != "StateChanged":
            log.warning("the status of AccessKey %s was not written: %s", found["metadata"]["name"], told.message)
    return None if isinstance(entry, Trouble) else entry


def _entry(api: KubeApi, found: Mapping[str, Any]) -> dict[str, Any]:
    (manifest,) = read(json.dumps(found))
    if not isinstance(manifest, AccessKey):
        raise TypeError(f"{manifest.kind} is no AccessKey")
    check_access_key(manifest)
    spec = manifest.spec
    return {
        "name": manifest.metadata.name,
        "sha256": _sha256(api, found),
        "models": sorted(set(spec.models)),
        "expires": spec.expires.isoformat() if spec.expires else None,
    }


def _sha256(api: KubeApi, found: Mapping[str, Any]) -> str:
    """Of the key. A Secret that cannot be read just now says nothing: what it held last goes on, so that an API server
    which stumbles shuts nobody out."""
    try:
        secret = api.get(SECRETS, found["metadata"]["namespace"], _secret_name(found))
    except ClusterFailed as error:
        known = (found.get("status") or {}).get("sha256")
        if known is None:
            raise
        log.warning("%s stays as it is: %s", _secret_name(found), error)
        return str(known)
    return digest(_key(api, found, secret))


def _key(api: KubeApi, found: Mapping[str, Any], secret: Object | None) -> str:
    """The key; made when there is no Secret. Raises NameConflict when the Secret's name is taken, or it
    holds no key."""
    metadata = found["metadata"]
    name, namespace = _secret_name(found), metadata["namespace"]
    if secret is None:
        value = {
            "metadata": {
                "name": name,
                "namespace": namespace,
                "labels": {MANAGED_BY: MANAGER},
                "ownerReferences": [owner_reference(ACCESS_KEYS, found)],
            },
            "type": "Opaque",
            "data": {KEY: base64.b64encode(new_key().encode()).decode()},
        }
        secret = api.create(SECRETS, value)
    if not is_ours(secret, metadata["uid"]):
        raise NameConflict(
            f"the Secret {name} is there and was not made for this AccessKey; it is left alone: "
            "remove it, or give the AccessKey another name"
        )
    text = (secret.get("data") or {}).get(KEY)
    try:
        return base64.b64decode(text or "").decode("ascii") or _no_key(name)
    except ValueError:
        return _no_key(name)


def _no_key(name: str) -> NoReturn:
    raise NameConflict(f"the Secret {name} holds no {KEY}; remove it, and a new key is made")


def _secret_name(found: Mapping[str, Any]) -> str:
    return f"{found['metadata']['name']}-key"
