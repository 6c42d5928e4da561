"""The real engine on a CPU: which scheduler it has changes when a token comes, never which."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import write_tiny_llama

from fastserve.cluster.processes import clean_environment

pytestmark = pytest.mark.e2e

SCRIPT = Path(__file__).with_name("mlfq_engine.py")
ENGINE = {"maxSequences": 4, "kvCache": "64MiB", "dtype": "float32"}
FEW_BLOCKS = {**ENGINE, "kvCache": "640KiB"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """`served(scheduler="mlfq", ...)`: what an engine of this serve section answers."""
    model = write_tiny_llama(tmp_path_factory.mktemp("tiny") / "model", hidden=128, dtype="float32")

    def run(**section: Any) -> dict[str, Any]:
        command = [sys.executable, str(SCRIPT), str(model), json.dumps({"context": 512, "engine": ENGINE, **section})]
        done = subprocess.run(command, env=clean_environment({}), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    return run


@pytest.fixture(scope="module")
def first_come(served: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    found = served(scheduler="fcfs")
    assert found["scheduler"] == "Scheduler"
    assert len(found["strict"]) == 8
    assert all(re.fullmatch("[a-z ]+", text) for text in found["strict"])
    return found


@pytest.mark.parametrize(
    "section",
    [
        {"schedulerOptions": {"quantum": 8}},
        {"schedulerOptions": {"quantum": 4, "starvation": "20ms"}, "engine": FEW_BLOCKS},
    ],
    ids=["slots are short", "blocks are short, and many starve"],
)
def test_greedy_answers_are_those_of_first_come_first_served(
    served: Callable[..., dict[str, Any]], first_come: dict[str, Any], section: dict[str, Any]
) -> None:
    found = served(scheduler="mlfq", **section)
    assert found["scheduler"] == "MlfqScheduler"
    assert found["preemptions"] >= 5
    assert found["demotions"] >= 5
    if "starvation" in section["schedulerOptions"]:
        assert found["promotions"] >= 1
    assert found["ids"] == first_come["ids"]


def test_vllms_own_priority_policy_starts_too(
    served: Callable[..., dict[str, Any]], first_come: dict[str, Any]
) -> None:
    found = served(scheduler="priority")
    assert found["scheduler"] == "Scheduler"
    assert found["ids"] == first_come["ids"]
