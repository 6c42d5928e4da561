"""The end of a home's run takes away what killed processes had half done, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastserve.artifacts import attempts
from fastserve.cluster.home import Home
from fastserve.cluster.local import LocalCluster
from fastserve.cluster.ray_head import RayHead
from fastserve.plan.stages import Stage, StageRequest
from fastserve.spec.load import read
from fastserve.spec.model import Model

MODEL = "apiVersion: fastserve.dev/v1alpha1\nkind: Model\nmetadata: {name: chat}\nspec: {source: hf://a/b, serve: {}}"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    found = Home(tmp_path / "home")
    found.create()
    return found


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name.startswith(".")]


def test_what_killed_writers_left_is_taken_away(home: Home) -> None:
    model = read(MODEL)[0]
    assert isinstance(model, Model)
    home.want(model, {}, {})
    cluster = LocalCluster(home)
    assert attempts.claim(cluster.store, StageRequest("chat", Stage.SOURCE, "a" * 64, 1, {}))
    claimed = home.path / "store" / "artifacts" / "source" / ("a" * 64) / "attempts" / "1"
    (claimed / ".fastserve-1-0a.tmp").write_text("{")
    (home.path / "models" / "chat" / f".new-{2**22 - 3}-0a").write_text("{")
    cluster.stop()
    assert hidden(home.path) == []
    assert (claimed / "request.json").exists()
    assert home.ended("chat") == model


def test_a_store_of_others_is_left_to_them(home: Home, tmp_path: Path) -> None:
    store = tmp_path / "shared"
    home.set_store(str(store))
    cluster = LocalCluster(home)
    assert attempts.claim(cluster.store, StageRequest("chat", Stage.SOURCE, "a" * 64, 1, {}))
    (store / "artifacts" / ".fastserve-1-0a.tmp").write_text("{")
    cluster.stop()
    assert len(hidden(store)) == 1


def test_a_scratch_folder_that_nobody_noted_is_found(home: Home, tmp_path: Path) -> None:
    """As after SIGKILL between the making of the folder and the note of it."""
    other = Home(tmp_path / "other")
    folders = [Path(f"/tmp/fastserve-{each.id[:8]}-unnoted") for each in (home, other)]
    try:
        for folder in folders:
            folder.mkdir()
        RayHead(home.path).stop()
        assert [folder.exists() for folder in folders] == [False, True]
    finally:
        RayHead(other.path).stop()
    assert not folders[1].exists()
