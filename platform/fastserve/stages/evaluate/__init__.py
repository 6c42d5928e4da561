"""The evaluate stage: measure a candidate against its parent, on the engine that will serve."""

from fastserve.stages.evaluate.run import run

__all__ = ["run"]
