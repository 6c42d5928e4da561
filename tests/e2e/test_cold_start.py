"""Engines forked from a warm process: what is killed around one leaves nothing behind and comes back."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
from laptop import Laptop
from tiny import tiny_model

pytestmark = pytest.mark.e2e


def named(laptop: Laptop, sign: str) -> list[psutil.Process]:
    """Processes of the home by a word of their name or command."""
    return [item for item in laptop.processes() if sign in item.name() or sign in " ".join(item.cmdline())]


def engines(laptop: Laptop) -> list[psutil.Process]:
    return named(laptop, "EngineCore")


def test_what_is_killed_around_an_engine_comes_back_without_leftovers(laptop: Laptop, tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    manifest = tmp_path / "cold.yaml"
    manifest.write_text(
        "apiVersion: fastserve.dev/v1alpha1\nkind: Model\nmetadata: {name: cold}\n"
        "spec: {source: model, serve: {context: 512}}\n"
    )
    laptop.run("up", str(manifest), "--detach")
    (engine,) = engines(laptop)
    server = engine.parent()
    assert server is not None
    warm = server.parent()
    assert warm is not None and warm in laptop.processes(), "the engine was forked"  # noqa: PT018

    os.kill(warm.pid, signal.SIGKILL)
    assert laptop.chat("cold", "hi") is not None
    assert engines(laptop) == [engine], "an engine does not need the process it came from"

    (replica,) = named(laptop, "ServeReplica")
    os.kill(replica.pid, signal.SIGKILL)
    laptop.until(lambda: not engine.is_running() and not server.is_running(), "they end with their replica", 10)
    assert laptop.chat("cold", "hi") is not None
    (engine,) = engines(laptop)
    assert engine.pid != server.pid

    os.kill(engine.parent().pid, signal.SIGKILL)
    laptop.until(lambda: not engine.is_running(), "an engine ends with its server", 10)
    assert laptop.chat("cold", "hi") is not None
    laptop.down()
    laptop.assert_nothing_left()
