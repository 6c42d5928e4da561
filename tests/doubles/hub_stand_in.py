"""A small hub on loopback: the paths that the hub's client library asks for, and a log of who asked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """One model or data set; each commit is a whole set of files."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    """Who does not send it is told that there is no such repository, as the real hub does."""

    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Make a commit and move the branch to it; returns its 40 digits."""
        content = repr((len(self.commits), sorted(files.items()))).encode()
        name = hashlib.sha1(content, usedforsecurity=False).hexdigest()
        self.commits[name] = dict(files)
        self.branches[branch] = name
        return name


@dataclass(frozen=True)
class Asked:
    """One request."""

    method: str
    path: str
    authorization: str | None
    range: str | None


class Hub:
    """Repositories by name (`datasets/` before a data set's), and every request so far."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.asked: list[Asked] = []
        self.endpoint = ""
        self.with_sizes = True

    def repository(self, name: str, **more: object) -> Repository:
        """A new, empty repository."""
        self.repositories[name] = Repository(**more)  # type: ignore[arg-type]
        return self.repositories[name]

    def authorizations(self) -> set[str | None]:
        """Every value of the header that was seen, None for its absence."""
        return {asked.authorization for asked in self.asked}

    def downloads(self) -> list[str]:
        """Paths of files whose bytes were asked for."""
        return [
            asked.path.split("/", 5)[-1] for asked in self.asked if asked.method == "GET" and "/resolve/" in asked.path
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.asked.append(Asked(self.command, "/" + path, self.headers["Authorization"], self.headers["Range"]))
        if path.startswith("api/"):
            self._describe(path.removeprefix("api/").removeprefix("models/"))
        elif "/resolve/" in path:
            self._file(path)
        else:
            self._refuse(404, "EntryNotFound")

    def _describe(self, path: str) -> None:
        name, _, revision = path.partition("/revision/")
        repository = self._allowed(name)
        if repository is None:
            return
        commit = repository.branches.get(revision or "main", revision)
        if commit not in repository.commits:
            self._refuse(404, "RevisionNotFound")
            return
        siblings = [_sibling(file, data, self.hub.with_sizes) for file, data in repository.commits[commit].items()]
        self._send(
            200, json.dumps({"id": name.removeprefix("datasets/"), "sha": commit, "siblings": siblings}).encode()
        )

    def _file(self, path: str) -> None:
        name, _, rest = path.partition("/resolve/")
        commit, _, file = rest.partition("/")
        repository = self._allowed(name)
        if repository is None:
            return
        data = repository.commits.get(commit, {}).get(file)
        if data is None:
            self._refuse(404, "EntryNotFound")
            return
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(file, data)}"', "Accept-Ranges": "bytes"}
        wanted = self.headers["Range"]
        if wanted and wanted.startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            data = data[int(first) : int(last) + 1 if last else None]
            self._send(206, data, headers)
        else:
            self._send(200, data, headers)

    def _allowed(self, name: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.token and self.headers["Authorization"] != f"Bearer {repository.token}"):
            self._refuse(401, "RepoNotFound")
            return None
        if repository.gated:
            self._refuse(403, "GatedRepo")
            return None
        return repository

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b'{"error": "no"}', {"X-Error-Code": code})

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(data)


def _is_large(file: str) -> bool:
    return file.endswith((".safetensors", ".gguf", ".bin", ".parquet"))


def _etag(file: str, data: bytes) -> str:
    if _is_large(file):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _sibling(file: str, data: bytes, with_sizes: bool) -> dict[str, object]:
    if not with_sizes:
        return {"rfilename": file}
    found: dict[str, object] = {"rfilename": file, "size": len(data), "blobId": _etag("", data)}
    if _is_large(file):
        found["lfs"] = {"sha256": _etag(file, data), "size": len(data), "pointerSize": 130, "oid": _etag(file, data)}
    return found


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    """A hub on a free port of loopback; `endpoint` is for HF_ENDPOINT."""
    made = Hub()
    handler = type("Handler", (_Handler,), {"hub": made})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    made.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
