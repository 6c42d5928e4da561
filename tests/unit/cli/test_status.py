"""`fastserve status` of a model that was trained and is up no longer: what it made can still be looked at."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from fastserve.artifacts import attempts
from fastserve.artifacts.stores import open_store
from fastserve.cli import render
from fastserve.cli.main import run
from fastserve.cluster.home import Home
from fastserve.plan.keys import request_for, stage_keys
from fastserve.plan.stages import Stage
from fastserve.spec.load import read
from fastserve.spec.model import Model

MANIFEST = """
apiVersion: fastserve.dev/v1alpha1
kind: Model
metadata: {name: book}
spec:
  source: hf://a/b
  train: {dataset: hf://a/rows, steps: 2}
"""
DIGESTS = {"hf://a/b": "1" * 64, "hf://a/rows": "2" * 64}
METRICS = {
    "firstLoss": 5.0,
    "finalLoss": 4.0,
    "workers": 1,
    "rows": {"read": 9, "used": 7, "leftOut": {"too long": 2}},
    "sharing": {"workers": [{"rank": 0, "profile": "local", "batchShare": 1.0, "stateShare": 1.0}], "replans": 0},
}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home in which a model was trained, and ended."""
    home = Home(tmp_path / "home")
    home.create()
    (model,) = read(MANIFEST)
    assert isinstance(model, Model)
    home.want(model, DIGESTS, {})
    store = open_store(home.store_uri)
    for stage in stage_keys(model, DIGESTS):
        request = request_for(model, stage, DIGESTS, 1)
        attempts.claim(store, request)
        folder = tmp_path / stage.value
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        if stage is Stage.TRAIN:
            (folder / "curve.jsonl").write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "loss": 4.0}\n')
        attempts.commit(store, request, folder, METRICS if stage is Stage.TRAIN else {}, {})
    home.unwant("book")
    return home


Fastserve = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fastserve() -> Iterator[Fastserve]:
    """Runs the command line in this process: its exit code, stdout and stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            render.out.file, render.err.file = out, err
            code = run(list(arguments))
        return code, out.getvalue(), err.getvalue()

    yield call
    render.out.file, render.err.file = sys.stdout, sys.stderr


def test_it_shows_how_the_training_went(home: Home, fastserve: Fastserve) -> None:
    code, shown, _ = fastserve("status", "book", "--home", str(home.path))
    assert code == 0
    for words in (
        "NotUp",
        "committed",
        "PROFILE",
        "local",
        "4 at the last step, 5 at the first",
        "2 left out (too long)",
    ):
        assert words in shown
    assert "book is not up; what it made is kept" in shown


def test_its_loss_is_drawn_in_plain_text(home: Home, fastserve: Fastserve) -> None:
    code, shown, _ = fastserve("status", "book", "--plot", "--home", str(home.path))
    assert code == 0
    assert "loss of book" in shown
    assert "nats a token" in shown
    assert "\x1b" not in shown


def test_machines_get_the_curve_and_the_metrics_as_they_are(home: Home, fastserve: Fastserve) -> None:
    code, shown, _ = fastserve("status", "book", "--plot", "-o", "json", "--home", str(home.path))
    assert code == 0
    found = json.loads(shown)
    assert found["curve"] == [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}]
    assert found["stages"]["train"]["metrics"] == METRICS
    assert found["conditions"][0]["reason"] == "NotUp"


def test_why_says_that_it_is_not_up(home: Home, fastserve: Fastserve) -> None:
    code, shown, _ = fastserve("why", "book", "--home", str(home.path))
    assert code == 0
    assert shown.startswith("book is not up")


def test_all_models_are_those_that_are_up(home: Home, fastserve: Fastserve) -> None:
    code, shown, _ = fastserve("status", "-o", "json", "--home", str(home.path))
    assert (code, json.loads(shown)) == (0, [])
    code, _, error = fastserve("status", "--plot", "--home", str(home.path))
    assert code == 2
    assert "name it" in error
