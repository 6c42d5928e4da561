"""An API server whose larger collections are listed once and watched from there, so that a look costs no list.

The operator looks at every object of a collection every few seconds; with thousands of them a list is seconds of work
for both sides. What is kept here only spares it that: each write still names the resourceVersion that it follows from,
so the API server decides who was first, and who loses everything that is kept lists anew.

A collection is listed by the one who reads it, and again when the watch cannot go on from where it was (410), was not
heard of for too long, while there is none (it broke, or the right to watch is missing), every ten minutes all the same,
and when somebody says that another process may have written (`anew`). Our own writes are kept from their answers: who
reads sees what it wrote.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from fastserve.cluster.kube.api import KubeApi, Object, Resource
from fastserve.cluster.kube.kept import Kept

SILENT_SECONDS = 100.0
"""A watch brings a bookmark about every minute; one that was not heard of for so long is not believed."""

LIST_SECONDS = 600.0
"""A collection is listed so often, whatever the watch says."""

JUST_SECONDS = 2.0
"""A list that ended less than so long ago is believed before the watch has begun."""


class Watched:
    """One collection. It is read by any thread, and watched by one of its own."""

    def __init__(
        self,
        api: KubeApi,
        resource: Resource,
        namespace: str | None,
        labels: str = "",
        changed: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """namespace None: of all namespaces. labels: a label selector of `key` and `key=value`. changed: called when
        the watch tells something, or ends so that a list is needed. clock: seconds that never go back."""
        self._api = api
        self.resource = resource
        self.namespace = namespace
        self.labels = labels
        self._changed = changed
        self._clock = clock
        self._kept = Kept()
        self._listing = threading.Lock()
        self._to_follow = threading.Event()
        """Set while there is a version to watch from."""

        self._version = -1
        self._listed_at: float | None = None
        """None: a list is needed."""

        self._heard_at: float | None = None
        """None: there is no watch."""

        self._just_until = 0.0

    @property
    def name(self) -> str:
        """For the log: of what, and where."""
        return f"{self.resource.plural} of {'all namespaces' if self.namespace is None else self.namespace}"

    def items(self, namespace: str | None) -> list[Object]:
        """The objects of a namespace, listed now if need be. They are shared: nobody changes them. Raises
        ClusterFailed."""
        with self._listing:
            if self._is_believed():
                return self._kept.all(namespace)
            self._listed_at = self._clock()  # whoever says `anew` meanwhile is heard
            try:
                version, found = self._list()
            except BaseException:
                self._listed_at = None
                raise
            if not version.isdecimal():  # versions that cannot be compared: this server's lists are not kept
                self._listed_at = None
                return [item for item in found if namespace in (None, item["metadata"].get("namespace"))]
            self._kept.replace(found, int(version))
            self._version = max(self._version, int(version)) if self._to_follow.is_set() else int(version)
            self._to_follow.set()
            self._just_until = self._clock() + JUST_SECONDS
            return self._kept.all(namespace)

    def _list(self) -> tuple[str, list[Object]]:
        found: list[Object] = []
        version = ""
        for page, at in self._api.pages(self.resource, self.namespace, self.labels):
            found += self._kept.slim(page)
            version = at
        return version, found

    def took(self, value: Object) -> None:
        """The answer to a write of ours."""
        has = value["metadata"].get("labels") or {}
        for wanted in filter(None, self.labels.split(",")):
            key, sign, said = wanted.partition("=")
            if key not in has or (sign and has[key] != said):
                return
        self._kept.put({"apiVersion": self.resource.api_version, "kind": self.resource.kind, **value})

    def anew(self) -> None:
        """Believe nothing that is kept: another process may have written, and it must be seen now."""
        self._listed_at = None

    def follow(self, patience_seconds: float) -> None:
        """One watch, until it ends; nothing when there is no list yet, after this patience. For a thread that does
        nothing else. Raises ClusterFailed when the watch breaks or is refused."""
        if not self._to_follow.wait(patience_seconds):
            return
        try:
            told = self._api.watch(self.resource, self.namespace, str(self._version), self.labels, SILENT_SECONDS)
            self._heard_at = self._clock()
            for event in told:
                self._heard_at = self._clock()
                if event["type"] == "ERROR":  # it cannot go on from that version, most often: 410 Gone
                    self._to_follow.clear()
                    self._heard_at = self._listed_at = None
                    self._changed()
                    return
                self._hear(event["type"], event["object"])
        except BaseException:
            self._heard_at = None
            raise

    def _hear(self, kind: str, value: Object) -> None:
        if kind == "DELETED":
            self._kept.drop(value)
        elif kind != "BOOKMARK":
            self._kept.put(value)
        self._version = max(self._version, int(value["metadata"]["resourceVersion"]))
        if kind != "BOOKMARK":
            self._changed()

    def _is_believed(self) -> bool:
        if self._listed_at is None:
            return False
        now = self._clock()
        watches = self._heard_at is not None and now < self._heard_at + SILENT_SECONDS
        return now < self._just_until or (watches and now < self._listed_at + LIST_SECONDS)


class WatchedApi(KubeApi):
    """An API server that answers `list` of some collections from what is kept of them."""

    watched: tuple[Watched, ...] = ()

    def keep(
        self,
        resource: Resource,
        namespace: str | None,
        labels: str = "",
        changed: Callable[[], None] = lambda: None,
    ) -> Watched:
        """Keep a collection from now on, as `Watched` says; its `follow` wants a thread."""
        found = Watched(self, resource, namespace, labels, changed)
        self.watched = (*self.watched, found)
        return found

    def anew(self) -> None:
        """The next `list` of each collection asks the API server."""
        for found in self.watched:
            found.anew()

    def list(self, resource: Resource, namespace: str | None, labels: str = "", fields: str = "") -> list[Object]:
        """As `KubeApi.list`; objects of a collection that is kept are shared, and nobody changes them."""
        for found in self.watched:
            covers = found.namespace in (None, namespace)
            if covers and not fields and (found.resource, found.labels) == (resource, labels):
                return found.items(namespace)
        return super().list(resource, namespace, labels, fields)

    def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, Any] | None = None,
        content: str = "application/json",
    ) -> tuple[int, Object]:
        status, answer = super()._call(method, path, body, query, content)
        if method in ("POST", "PATCH") and 200 <= status < 300 and "dryRun" not in (query or {}):
            place = path if method == "POST" else path.removesuffix("/status").rpartition("/")[0]
            namespace = answer["metadata"].get("namespace")
            for found in self.watched:
                if place == found.resource.path(namespace) and found.namespace in (None, namespace):
                    found.took(answer)
        return status, answer
