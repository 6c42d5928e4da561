"""What the tests of the planner share: manifests, a small real model's facts, measured metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fastserve.plan.facts import Hardware, ModelFacts
from fastserve.spec.model import Model

GIB = 2**30


def make_model(name: str = "chat", **spec: Any) -> Model:
    """A Model; `source` is filled in."""
    spec.setdefault("source", "file:///models/base")
    return Model.model_validate(
        {"apiVersion": "fastserve.dev/v1alpha1", "kind": "Model", "metadata": {"name": name}, "spec": spec}
    )


@pytest.fixture
def model() -> Callable[..., Model]:
    return make_model


@pytest.fixture
def all_stages() -> dict[str, Any]:
    return {
        "train": {"dataset": "file:///data/train.jsonl"},
        "compress": [{"quantize": {"format": "int8"}}],
        "evaluate": {"data": "file:///data/held-out.jsonl", "gate": {}},
        "serve": {},
    }


@pytest.fixture
def smol() -> ModelFacts:
    """SmolLM2-135M-Instruct in bf16."""
    return ModelFacts(
        architecture="LlamaForCausalLM",
        parameters=134_515_008,
        weight_bytes=269_060_552,
        layers=30,
        hidden=576,
        intermediate=1536,
        heads=9,
        kv_heads=3,
        head_dim=64,
        vocab=49_152,
        max_context=8192,
        tied_embeddings=True,
        dtype="bfloat16",
    )


@pytest.fixture
def laptop() -> Hardware:
    return Hardware(cpus=2, memory_bytes=24 * GIB)
