"""Which applications a home's revisions shall have: one that cannot be made takes no other with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastserve.artifacts.store import Store
from fastserve.artifacts.stores import open_store
from fastserve.cluster.fleet import Fleet
from fastserve.cluster.home import Home
from fastserve.cluster.nodes import Machine
from fastserve.cluster.placements import Ground
from fastserve.cluster.ray_serve import AppStatus, app_name
from fastserve.plan.facts import Hardware
from fastserve.plan.revision import Revision
from fastserve.plan.stages import Stage
from fastserve.spec.hardware import HardwareProfileSpec
from fastserve.spec.model import Model

LAPTOP = Hardware(cpus=2, memory_bytes=8 * 2**30)
REVISION = Revision("chat", Stage.SOURCE, "k" * 64, "d" * 64, {})
NODES = [Machine("local", 64, 0), Machine("big", 8, 0)]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    found = Home(tmp_path / "home")
    found.create()
    model = Model.model_validate(
        {
            "apiVersion": "fastserve.dev/v1alpha1",
            "kind": "Model",
            "metadata": {"name": "chat"},
            "spec": {
                "source": "file:///m",
                "serve": {"profiles": ["big", "local"], "replicas": {"min": 1, "max": 2}},
            },
        }
    )
    found.want(model, {}, {})
    return found


@pytest.fixture
def store(home: Home) -> Store:
    return open_store(home.store_uri)


def deployed(profile: str, state: str) -> tuple[str, AppStatus]:
    name = app_name("chat", REVISION.digest, profile)
    return name, AppStatus(name, state, replicas=1, config={"name": name, "as": "it was put"})


def test_one_whose_artifact_is_gone_stays_as_it_is_and_says_so_once(home: Home, store: Store) -> None:
    said: list[str] = []
    fleet = Fleet(home, store, said.append)
    assert fleet.apps(REVISION, Ground(NODES, LAPTOP, {}, {})) == []
    name, status = deployed("big", "RUNNING")
    for _ in range(2):
        assert fleet.apps(REVISION, Ground(NODES, LAPTOP, {name: status}, {})) == [status.config]
    assert len(said) == 1
    assert said[0].startswith(f"Revision {REVISION.short} of chat stays as it is: the source artifact")


def test_one_that_another_version_wrote_stays_as_it_is(home: Home, store: Store) -> None:
    said: list[str] = []
    fleet = Fleet(home, store, said.append)
    theirs = replace(REVISION, serve={"engine": {"tomorrow": 1}})
    name = app_name("chat", theirs.digest, "big")
    status = AppStatus(name, "RUNNING", replicas=1, config={"name": name, "as": "it was put"})
    assert fleet.apps(theirs, Ground(NODES, LAPTOP, {name: status}, {})) == [status.config]
    assert "tomorrow" in said[0]


def test_bounds_follow_the_manifest_the_profiles_and_the_share_of_the_revision(home: Home, store: Store) -> None:
    fleet = Fleet(home, store, lambda _: None)
    found = fleet.bounds(REVISION, Ground(NODES, LAPTOP, {}, {}))
    assert [(item.profile, item.least, item.most) for item in found] == [("big", 1, 1), ("local", 0, 0)]
    home.set_profiles("chat", {"big": HardwareProfileSpec.model_validate({"cpus": 8, "memory": "8GiB", "spot": True})})
    found = fleet.bounds(REVISION, Ground(NODES, LAPTOP, {}, {}))
    assert {item.profile: item.least for item in found} == {"big": 0, "local": 1}, "the least is kept off spot"


def test_an_engine_that_did_not_come_up_keeps_its_configuration_so_that_it_is_not_tried_again(
    home: Home, store: Store
) -> None:
    fleet = Fleet(home, store, lambda _: None)
    failed = dict([deployed("big", "DEPLOY_FAILED"), deployed("local", "DEPLOY_FAILED")])
    found = fleet.apps(REVISION, Ground(NODES, LAPTOP, failed, {}))
    assert found == [status.config for status in failed.values()]


def test_profiles_of_a_model_are_kept_beside_it(home: Home) -> None:
    spec = HardwareProfileSpec.model_validate({"cpus": 8, "memory": "8GiB", "pricePerHour": 1.5})
    assert home.profiles("chat") == {}
    home.set_profiles("chat", {"big": spec})
    assert home.profiles("chat") == {"big": spec}
