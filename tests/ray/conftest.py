"""A failed test tells what ran, and what it said last."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import last_words
import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    last_words.add_to(report)
    return report
