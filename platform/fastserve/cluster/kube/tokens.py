"""The Secret that a source names by `tokenSecret`: read by its name, in its Model's namespace, and kept nowhere.

Whoever may write a Model has the operator read a Secret, so not every Secret will do: neither FastServe's own ones nor
those that Kubernetes makes (a service account's also has a key `token`) are for sources.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping

from fastserve.cluster.kube.api import MANAGED_BY, MANAGER, SECRETS, KubeApi
from fastserve.errors import SecretMissing

PART_OF = "app.kubernetes.io/part-of"
OPAQUE = "Opaque"


def read_secret(api: KubeApi, namespace: str, name: str) -> Mapping[str, str]:
    """The values of a Secret by key. Raises SecretMissing, which names it, when it is not there or not for sources."""
    found = api.get(SECRETS, namespace, name)
    if found is None:
        raise SecretMissing(
            f"there is no Secret {name} in namespace {namespace} (tokenSecret); make it, with the token under `token`: "
            f"`kubectl -n {namespace} create secret generic {name} --from-file=token=FILE`"
        )
    labels = found["metadata"].get("labels") or {}
    ours = labels.get(MANAGED_BY) == MANAGER or labels.get(PART_OF) == "fastserve"
    if ours or (found.get("type") or OPAQUE) != OPAQUE:
        raise SecretMissing(f"the Secret {name} (tokenSecret) is not for sources; make another one, of type Opaque")
    try:
        return {key: base64.b64decode(text).decode() for key, text in (found.get("data") or {}).items()}
    except (binascii.Error, UnicodeDecodeError):
        raise SecretMissing(f"the Secret {name} (tokenSecret) holds something else than text") from None
