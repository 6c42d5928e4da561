"""The compress stage: make a model smaller, step by step."""

from fastserve.stages.compress.run import run

__all__ = ["run"]
