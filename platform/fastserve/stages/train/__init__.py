"""The train stage: fine-tune the source on rows, over the workers of a Ray Train group."""

from fastserve.stages.train.driver import run

__all__ = ["run"]
