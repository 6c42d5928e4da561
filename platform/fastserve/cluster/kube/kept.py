"""Objects of one kind as they were last heard of, from a list, a watch and the answers to our own writes.

The three come in any order: an answer to a write may be there before the watch tells of what went before it, or after
the object is gone. What is newer is told by resourceVersion, which Kubernetes lets clients of one kind compare as a
number (its conformance demands that since 1.35, and every server that keeps its objects in etcd did so before).
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

Object = dict[str, Any]


class Kept:
    """Objects by namespace and name, each as new as was heard of. Any thread may call; what is returned is shared, and
    nobody changes it."""

    def __init__(self) -> None:
        self._objects: dict[str, dict[str, Object]] = defaultdict(dict)
        self._gone: dict[tuple[str, str], int] = {}
        """Versions at which objects were seen to be gone, since the last list."""

        self._listed = -1
        """Version of the last list: an older object that it did not have is gone."""

        self._lock = threading.RLock()

    def all(self, namespace: str | None) -> list[Object]:
        """The objects of a namespace, or of all of them, by name."""
        with self._lock:
            spaces = sorted(self._objects) if namespace is None else [namespace]
            return [item for space in spaces for _, item in sorted(self._objects.get(space, {}).items())]

    def slim(self, page: Iterable[Object]) -> list[Object]:
        """Objects of a list as they will be kept: the very same as before where nothing changed, so that to compare
        them costs nothing and two of them take no room."""
        with self._lock:
            return [known if (known := self._same(item)) is not None else _lean(item) for item in page]

    def _same(self, value: Mapping[str, Any]) -> Object | None:
        space, name = _place(value)
        known = self._objects.get(space, {}).get(name)
        return known if known is not None and _version(known) == _version(value) else None

    def put(self, value: Mapping[str, Any]) -> None:
        """An object as it is, or was; one that only waited for its last finalizer is gone."""
        metadata = value["metadata"]
        if metadata.get("deletionTimestamp") and not metadata.get("finalizers"):
            self.drop(value)
            return
        with self._lock:
            space, name = _place(value)
            known, version = self._objects[space].get(name), _version(value)
            newest = max(self._listed, self._gone.get((space, name), -1)) if known is None else _version(known)
            if version > newest:
                self._objects[space][name] = _lean(value)
                self._gone.pop((space, name), None)

    def drop(self, value: Mapping[str, Any]) -> None:
        """An object that is gone, at its resourceVersion."""
        with self._lock:
            space, name = _place(value)
            known, version = self._objects[space].get(name), _version(value)
            if known is not None and _version(known) > version:
                return  # another one of its name, made since
            self._objects[space].pop(name, None)
            self._gone[space, name] = max(version, self._gone.get((space, name), -1))

    def replace(self, items: Iterable[Object], version: int) -> None:
        """A whole list of `slim` objects, true at a version. What is known of later stays. A list that is older than
        the last one is of a server that was put back to a backup: then nothing of before counts."""
        with self._lock:
            is_older = version < self._listed
            before, gone = ({}, {}) if is_older else (self._objects, self._gone)
            self._objects, self._listed = defaultdict(dict), version
            self._gone = {place: at for place, at in gone.items() if at > version}
            later = [item for objects in before.values() for item in objects.values() if _version(item) > version]
            for item in [*items, *later]:
                space, name = _place(item)
                known = self._objects[space].get(name)
                oldest = self._gone.get((space, name), -1) if known is None else _version(known)
                if _version(item) > oldest:
                    self._objects[space][name] = item


def _place(value: Mapping[str, Any]) -> tuple[str, str]:
    metadata = value["metadata"]
    return metadata.get("namespace", ""), metadata["name"]


def _version(value: Mapping[str, Any]) -> int:
    return int(value["metadata"]["resourceVersion"])


def _lean(value: Mapping[str, Any]) -> Object:
    """Without who wrote which field: half of an object, and nobody here reads it."""
    metadata = {key: item for key, item in value["metadata"].items() if key != "managedFields"}
    return {**value, "metadata": metadata}
