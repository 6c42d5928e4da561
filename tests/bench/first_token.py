"""From `helm install` and `kubectl apply` of the smallest manifest to the first token, on a node with the images."""

import sys
from collections.abc import Iterator
from pathlib import Path

from tests.bench.figure import Figure, below

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 180.0


def run() -> Iterator[Figure]:
    """Some minutes, and more when images have to be built."""
    sys.path[:0] = [str(ROOT / "tests" / name) for name in ("cluster", "kube", "e2e", "doubles")]
    from first_token import measured

    for mark, seconds in measured().items():
        name = f"install and apply, to: {mark}"
        yield below(name, seconds, "s", LIMIT_SECONDS) if mark == "first token" else Figure(name, seconds, "s")
