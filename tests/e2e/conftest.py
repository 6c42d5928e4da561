"""Laptops for the end-to-end tests; each leaves nothing behind, or its test fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from laptop import Laptop


@pytest.fixture
def laptop(tmp_path: Path) -> Iterator[Laptop]:
    found = Laptop(tmp_path / "home")
    yield found
    found.down()
    found.assert_nothing_left()


@pytest.fixture(scope="module")
def shared_laptop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    found = Laptop(tmp_path_factory.mktemp("laptop") / "home")
    yield found
    found.down()
    found.assert_nothing_left()
