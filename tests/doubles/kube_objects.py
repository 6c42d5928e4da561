"""A small API server on loopback: objects with resourceVersion, generation, finalizers and owners, over real HTTP.

As far as the operator and the command line ask: get, list by label and field, watch, create, JSON merge patch with a
resourceVersion, server-side apply (by one manager alone), delete with garbage collection. Nothing is admitted or
validated here; `tests/kube` does that with the real server.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

from kubernetes import client

from fastserve.cluster.kube.api import KubeApi

Object = dict[str, Any]
Api = TypeVar("Api", bound=KubeApi)


@dataclass(frozen=True, slots=True)
class Change:
    """One write."""

    version: int
    path: str
    before: Object | None
    after: Object | None
    """None when it is gone."""


class KubeObjects:
    """All objects by their path, and a log of who asked for what."""

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        self.calls: list[tuple[str, str]] = []
        self.down = False
        """While set, every call gets a 503."""

        self.changes: list[Change] = []
        self.compacted = 0
        """Nobody can watch from before this version: 410."""

        self.breaks = 0
        """How often every watch over HTTP was ended in the middle."""

        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        self._before: dict[str, Object | None] = {}
        self._told = threading.Condition(self._lock)

    # -- what a test does by hand ----------------------------------------------------------------------------------

    def put(self, path: str, value: Object) -> Object:
        """Make or replace an object, as `kubectl apply` would: the generation goes up when the spec changes."""
        with self._lock:
            had = self.objects.get(path)
            metadata = {**(had or {}).get("metadata", {}), **value["metadata"]}
            metadata.setdefault("uid", f"uid-{next(self._numbers)}")
            metadata.setdefault("namespace", "demo")
            changed = had is None or had.get("spec") != value.get("spec")
            metadata["generation"] = metadata.get("generation", 0) + int(changed)
            self.objects[path] = {**(had or {}), **value, "metadata": metadata}
            return self._stamp(path)

    def delete(self, path: str) -> None:
        """Delete an object; one with finalizers waits for them."""
        with self._lock:
            found = self.objects[path]
            found["metadata"]["deletionTimestamp"] = "2027-01-01T00:00:00Z"
            self._stamp(path)
            self._collect()

    def break_watches(self) -> None:
        """End every watch that is under way, without a word."""
        with self._lock:
            self.breaks += 1
            self._told.notify_all()

    def since(self, path: str, query: dict[str, list[str]], version: int) -> list[Object]:
        """What a watch of a collection is told that begins after a version."""
        if version < self.compacted:
            return [{"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired"}}]
        wanted = _selector(query, "labelSelector")
        found = []
        for change in self.changes:
            if change.version > version and _is_in(change.path, path):
                was, fits = (item is not None and _has(_labels(item), wanted) for item in (change.before, change.after))
                kind = ("ADDED" if not was else "MODIFIED") if fits else "DELETED"
                if was or fits:
                    told = copy.deepcopy(change.after or change.before)
                    told["metadata"]["resourceVersion"] = str(change.version)
                    found.append({"type": kind, "object": told})
        return found

    def watch(self, path: str, query: dict[str, list[str]]) -> Iterator[Object]:
        """A watch over HTTP; it ends after `timeoutSeconds`, or when it is broken."""
        version, breaks = int(query["resourceVersion"][0]), self.breaks
        end = time.monotonic() + float(query["timeoutSeconds"][0])
        while True:
            with self._lock:
                while not (told := self.since(path, query, version)) and self.breaks == breaks:
                    if not self._told.wait(end - time.monotonic()):
                        break
            if self.breaks > breaks or not told:
                return
            yield from told
            if told[0]["type"] == "ERROR":
                return
            version = int(told[-1]["object"]["metadata"]["resourceVersion"])

    # -- what comes over HTTP --------------------------------------------------------------------------------------

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any, content: str) -> tuple[int, Any]:
        """Status and body of one call."""
        with self._lock:
            self.calls.append((method, path))
            if self.down:
                return 503, {"message": "it is down"}
            if method == "GET":
                return self._read(path, query)
            if method == "POST":
                return self._create(path, body)
            if method == "DELETE":
                return self._delete(path)
            if content == "application/apply-patch+yaml" and path.endswith("/status"):
                return self._apply_status(path.removesuffix("/status"), body)
            if content == "application/apply-patch+yaml":
                return self._apply(path, body, dry_run="dryRun" in query)
            return self._merge(path, body)

    def _read(self, path: str, query: dict[str, list[str]]) -> tuple[int, Any]:
        if path in self.objects:
            return 200, copy.deepcopy(self.objects[path])
        if path.rsplit("/", 1)[-1] not in PLURALS:
            return 404, {"message": f"{path} not found"}
        wanted = _selector(query, "labelSelector")
        fields = _selector(query, "fieldSelector")
        items = [
            item
            for place, item in sorted(self.objects.items())
            if _is_in(place, path)
            and _has(item["metadata"].get("labels", {}), wanted)
            and all(_field(item, key) == value for key, _, value in fields)
        ]
        return 200, {"items": copy.deepcopy(items), "metadata": {"resourceVersion": str(self.version())}}

    def version(self) -> int:
        """Of the newest change."""
        return self.changes[-1].version if self.changes else 0

    def _create(self, path: str, body: Object) -> tuple[int, Any]:
        metadata = body["metadata"]
        name = metadata.setdefault("name", f"{metadata.get('generateName', '')}{next(self._numbers)}")
        place = f"{path}/{name}"
        if place in self.objects:
            return 409, {"message": f"{name} already exists"}
        metadata |= {"uid": f"uid-{next(self._numbers)}", "generation": 1}
        self.objects[place] = copy.deepcopy(body)
        return 201, copy.deepcopy(self._stamp(place))

    def _merge(self, path: str, body: Object) -> tuple[int, Any]:
        found = self.objects.get(path)
        if found is None:
            return 404, {"message": f"{path} not found"}
        version = body["metadata"].get("resourceVersion")
        if version is not None and version != found["metadata"]["resourceVersion"]:
            return 409, {"message": "the object has been modified"}
        merged: Object = _merged(found, body)
        if merged != found:
            self.objects[path] = merged
            self._stamp(path)
        answer = copy.deepcopy(self.objects[path])
        self._collect()
        return 200, answer

    def _delete(self, path: str) -> tuple[int, Any]:
        if path not in self.objects:
            return 404, {"message": f"{path} not found"}
        self.objects[path]["metadata"]["deletionTimestamp"] = "2027-01-01T00:00:00Z"
        self._stamp(path)
        self._collect()
        return 200, {"status": "Success"}

    def _apply(self, path: str, body: Object, dry_run: bool) -> tuple[int, Any]:
        had = self.objects.get(path)
        wanted = had is None or had.get("spec") != body.get("spec")
        before = (had or {}).get("metadata", {"uid": f"uid-{next(self._numbers)}", "generation": 0})
        metadata = {**before, **body["metadata"], "generation": before["generation"] + int(wanted)}
        applied = {**(had or {}), **copy.deepcopy(body), "metadata": metadata}
        if dry_run:
            return 200, applied
        self.objects[path] = applied
        return (201 if had is None else 200), copy.deepcopy(self._stamp(path) if wanted else applied)

    def _apply_status(self, path: str, body: Object) -> tuple[int, Any]:
        found = self.objects.get(path)
        if found is None:
            return 404, {"message": f"{path} not found"}
        if body["metadata"].get("uid") != found["metadata"]["uid"]:
            return 409, {"message": "it is another object"}
        found["status"] = copy.deepcopy(body["status"])
        return 200, copy.deepcopy(self._stamp(path))

    def _stamp(self, path: str) -> Object:
        version = next(self._numbers)
        self.objects[path]["metadata"]["resourceVersion"] = str(version)
        self._note(version, path, copy.deepcopy(self.objects[path]))
        return self.objects[path]

    def _note(self, version: int, path: str, after: Object | None) -> None:
        self.changes.append(Change(version, path, self._before.get(path), after))
        self._before[path] = after
        self._told.notify_all()

    def _collect(self) -> None:
        """Take away what was deleted and waits for nobody, and what such objects owned."""
        while True:
            alive = {item["metadata"]["uid"] for item in self.objects.values()}
            gone = [
                path
                for path, item in self.objects.items()
                if (item["metadata"].get("deletionTimestamp") and not item["metadata"].get("finalizers"))
                or any(owner["uid"] not in alive for owner in item["metadata"].get("ownerReferences", ()))
            ]
            if not gone:
                return
            for path in gone:
                del self.objects[path]
                self._note(next(self._numbers), path, None)


PLURALS = {
    "pods",
    "models",
    "accesskeys",
    "hardwareprofiles",
    "configmaps",
    "secrets",
    "events",
    "leases",
    "rayclusters",
    "namespaces",
}
"""Last words of the paths that are collections; no object of a test has such a name."""


def _selector(query: dict[str, list[str]], key: str) -> list[tuple[str, str, str]]:
    return [part.partition("=") for part in query.get(key, [""])[0].split(",") if part]


def _field(item: Any, path: str) -> Any:
    for key in path.split("."):
        item = item.get(key, {})
    return item


def _is_in(place: str, path: str) -> bool:
    """Whether an object is of a collection: of its namespace, or of all."""
    parent = place.rsplit("/", 1)[0]
    return path in (parent, re.sub("/namespaces/[^/]+/", "/", parent))


def _labels(value: Object) -> dict[str, str]:
    return value["metadata"].get("labels") or {}


def _has(labels: dict[str, str], wanted: list[tuple[str, str, str]]) -> bool:
    return all(key in labels and (not sign or labels[key] == value) for key, sign, value in wanted)


def _merged(old: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = copy.deepcopy(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merged(result.get(key), value)
    return result


@contextmanager
def served(objects: KubeObjects, kind: type[Api] = KubeApi) -> Iterator[Api]:  # type: ignore[assignment]
    """The objects behind HTTP, and the client of the operator in front of it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # an answer in two packets would wait for the client's acknowledgement

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def _do(self) -> None:
            parts = urlsplit(self.path)
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.loads(raw) if raw else None
            query = parse_qs(parts.query)
            if "watch" in query and not objects.down:
                self._stream(objects.watch(unquote(parts.path), query))
                return
            content = self.headers.get("Content-Type", "")
            status, answer = objects.answer(self.command, unquote(parts.path), query, body, content)
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def _stream(self, events: Iterator[Object]) -> None:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for event in events:
                text = json.dumps(event).encode() + b"\n"
                self.wfile.write(b"%x\r\n%s\r\n" % (len(text), text))
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")

        do_GET = do_POST = do_PATCH = do_DELETE = _do  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    configuration = client.Configuration()
    configuration.host = f"http://127.0.0.1:{server.server_port}"
    configuration.retries = False
    with client.ApiClient(configuration) as api_client:
        try:
            yield kind(api_client)
        finally:
            objects.break_watches()
            api_client.rest_client.pool_manager.clear()
            server.shutdown()
            server.server_close()
            thread.join()


def kubeconfig(api: KubeApi, path: Path, namespace: str = "demo") -> Path:
    """A file that leads to the server, as somebody's kubeconfig does: context `small`, and one that leads nowhere."""
    server = api._client.configuration.host
    clusters = {"small": server, "gone": "http://127.0.0.1:9"}
    value = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": {"server": place}} for name, place in clusters.items()],
        "users": [{"name": "me", "user": {"token": "t"}}],
        "contexts": [
            {"name": name, "context": {"cluster": name, "user": "me", "namespace": namespace}} for name in clusters
        ],
        "current-context": "small",
    }
    path.write_text(json.dumps(value))
    return path
