"""Helm as the tests of the chart run it, and what they write values with."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm/fastserve"


class Helm:
    """helm, with a cluster or without."""

    def __init__(self, program: Path, environment: dict[str, str]) -> None:
        self._program = program
        self._environment = environment

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._program, *words], env=self._environment, capture_output=True, text=True, timeout=120
        )

    def done(self, *words: str) -> str:
        result = self(*words)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def rendered(self, *words: str) -> str:
        return self.done("template", "fastserve", str(CHART), "--namespace", "models", *words)


def objects(text: str) -> list[dict[str, Any]]:
    """Every object of a rendered chart, and the RayCluster that the operator makes from its template."""
    found = [document for document in yaml.safe_load_all(text) if document]
    texts = [item["data"] for item in found if item["kind"] == "ConfigMap"]
    templates = [text["raycluster.json"] for text in texts if "raycluster.json" in text]
    return found + [named(json.loads(template)) for template in templates]


def without_secrets(text: str) -> str:
    """A rendered chart without what it draws by chance, another value each time."""
    return re.sub(r"^  (auth_token|token|sha256): \S+$", "", text, flags=re.MULTILINE)


def named(template: dict[str, Any]) -> dict[str, Any]:
    """A RayCluster of the chart's template."""
    return {**template, "metadata": {**template["metadata"], "name": "fastserve-abcdef"}}


def setting(values: dict[str, Any]) -> list[str]:
    return [word for path, value in values.items() for word in ("--set-json", f"{path}={json.dumps(value)}")]
