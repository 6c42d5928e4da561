"""One whole cluster for the tests of this folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator

import pytest
from images import Image, lacks, operator_image, ray_image
from kubernetes_binaries import Binaries, present_node
from node import CGROUPS, leftovers
from whole_cluster import WholeCluster, whole_cluster

INSTEAD = (
    "To try FastServe on an existing cluster, install the chart there (docs/guides/kubernetes.md); "
    "FASTSERVE_TEST_KUBECONFIG names one for `make test-kube`"
)


@pytest.fixture(scope="session")
def binaries(missing: Callable[[str], None]) -> Binaries:
    """The programs of a node, where this machine can run one."""
    if os.geteuid() != 0:
        missing(f"needs root, to make namespaces and cgroups. {INSTEAD}")
    if not (CGROUPS / "memory").is_dir():
        missing(f"needs cgroups of version 1 under {CGROUPS}; others were not tried. {INSTEAD}")
    found = present_node()
    if found is None:
        missing(f"needs a node's programs: `python tests/kube/kubernetes_binaries.py node` builds them. {INSTEAD}")
    assert found is not None
    return found


@pytest.fixture(scope="module")
def cluster(binaries: Binaries) -> Iterator[WholeCluster]:
    """A cluster of one node; it must leave nothing."""
    with whole_cluster(binaries, str(shutil.which("go"))) as made:
        yield made
    assert leftovers(made.folder.name) == []


@pytest.fixture(scope="session")
def pod_images(missing: Callable[[str], None], tmp_path_factory: pytest.TempPathFactory) -> list[Image]:
    """The images of FastServe's pods."""
    lacking = lacks()
    if lacking is not None:
        missing(f"{lacking}. {INSTEAD}")
    folder = tmp_path_factory.mktemp("images")
    return [operator_image(folder), ray_image(folder)]
