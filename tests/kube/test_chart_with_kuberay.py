"""The chart with KubeRay in it, with a small chart in the place of KubeRay's, served as a repository serves it."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = [pytest.mark.kube, pytest.mark.timeout(900)]

CHARTS = Path(__file__).parents[2] / "helm"
STAND_IN = {
    "Chart.yaml": "apiVersion: v2\nname: kuberay-operator\nversion: {version}\n",
    "values.yaml": "replicas: 1\n",
    "templates/account.yaml": (
        "apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: kuberay-{{{{ .Values.replicas }}}}}}\n"
    ),
}


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder, and says nothing."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Charts:
    """Copies of the charts, and helm with a home of its own."""

    def __init__(self, helm: Path, folder: Path) -> None:
        self.folder = folder
        self._helm = helm

    def __call__(self, *words: str) -> str:
        environment = {"HOME": str(self.folder / "home"), "PATH": os.environ["PATH"]}
        done = subprocess.run(
            [self._helm, *words], env=environment, cwd=self.folder, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def rendered(self, chart: str, *words: str) -> list[dict[str, Any]]:
        text = self("template", "fastserve", chart, "--namespace", "models", *words)
        found = [item for item in yaml.safe_load_all(text) if item]
        for item in found:
            if item["kind"] == "Secret":  # random each time
                item["data"] = sorted(item["data"])
        return sorted(found, key=lambda item: yaml.safe_dump(item))


@pytest.fixture(scope="module")
def charts(helm: Path, tmp_path_factory: pytest.TempPathFactory) -> Charts:
    """Both charts with their dependencies fetched."""
    folder = tmp_path_factory.mktemp("charts")
    made = Charts(helm, folder)
    for name in ("fastserve", "fastserve-with-kuberay"):
        shutil.copytree(CHARTS / name, folder / name)
    page = folder / "fastserve-with-kuberay/Chart.yaml"
    wanted = yaml.safe_load(page.read_text())
    kuberay = next(item for item in wanted["dependencies"] if item["name"] == "kuberay-operator")
    for name, text in STAND_IN.items():
        file = folder / "kuberay-operator" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.format(version=kuberay["version"]))
    made("package", "kuberay-operator", "--destination", "repository")
    made("repo", "index", "repository")
    handler = functools.partial(Quiet, directory=str(folder / "repository"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        kuberay["repository"] = f"http://127.0.0.1:{server.server_address[1]}"
        page.write_text(yaml.safe_dump(wanted))
        made("dependency", "update", "fastserve-with-kuberay")
        server.shutdown()
    return made


def test_it_is_fastserve_and_kuberay(charts: Charts) -> None:
    alone = charts.rendered("fastserve")
    both = charts.rendered("fastserve-with-kuberay", "--set", "kuberay-operator.replicas=3")
    added = [item for item in both if item not in alone]
    assert [(item["kind"], item["metadata"]["name"]) for item in added] == [("ServiceAccount", "kuberay-3")]
    assert len(both) == len(alone) + 1


def test_kuberay_can_be_left_out(charts: Charts) -> None:
    off = ("--set", "kuberay.enabled=false")
    assert charts.rendered("fastserve-with-kuberay", *off) == charts.rendered("fastserve")


def test_the_definitions_come_along(charts: Charts) -> None:
    words = ("--namespace", "models", "--include-crds")
    text = charts("template", "fastserve", "fastserve-with-kuberay", *words)
    kinds = [
        item["spec"]["names"]["kind"] for item in yaml.safe_load_all(text) if item and "Definition" in item["kind"]
    ]
    assert sorted(kinds) == ["AccessKey", "HardwareProfile", "Model"]


def test_its_version_is_the_charts(charts: Charts) -> None:
    ours, both = (
        yaml.safe_load((CHARTS / name / "Chart.yaml").read_text()) for name in ("fastserve", "fastserve-with-kuberay")
    )
    (wanted,) = (item["version"] for item in both["dependencies"] if item["name"] == "fastserve")
    assert {ours["version"], wanted} == {both["version"]}
    assert (ours["appVersion"], ours["kubeVersion"]) == (both["appVersion"], both["kubeVersion"])


def test_an_unknown_value_is_refused_here_too(charts: Charts) -> None:
    with pytest.raises(AssertionError, match="'foreign' not allowed"):
        charts.rendered("fastserve-with-kuberay", "--set", "fastserve.ray.foreign=1")
