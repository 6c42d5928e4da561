"""Laptops for the end-to-end tests; each leaves nothing behind, or its test fails."""

from __future__ import annotations

from collections.abc import Generator, Iterator
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


def _lived(name: str, folder: Path) -> Iterator[Laptop]:
    found = Laptop(folder)
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
