"""One cluster for all tests of this folder, and a namespace for each of them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from control_plane import Cluster, ControlPlane, control_plane, existing_cluster
from kubernetes_binaries import EXISTING, HOW, WHAT_TO_DO, kuberay, present, present_helm

from fastserve.spec.crd import crds

CRDS = Path(__file__).parents[2] / "helm/fastserve/crds"


@pytest.fixture(scope="session")
def cluster(missing: Callable[[str], None], require: Callable[[str], str]) -> Iterator[Cluster]:
    """A cluster to test on: the one that FASTSERVE_TEST_KUBECONFIG names, or a control plane of our own."""
    named = os.environ.get(EXISTING)
    if named:
        with existing_cluster(Path(named), require("kubectl")) as found:
            yield found
        return
    binaries = present()
    if binaries is None:
        missing(f"needs {WHAT_TO_DO}")
    else:
        with control_plane(binaries) as made:
            yield made


@pytest.fixture(scope="session")
def own_cluster(cluster: Cluster, missing: Callable[[str], None]) -> ControlPlane:
    """A cluster whose parts may be stopped."""
    if not isinstance(cluster, ControlPlane):
        missing("needs a control plane of its own, to stop parts of it")
    assert isinstance(cluster, ControlPlane)
    return cluster


@pytest.fixture(scope="session")
def definitions(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with our kinds. Of a cluster that has them already nothing is changed: its models are somebody's."""
    names = [crd["metadata"]["name"] for crd in crds().values()]
    there = cluster.kubectl("get", "crd", "--ignore-not-found", "-o", "name", *names).stdout.split()
    assert not there, f"the cluster has {', '.join(there)} already; name another one"
    cluster.kubectl("apply", "-f", str(CRDS))
    cluster.established(*names)
    yield cluster
    if not isinstance(cluster, ControlPlane):
        names_of = "jsonpath={range .items[*]}{.metadata.namespace} {.metadata.name} {end}"
        words = cluster.kubectl("get", "models", "-A", "-o", names_of).stdout.split()
        for place, name in zip(words[::2], words[1::2], strict=True):  # whose operator ended before it let them go
            without = '{"metadata":{"finalizers":null}}'
            cluster.kubectl("-n", place, "patch", "model", name, "--type=merge", "-p", without, check=False)
        cluster.kubectl("delete", "crd", "--timeout=300s", *names)


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace of this test alone."""
    with cluster.a_namespace() as name:
        yield name


@pytest.fixture(scope="session")
def helm(missing: Callable[[str], None]) -> Path:
    """Helm's program."""
    found = present_helm()
    if found is None:
        missing(f"needs helm. {HOW}")
    return Path(str(found))


@pytest.fixture(scope="session")
def ray_definitions(definitions: Cluster, require: Callable[[str], str]) -> Iterator[Cluster]:
    """The cluster with KubeRay's RayCluster as well; they are too large for client-side apply."""
    name = "rayclusters.ray.io"
    there = definitions.kubectl("get", "crd", "--ignore-not-found", "-o", "name", name).stdout
    if not there:
        file = kuberay(require("go")) / "ray.io_rayclusters.yaml"
        definitions.kubectl("apply", "--server-side", "-f", str(file))
        definitions.established(name)
    yield definitions
    if not there and not isinstance(definitions, ControlPlane):
        definitions.kubectl("delete", "crd", "--timeout=300s", name)


@pytest.fixture
def operator_kubeconfig(definitions: Cluster, namespace: str, helm: Path) -> Iterator[Path]:
    """A kubeconfig with the rights that the chart gives its operator in the namespace of this test, and no others."""
    words = ["template", "fastserve", str(CRDS.parent), "--namespace", namespace]
    for template in ("rights", "operator"):
        words += ["--show-only", f"templates/{template}.yaml"]
    done = subprocess.run([helm, *words], env=definitions.environment, capture_output=True, text=True, check=True)
    kinds = ("ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")
    wanted = [item for item in yaml.safe_load_all(done.stdout) if item and item["kind"] in kinds]
    text = yaml.safe_dump_all(wanted)
    definitions.kubectl("apply", "-f", "-", text=text)
    yield definitions.as_account(namespace, "fastserve-operator")
    definitions.kubectl("delete", "--ignore-not-found", "--wait=false", "-f", "-", text=text)
