"""The real engine on a CPU: which scheduler it has changes when a token comes, never which."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import write_tiny_llama

from fastserve.cluster.processes import clean_environment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SCRIPT = Path(__file__).with_name("mlfq_engine.py")
ENGINE = {"maxSequences": 4, "kvCache": "64MiB", "dtype": "float32"}
FEW_BLOCKS = {**ENGINE, "kvCache": "640KiB"}


SECTIONS: dict[str, dict[str, Any]] = {
    "first come": {"scheduler": "fcfs"},
    "slots are short": {"scheduler": "mlfq", "schedulerOptions": {"quantum": 8}},
    "blocks are short, and many starve": {
        "scheduler": "mlfq",
        "schedulerOptions": {"quantum": 4, "starvation": "20ms"},
        "engine": FEW_BLOCKS,
    },
    "priority": {"scheduler": "priority"},
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What an engine of each serve section answers. One process has them all: most of its time is imports."""
    model = write_tiny_llama(tmp_path_factory.mktemp("tiny") / "model", hidden=128, dtype="float32")
    sections = [{"context": 512, "engine": ENGINE, **section} for section in SECTIONS.values()]
    command = [sys.executable, str(SCRIPT), str(model), json.dumps(sections)]
    done = subprocess.run(command, env=clean_environment({}), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(SECTIONS, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.fixture(scope="module")
def first_come(served: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found = served["first come"]
    assert found["scheduler"] == "Scheduler"
    assert len(found["strict"]) == 8
    assert all(re.fullmatch("[a-z ]+", text) for text in found["strict"])
    return found


@pytest.mark.parametrize("name", ["slots are short", "blocks are short, and many starve"])
def test_greedy_answers_are_those_of_first_come_first_served(
    served: dict[str, dict[str, Any]], first_come: dict[str, Any], name: str
) -> None:
    found = served[name]
    assert found["scheduler"] == "MlfqScheduler"
    assert found["preemptions"] >= 5
    assert found["demotions"] >= 5
    if "starvation" in SECTIONS[name]["schedulerOptions"]:
        assert found["promotions"] >= 1
    assert found["ids"] == first_come["ids"]


def test_vllms_own_priority_policy_starts_too(served: dict[str, dict[str, Any]], first_come: dict[str, Any]) -> None:
    found = served["priority"]
    assert found["scheduler"] == "Scheduler"
    assert found["ids"] == first_come["ids"]
