"""Laptops for the end-to-end tests; each leaves nothing behind, or its test fails.

Most of a small test's time is Ray's start and the engine's imports. So whoever only serves shares one laptop: its Ray,
its gateway and its warm process go on from one module to the next.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import last_words
import pytest
from laptop import Laptop


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test tells what ran, and what it said last."""
    report = yield
    last_words.add_to(report)
    return report


# What Kubernetes would put into the environment beside Services of these names, and a setting of another vLLM: the
# laptop that serves lives among them all the time (public case 16).
LINKS = {f"{name}_PORT": "tcp://10.96.0.10:8000" for name in ("VLLM", "RAY", "REDIS")}
HOSTS = {f"{name}_SERVICE_HOST": "10.96.0.10" for name in ("VLLM", "RAY", "REDIS")}
PASSED = {"VLLM_LOGGING_LEVEL": "WARNING", "FASTSERVE_ENGINE_VARIABLES": "VLLM_LOGGING_LEVEL"}
AROUND = {**LINKS, **HOSTS, **PASSED, "VLLM_HOST_IP": "10.0.0.1"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever uses the laptop that serves comes last, so that its Ray runs beside nobody else's tests."""
    items.sort(key=lambda item: "standing_laptop" in getattr(item, "fixturenames", ()))


def _lived(name: str, folder: Path, around: Mapping[str, str] | None = None) -> Iterator[Laptop]:
    found = Laptop(folder, around)
    last_words.WATCHED[name] = found.home
    yield found
    found.down()
    found.assert_nothing_left()
    del last_words.WATCHED[name]  # not when its end failed: that report comes afterwards


@pytest.fixture
def laptop(tmp_path: Path) -> Iterator[Laptop]:
    yield from _lived("laptop", tmp_path / "home")


@pytest.fixture(scope="module")
def shared_laptop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    yield from _lived("shared_laptop", tmp_path_factory.mktemp("laptop") / "home")


@pytest.fixture(scope="session")
def standing_laptop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    yield from _lived("standing_laptop", tmp_path_factory.mktemp("standing") / "home", AROUND)


@pytest.fixture(scope="module")
def serving_laptop(standing_laptop: Laptop) -> Iterator[Laptop]:
    """The laptop that serves, without any model of the modules before."""
    yield standing_laptop
    standing_laptop.clear()
