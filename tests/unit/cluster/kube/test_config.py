"""Kubeconfigs as people have them: several files, no context, nonsense, none at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from kube_objects import KubeObjects, kubeconfig, served

from fastserve.cluster.kube import config as kube_config
from fastserve.cluster.kube.api import MODELS
from fastserve.cluster.kube.config import nearest, reach
from fastserve.errors import UsageInvalid


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    with served(KubeObjects()) as api:
        return kubeconfig(api, tmp_path / "one", "models")


def test_it_is_found_as_kubectl_finds_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reach(file, None, None).context == "small"
    monkeypatch.setenv("KUBECONFIG", str(file))
    assert reach(None, None, None).namespace == "models"
    assert reach(None, None, "other").namespace == "other"
    assert reach(None, "gone", None).kubectl_flags == ["--context", "gone", "-n", "models"]
    monkeypatch.delenv("KUBECONFIG")
    (file.parent / ".kube").mkdir()
    file.rename(file.parent / ".kube" / "config")
    assert reach(None, None, None).context == "small"


def test_several_files_are_one(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = json.loads(file.read_text())
    del value["current-context"]
    value["contexts"] = [{"name": "prod", "context": {"cluster": "small", "user": "me"}}]
    second = file.with_name("two")
    second.write_text(json.dumps(value))
    monkeypatch.setenv("KUBECONFIG", f"{second}{os.pathsep}{file}{os.pathsep}{file.with_name('absent')}")
    assert reach(None, None, None).context == "small"
    found = reach(None, "prod", None)
    assert (found.context, found.namespace) == ("prod", "default")
    with pytest.raises(UsageInvalid, match=r"names no current context.*prod"):
        reach(second, None, None)


@pytest.mark.parametrize("text", ["{{{", "", "- a", "contexts: 3", "contexts: [{}]", "contexts: [{name: a}]\nusers: 3"])
def test_what_is_no_kubeconfig_is_said_so(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(UsageInvalid) as caught:
        reach(file, "a", None)
    assert str(file) in str(caught.value)


def test_a_context_of_a_cluster_that_is_not_there(file: Path) -> None:
    value = json.loads(file.read_text())
    value["clusters"] = []
    file.write_text(json.dumps(value))
    with pytest.raises(UsageInvalid, match=r"context small.*mend the kubeconfig"):
        reach(file, None, None)


def test_in_a_pod_it_is_the_service_account(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    account = tmp_path / "account"
    account.mkdir()
    monkeypatch.setattr(kube_config, "ACCOUNT", account)
    with pytest.raises(UsageInvalid, match="there is no kubeconfig"):
        reach(None, None, None)
    (account / "token").write_text("t")
    (account / "namespace").write_text("models\n")
    monkeypatch.setattr(
        kube_config.config, "load_incluster_config", lambda client_configuration: None
    )  # it reads fixed paths
    found = reach(None, None, None)
    assert (found.namespace, found.context, found.kubectl_flags) == ("models", None, ["-n", "models"])
    with pytest.raises(UsageInvalid, match="there is no kubeconfig"):
        reach(None, "prod", None)


def test_the_server_that_it_names_is_asked(tmp_path: Path) -> None:
    objects = KubeObjects()
    objects.put("/apis/fastserve.dev/v1alpha1/namespaces/models/models/a", {"metadata": {"name": "a"}})
    with served(objects) as api:
        found = reach(kubeconfig(api, tmp_path / "file", "models"), None, None)
        assert [item["metadata"]["name"] for item in found.api.list(MODELS, found.namespace)] == ["a"]


def test_names_that_are_like_it_come_first() -> None:
    assert nearest("chta", ["chat", "chart", "zzz"]) == "did you mean chat or chart?"
    assert nearest("q", ["b", "a"]) == "there are: a, b"
    assert nearest("q", []) == "there is none at all"
