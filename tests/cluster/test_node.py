"""A cluster leaves nothing on its machine, also when nobody could stop it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kubernetes_binaries import Binaries
from node import FOLDER, leftovers, take_away_leftovers
from process_one import KERNEL

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

OWNER = """
import shutil, sys, time
from kubernetes_binaries import present_node
from whole_cluster import whole_cluster
with whole_cluster(present_node(), shutil.which("go")) as cluster:
    cluster.add_node(1)
    sys.stdout.write(cluster.folder.name + "\\n")
    sys.stdout.flush()
    time.sleep(600)
"""
END_SECONDS = 60


def kernel() -> dict[str, str]:
    return {name: Path("/proc/sys", name).read_text() for name in KERNEL}


def test_a_cluster_whose_owner_is_killed_ends_and_is_taken_away(binaries: Binaries) -> None:
    before = kernel()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    owner = subprocess.Popen([sys.executable, "-c", OWNER], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        name = owner.stdout.readline().strip()
        assert name.startswith(FOLDER)
        assert any(item.startswith("process") for item in leftovers(name))
    finally:
        owner.kill()
        owner.communicate()
    end = time.monotonic() + END_SECONDS
    while [item for item in leftovers(name) if item.startswith("process")]:
        assert time.monotonic() < end, leftovers(name)
        time.sleep(0.1)
    while leftovers(name):  # a cgroup is busy for a moment after its last process
        take_away_leftovers()
        assert time.monotonic() < end, leftovers(name)
        time.sleep(0.1)
    assert kernel() == before
