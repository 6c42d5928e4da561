"""The way of an object into the API server, and back into the reader; cases come from the definitions' unit tests."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
from control_plane import Cluster

from fastserve.spec.crd import crds
from fastserve.spec.load import Manifest, read
from fastserve.spec.model import API_VERSION

ROOT = Path(__file__).parents[2]
PLURALS = {crd["spec"]["names"]["kind"]: plural for plural, crd in crds().items()}


def beside(name: str) -> ModuleType:
    """A test file of tests/unit/spec, for its cases and strategies."""
    place = ROOT / f"tests/unit/spec/{name}.py"
    spec = importlib.util.spec_from_file_location(f"cases_of_{name}_for_kube", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


UNIT = beside("test_crd")


class Answer:
    """What the API server said to an object."""

    def __init__(self, response: httpx.Response) -> None:
        self.body: Any = response.json()
        self.taken = response.is_success
        self.warnings = response.headers.get_list("warning")
        self.causes = [] if self.taken else self.body.get("details", {}).get("causes", [])

    @property
    def words(self) -> str:
        return "" if self.taken else str(self.body["message"])

    def at(self, path: str) -> list[str]:
        """What is said of one key, without the server's `Invalid value:` before a rule's own words."""
        said = [cause["message"] for cause in self.causes if cause.get("field", "") == path]
        return [words.removeprefix("Invalid value: ") for words in said]


class Door:
    """Sends objects to the API server as `kubectl apply` does: unknown fields are refused. Nothing is kept unless
    `keep` is set."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster = cluster
        self.namespace = namespace

    def path(self, kind: str, name: str = "") -> str:
        place = "" if kind == "HardwareProfile" else f"/namespaces/{self.namespace}"
        return f"/apis/{API_VERSION}{place}/{PLURALS[kind]}{name and f'/{name}'}"

    def send(self, manifest: dict[str, Any], keep: bool = False, strict: bool = True) -> Answer:
        parameters = {"fieldValidation": "Strict" if strict else "Ignore"}
        if not keep:
            parameters["dryRun"] = "All"
        return Answer(self.cluster.api.post(self.path(manifest["kind"]), params=parameters, json=manifest))

    def stored(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """The object as the server has it, without what the server alone writes in metadata."""
        answer = self.send(manifest)
        assert answer.taken, answer.words
        kept: dict[str, Any] = {**answer.body, "metadata": manifest["metadata"]}
        return kept


def model(text: str) -> dict[str, Any]:
    """A Model with that spec, as kubectl sends it."""
    manifest: dict[str, Any] = UNIT.spec(text)
    return manifest


def read_one(stored: dict[str, Any]) -> Manifest:
    """An object of the server as FastServe reads it, without the namespace that the server put it into."""
    metadata = {key: value for key, value in stored["metadata"].items() if key != "namespace"}
    (found,) = read(json.dumps({**stored, "metadata": metadata}))
    return found
