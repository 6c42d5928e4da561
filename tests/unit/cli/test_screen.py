"""What `up` shows while it works, where there is no terminal: a line now and then."""

import io
from collections.abc import Iterator
from typing import Any

import pytest

from fastserve.cli import render
from fastserve.cli.screen import Screen


@pytest.fixture
def said() -> Iterator[io.StringIO]:
    before, render.err.file = render.err.file, io.StringIO()
    yield render.err.file
    render.err.file = before


def status(*revisions: str, **stages: dict[str, Any]) -> dict[str, Any]:
    return {"name": "m", "stages": stages, "revisions": [{"state": state} for state in revisions]}


def test_the_start_of_an_engine_is_shown_against_its_usual_time(said: io.StringIO) -> None:
    with Screen() as screen:
        screen.show(status())
        screen.show(status("starting"))
        screen.show(status("starting"))
        screen.show(status("ready"))
        screen.show(status("ready"))
    began, ended = said.getvalue().splitlines()
    assert began == "serve: 0% 0/25 s, 25s left, the engine starts, by the usual time"
    assert ended.startswith("serve: done in")


def test_an_old_revision_that_is_ready_does_not_end_the_start_of_a_new_one(said: io.StringIO) -> None:
    with Screen() as screen:
        screen.show(status("ready", "starting"))
        assert "done" not in said.getvalue()
        screen.show(status("ready", "ready"))
        assert "serve: done" in said.getvalue()


def test_what_was_ready_all_along_is_not_announced(said: io.StringIO) -> None:
    with Screen() as screen:
        screen.show(status("ready"))
    assert said.getvalue() == ""


def test_a_stage_has_a_line_when_it_begins_and_one_when_it_ends(said: io.StringIO) -> None:
    running = {"state": "running", "progress": {"done": 3, "total": 12, "unit": "steps", "ratePerSecond": 0.5}}
    with Screen() as screen:
        screen.show(status(train=running))
        screen.show(status(train={"state": "committed"}))
    began, ended = said.getvalue().splitlines()
    assert began == "train: 25% 3/12 steps, 0.5 steps/s"
    assert ended.startswith("train: done in")
