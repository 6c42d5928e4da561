"""What a room costs to import: the light ones never bring in what takes seconds and gigabytes.

import-linter reads the sources; this looks at what is really there after the import, in a fresh interpreter, so that
an import through somebody else's package is seen too.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"ray", "torch", "vllm", "transformers"}
CLOUD = {"boto3", "botocore", "kubernetes", "kopf"}

ROOMS = {
    "errors": HEAVY | CLOUD,
    "units": HEAVY | CLOUD,
    "spec": HEAVY | CLOUD,
    "plan": HEAVY | CLOUD,
    "artifacts": HEAVY | CLOUD | {"huggingface_hub", "pyarrow"},
    "data": HEAVY | CLOUD | {"huggingface_hub", "pyarrow"},
    "telemetry": HEAVY | CLOUD,
    "cluster": HEAVY | {"kopf"},
    "cli": HEAVY | CLOUD | {"pyarrow"},
    "gateway": HEAVY | CLOUD | {"pyarrow", "huggingface_hub", "tokenizers"},
}

IMPORT_ALL = """
import importlib, pkgutil, sys
room = importlib.import_module("fastserve." + sys.argv[1])
for found in pkgutil.walk_packages(getattr(room, "__path__", []), room.__name__ + "."):
    if not found.name.endswith(".__main__"):
        importlib.import_module(found.name)
print(" ".join(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@pytest.mark.parametrize("room", ROOMS)
def test_a_light_room_imports_nothing_heavy(room: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, room],
        cwd=ROOT,
        env={"PYTHONPATH": "platform:operators", "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(ROOMS[room] & set(done.stdout.split())) == []
