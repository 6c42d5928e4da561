"""What all tests share: tiers that run when they are asked for, and tools that CI must have."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import pytest

TIERS = ("ray", "e2e", "s3")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tiers that take longer, unless `-m` says what to run."""
    if config.option.markexpr:
        return
    slow = [item for item in items if any(item.get_closest_marker(tier) for tier in TIERS)]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session")
def missing() -> Callable[[str], None]:
    """`missing("needs root")` skips the test, but fails it in CI: there nothing may be missing."""

    def say(reason: str) -> None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI {reason}", pytrace=False)
        pytest.skip(reason)

    return say


@pytest.fixture(scope="session")
def require(missing: Callable[[str], None]) -> Callable[[str], str]:
    """`require("go")` gives the tool's path; without it the test cannot run."""

    def find(tool: str) -> str:
        path = shutil.which(tool)
        if path is None:
            missing(f"needs the tool '{tool}', which is not on the PATH")
        return str(path)

    return find
