"""`fastserve rollback`: which revision is meant, before, during and after a rollout."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from fastserve.artifacts import attempts
from fastserve.artifacts.stores import open_store
from fastserve.cli import render
from fastserve.cli.main import run
from fastserve.cluster.home import Home
from fastserve.cluster.local import LocalCluster
from fastserve.plan.keys import request_for, stage_keys
from fastserve.plan.observed import Pin
from fastserve.plan.pipeline import wanted_revision
from fastserve.plan.revision import Revision
from fastserve.plan.stages import Stage
from fastserve.spec.load import read
from fastserve.spec.model import Model

DIGESTS = {"hf://a/b": "1" * 64}
HEAD = "apiVersion: fastserve.dev/v1alpha1\nkind: Model\nmetadata: {name: chat}\n"
FIRST, SECOND = (Revision("chat", Stage.SOURCE, key, "bytes", {}) for key in ("first", "second"))


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """A home in which a model with steps is wanted, and somebody tends it: all traffic goes where the pin points."""
    home = Home(tmp_path / "home")
    home.create()
    (model,) = read(HEAD + "spec: {source: hf://a/b, serve: {rollout: {steps: [5, 100]}}}")
    assert isinstance(model, Model)
    home.want(model, DIGESTS, {})
    request = request_for(model, Stage.SOURCE, DIGESTS, 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    store = open_store(home.store_uri)
    attempts.claim(store, request)
    attempts.commit(store, request, tmp_path / "out", {}, {})
    over = threading.Event()

    def tend() -> None:
        while not over.is_set():
            pin = home.pin("chat")
            if pin is not None:
                home.set_weights("chat", {pin.revision: 100})
            time.sleep(0.02)

    thread = threading.Thread(target=tend)
    thread.start()
    with home.tended(detached=True):
        yield home
    over.set()
    thread.join()


def wanted_of(home: Home) -> Revision:
    beat = LocalCluster(home).look("chat")
    found = wanted_revision(beat.model, beat.observed, stage_keys(beat.model, beat.observed.digests))
    assert found is not None
    return found


Rollback = Callable[..., tuple[int, str]]


@pytest.fixture
def rollback(home: Home) -> Iterator[Rollback]:
    """Runs the command in this process: its exit code, and all that it said."""

    def call(*arguments: str) -> tuple[int, str]:
        out = io.StringIO()
        with redirect_stdout(out), redirect_stderr(out):
            render.out.file = render.err.file = out
            code = run(["rollback", "chat", *arguments, "--home", str(home.path)])
        return code, out.getvalue()

    yield call
    render.out.file, render.err.file = sys.stdout, sys.stderr


def test_during_a_step_it_is_the_revision_that_was_to_be_replaced(home: Home, rollback: Rollback) -> None:
    new = wanted_of(home)
    for at, revision in enumerate((SECOND, FIRST, new)):  # the old one was made before the one that is older
        home.keep_revision(revision, at)
    home.set_weights("chat", {SECOND.digest: 100})
    home.set_weights("chat", {SECOND.digest: 5, new.digest: 95})
    code, said = rollback()
    assert code == 0, said
    assert home.pin("chat") == Pin(SECOND.digest, new.digest)
    assert home.weights("chat") == {SECOND.digest: 100}


def test_afterwards_it_is_the_one_before(home: Home, rollback: Rollback) -> None:
    new = wanted_of(home)
    for at, revision in enumerate((FIRST, SECOND, new)):
        home.keep_revision(revision, at)
    home.set_weights("chat", {new.digest: 100})
    assert rollback()[0] == 0
    assert home.weights("chat") == {SECOND.digest: 100}
    assert rollback()[0] == 0
    assert home.weights("chat") == {FIRST.digest: 100}
    code, said = rollback()
    assert (code, "has no revision before" in said) == (2, True)


def test_one_that_never_had_all_the_traffic_is_passed_over(home: Home, rollback: Rollback) -> None:
    """As when the rollout has rolled it back: nobody wants it at three in the morning."""
    new = wanted_of(home)
    for at, revision in enumerate((FIRST, SECOND, new)):
        home.keep_revision(revision, at)
    home.set_weights("chat", {FIRST.digest: 100})
    home.set_weights("chat", {FIRST.digest: 90, SECOND.digest: 10})
    home.set_weights("chat", {FIRST.digest: 100})
    home.set_weights("chat", {new.digest: 100})
    assert rollback()[0] == 0
    assert home.weights("chat") == {FIRST.digest: 100}


def test_the_new_one_by_name_takes_all_traffic_at_once(home: Home, rollback: Rollback) -> None:
    new = wanted_of(home)
    for at, revision in enumerate((FIRST, new)):
        home.keep_revision(revision, at)
    home.set_weights("chat", {FIRST.digest: 95, new.digest: 5})
    assert rollback(new.digest[:10])[0] == 0
    assert home.weights("chat") == {new.digest: 100}
    assert home.pin("chat") == Pin(new.digest, new.digest)


def test_a_word_that_fits_no_revision_is_refused(home: Home, rollback: Rollback) -> None:
    home.keep_revision(FIRST, 1)
    code, said = rollback("zzz")
    assert (code, FIRST.short in said) == (2, True)
