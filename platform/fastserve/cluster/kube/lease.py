"""Which of several operators acts: the one that holds a Lease and keeps renewing it (as client-go does).

How old a lease is, each side measures by its own clock from the moment it saw the lease change, so that clocks which
differ hand out no second leadership.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from fastserve.cluster.kube.api import LEASES, MANAGED_BY, MANAGER, KubeApi
from fastserve.errors import StateChanged

LEASE_SECONDS = 15
"""Without a renewal for so long, another may take over."""


class Lease:
    """One candidate's view of a Lease."""

    def __init__(
        self,
        api: KubeApi,
        namespace: str,
        name: str,
        identity: str,
        seconds: int = LEASE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """identity: of this process; it never comes again. seconds: how long the lease lasts without a renewal.
        clock: seconds that never go back."""
        self._api = api
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._seconds = seconds
        self._clock = clock
        self._seen: tuple[Any, float] | None = None
        self._renewed_at: float | None = None
        self.term = 0
        """How often this process has taken the lease; another may have acted before each."""

    @property
    def renew_seconds(self) -> float:
        """Time between two renewals."""
        return self._seconds / 5

    @property
    def held(self) -> bool:
        """Whether this process may act now. It stops before the lease is up, so that a call which is under way ends
        before another process begins."""
        return self._renewed_at is not None and self._clock() < self._renewed_at + self._seconds * 2 / 3

    def renew(self) -> bool:
        """Take the lease when it is free, or keep it. Returns whether it is ours. Raises ClusterFailed when the API
        server does not answer; an earlier renewal holds as long as it did."""
        asked_at = self._clock()
        found = self._api.get(LEASES, self._namespace, self._name)
        try:
            if found is None:
                metadata = {"name": self._name, "namespace": self._namespace, "labels": {MANAGED_BY: MANAGER}}
                self._api.create(LEASES, {"metadata": metadata, "spec": self._spec(transitions=0, since=None)})
            else:
                spec = found.get("spec") or {}
                ours = spec.get("holderIdentity") == self._identity
                if not ours and not self._is_free(spec):
                    self._renewed_at = None
                    return False
                changes = int(spec.get("leaseTransitions") or 0) + (0 if ours else 1)
                wanted = self._spec(changes, spec.get("acquireTime") if ours else None)
                version = found["metadata"]["resourceVersion"]
                self._api.merge(LEASES, self._namespace, self._name, {"spec": wanted}, version)
        except StateChanged:
            self._renewed_at = None
            return False
        if not self.held:
            self.term += 1
        self._renewed_at = asked_at
        return True

    def release(self) -> None:
        """Let another take over at once."""
        held, self._renewed_at = self.held, None
        found = self._api.get(LEASES, self._namespace, self._name) if held else None
        if found is not None and found["spec"].get("holderIdentity") == self._identity:
            version = found["metadata"]["resourceVersion"]
            self._api.merge(LEASES, self._namespace, self._name, {"spec": {"holderIdentity": ""}}, version)

    def _is_free(self, spec: dict[str, Any]) -> bool:
        """Whether nobody holds it, or its holder has not renewed it for as long as it lasts."""
        if not spec.get("holderIdentity"):
            return True
        record = (spec.get("holderIdentity"), spec.get("renewTime"))
        if self._seen is None or self._seen[0] != record:
            self._seen = (record, self._clock())
        return self._clock() >= self._seen[1] + float(spec.get("leaseDurationSeconds") or LEASE_SECONDS)

    def _spec(self, transitions: int, since: str | None) -> dict[str, Any]:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._seconds,
            "acquireTime": since or now,
            "renewTime": now,
            "leaseTransitions": transitions,
        }
