"""What `operator_steady` measures, with ten times as many Models: shown, with nothing to meet."""

from collections.abc import Iterator

from tests.bench.figure import Figure
from tests.bench.operator_steady import MODELS, measured


def run() -> Iterator[Figure]:
    """About ten minutes."""
    yield from measured(10 * MODELS, aims=False)
