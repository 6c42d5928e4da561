"""Models that the tests of quality share."""

from __future__ import annotations

import pytest
from quality_bench import SMOLLM, Bench

from fastserve.artifacts.record import Record
from fastserve.plan.stages import Stage


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("quality"))


@pytest.fixture(scope="session")
def smollm(bench: Bench) -> Record:
    """SmolLM2-135M-Instruct in bf16."""
    return bench.make(Stage.SOURCE, {"uri": SMOLLM}, {}, [SMOLLM])


@pytest.fixture(scope="session")
def rounded(bench: Bench, smollm: Record) -> Record:
    """Rounded to nearest: nothing is calibrated."""
    return bench.quantise(smollm, "roundToNearest")
