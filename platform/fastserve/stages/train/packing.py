"""Which models may be trained on packed rows: those that see each sample of a row as if it stood alone.

transformers finds samples by their positions and masks attention between them. A model that mixes tokens in another way
(recurrent states, convolutions, positions that are counted from the mask) would learn across samples without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastserve.errors import NotExecutable, Problem

_CHECKED = """
    apertus arcee codegen cohere cohere2 diffllama ernie4_5 exaone4 gemma gemma2 gemma3_text glm glm4 glm4_moe gpt2
    gpt_bigcode gpt_neo gpt_neox gptj granite granitemoe helium hunyuan_v1_dense jais2 llama ministral ministral3
    mistral mixtral nemotron olmo olmo2 olmo3 olmoe persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss
    smollm3 stablelm starcoder2
"""
PACKABLE = frozenset(_CHECKED.split())
"""Values of `model_type` whose loss and gradient on packed rows equal those of the samples alone, in fp32 within 1e-6,
checked one by one with transformers 5.17."""

_BY_LENGTH = ("dynamic", "longrope")
"""Rotary positions that depend on how long the longest sample of a row is."""


def require_packable(config: Mapping[str, Any]) -> None:
    """Raise NotExecutable when the model of `config` (a config.json) would be trained otherwise on packed rows."""
    text: Any = config.get("text_config")
    kind = (text if isinstance(text, dict) else {}).get("model_type") or config.get("model_type")
    problem = ""
    if kind not in PACKABLE:
        problem = f"samples of {kind} cannot be packed: it is not among the models that keep them apart"
    elif scaled := next((name for name in _rope_types(config) if name in _BY_LENGTH), None):
        problem = (
            f"samples of {kind} with rope type {scaled} cannot be packed: its positions depend on their neighbours"
        )
    if problem:
        raise NotExecutable([Problem("spec.train.packing", f"{problem}; remove packing")])


def _rope_types(config: Mapping[str, Any]) -> Iterator[str]:
    """Every `rope_type` (older: `type`) under the keys of rotary positions, nested by kind of layer or not."""
    for key, value in config.items():
        if isinstance(value, dict) and (key in ("rope_parameters", "rope_scaling") or "attention" in key):
            yield from (str(value[name]) for name in ("rope_type", "type") if isinstance(value.get(name), str))
            yield from _rope_types(value)
        elif isinstance(value, dict) and key == "text_config":
            yield from _rope_types(value)
