"""Ctrl-C at any line of `up`: all ends once, and a run whose models were ready has ended well."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from fastserve.cli import render, up
from fastserve.cluster.home import Home
from fastserve.cluster.local import Beat
from fastserve.plan.moves import Done
from fastserve.plan.observed import Observed
from fastserve.spec.load import read
from fastserve.spec.model import Model

MODEL = "apiVersion: fastserve.dev/v1alpha1\nkind: Model\nmetadata: {name: chat}\nspec: {source: hf://a/b, serve: {}}"
WATCHED = {"to_the_end", "_until_settled", "_show_results", "_show_endpoints", "_stay", "_tell_changes"}
BEATS = 3
"""Looks after which the person at the keyboard has seen enough, where no line was to be torn."""


class Cluster:
    """One model that is ready at the first look."""

    store, url, gateway = None, "http://127.0.0.1:1/v1", property(lambda self: self)

    def __init__(self, *_: Any) -> None:
        self.beats = self.stops = 0

    def forget_failed(self) -> None:
        """Nothing has failed."""

    def beat(self) -> list[Beat]:
        self.beats += 1
        if self.beats > BEATS:
            raise KeyboardInterrupt
        model = read(MODEL)[0]
        assert isinstance(model, Model)
        return [Beat(model, Observed(), (Done(because="It is ready."),))]

    def stop(self) -> None:
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN, "a second Ctrl-C does not tear the clean-up"
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        self.stops += 1


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> up.Run:
    home = Home(tmp_path / "home")
    home.create()
    monkeypatch.setattr(up, "LocalCluster", Cluster)
    monkeypatch.setattr(up, "WORK_SECONDS", 0)
    monkeypatch.setattr(up, "SERVE_SECONDS", 0)
    monkeypatch.setattr(up, "stream", lambda *_: iter(["Par", "is"]))
    monkeypatch.setattr(up.Run, "_status", lambda *_: {"name": "chat", "stages": {}, "revisions": []})
    return up.Run(home, ["chat"], None, False, False)


class CtrlC:
    """Raises KeyboardInterrupt at one line of `up`; counts the lines before the first one."""

    def __init__(self, at: int | None) -> None:
        self.lines, self._at = 0, at
        self.came = False

    def trace(self, frame: FrameType, event: str, what: Any) -> Any:
        if event == "call":
            ours = frame.f_code.co_filename == up.__file__ and frame.f_code.co_name in WATCHED
            return self.trace if ours else None
        if event == "exception" and issubclass(what[0], KeyboardInterrupt):
            self.came = True
        if event == "line" and not self.came:
            self.lines += 1
            if self.lines == self._at:
                self.came = True
                raise KeyboardInterrupt
        return self.trace


@pytest.fixture
def said() -> Iterator[io.StringIO]:
    before, render.err.file = render.err.file, io.StringIO()
    yield render.err.file
    render.err.file = before


@pytest.fixture
def traced() -> Iterator[None]:
    before = sys.gettrace()
    yield
    sys.settrace(before)


def lived(run: up.Run, ctrl_c: CtrlC) -> bool | None:
    """What the run returned; None when Ctrl-C went through it."""
    before = sys.gettrace()
    sys.settrace(ctrl_c.trace)
    try:
        return run.to_the_end()
    except KeyboardInterrupt:
        return None
    finally:
        sys.settrace(before)


def test_ctrl_c_at_any_line_ends_all_once(run: up.Run, said: io.StringIO, traced: None) -> None:
    whole = CtrlC(at=None)
    assert lived(run, whole) is False
    assert "chat is ready" in said.getvalue()
    assert whole.lines > 30
    seen = set()
    for line in range(2, whole.lines + 1):  # at the first nothing has begun
        said.truncate(0)
        again = up.Run(run._home, ["chat"], None, False, False)
        ctrl_c = CtrlC(line)
        ended = lived(again, ctrl_c)
        assert ctrl_c.came
        assert isinstance(again._cluster, Cluster)
        assert again._cluster.stops == 1, f"at line {line}"
        ready = "chat is ready" in said.getvalue()
        assert ended is False or not ready, f"at line {line} a ready model ended with 130"
        assert ended is None or ready or again._stays
        seen.add((ended, ready))
    assert {(None, False), (False, True)} <= seen
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


def test_ctrl_c_while_a_model_comes_up_in_the_background_goes_through(run: up.Run, traced: None) -> None:
    """With --detach nobody is told that it is over before the command returns."""
    for line in (5, 20, 25):
        detached = up.Run(run._home, ["chat"], None, True, False)
        assert lived(detached, CtrlC(line)) is None
        assert isinstance(detached._cluster, Cluster)
        assert detached._cluster.stops == 1
