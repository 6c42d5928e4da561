"""The same tests on a folder, on moto, and (tier `s3`) on a real S3-compatible server."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import s3_servers

import fastserve
from fastserve.artifacts.store import Store
from fastserve.artifacts.stores import open_store
from fastserve.plan.stages import Stage, StageRequest

KEY = "ab" * 32
PLATFORM = Path(fastserve.__file__).parents[1]


@dataclass
class Place:
    """Where a store is, for this process and for others."""

    uri: str
    environment: dict[str, str] = field(default_factory=dict)

    def open(self) -> Store:
        return open_store(self.uri)

    def start(self, code: str, *arguments: str) -> subprocess.Popen[str]:
        """Another Python process with `code`; sys.argv[1] is the store's address."""
        environment = {**os.environ, **self.environment, "PYTHONPATH": str(PLATFORM)}
        return subprocess.Popen(
            [sys.executable, "-c", code, self.uri, *arguments],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture(scope="session")
def moto() -> Iterator[s3_servers.S3Server]:
    with s3_servers.moto_server() as server:
        yield server


@pytest.fixture(scope="session")
def versitygw(require: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3_servers.S3Server]:
    binary = s3_servers.build_versitygw(require("go"))
    folder = tmp_path_factory.mktemp("versitygw")
    with s3_servers.versitygw(binary, folder / "root", folder / "log") as server:
        yield server


@pytest.fixture(params=["folder", "moto", pytest.param("versitygw", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A new, empty store of each kind."""
    if request.param == "folder":
        return Place(str(tmp_path / "store"))
    server: s3_servers.S3Server = request.getfixturevalue(request.param)
    return bucket_at(server, monkeypatch)


@pytest.fixture(params=["moto", pytest.param("versitygw", marks=pytest.mark.s3)])
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A new, empty store of each kind that is a bucket."""
    return bucket_at(request.getfixturevalue(request.param), monkeypatch)


@pytest.fixture
def store(place: Place) -> Store:
    return place.open()


def bucket_at(server: s3_servers.S3Server, monkeypatch: pytest.MonkeyPatch) -> Place:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return Place(server.make_bucket(f"b{secrets.token_hex(8)}"), server.environment)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[s3_servers.S3Server], Place]:
    """A new bucket at a server of the test's own."""
    return lambda server: bucket_at(server, monkeypatch)


@pytest.fixture
def asked() -> Callable[..., StageRequest]:
    def make(attempt: int = 1, key: str = KEY, **more: Any) -> StageRequest:
        return StageRequest("assistant", Stage.TRAIN, key, attempt, {"method": "lora"}, **more)

    return make


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """A folder as a stage leaves it: `made(path=bytes, ...)` with `__` for `/`."""

    def make(files: dict[str, bytes] | None = None) -> Path:
        folder = tmp_path / f"made-{secrets.token_hex(4)}"
        for name, data in (files or {"model/config.json": b"{}", "model/weights.bin": b"\x00\x01" * 5000}).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return folder

    return make
