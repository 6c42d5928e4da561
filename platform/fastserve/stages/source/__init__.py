"""The import stage: fetch a source, check it, bring it into Hugging Face layout."""

from fastserve.stages.source.importer import run

__all__ = ["run"]
