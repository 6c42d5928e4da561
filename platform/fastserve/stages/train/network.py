"""The model that is trained: loaded, its trained part chosen, traced back to the names of the stored weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from fastserve.errors import NotExecutable, Problem, StageFailed
from fastserve.spec.train import Lora, Train

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PEFT_PREFIX = "base_model.model."
EAGER_BELOW_TOKENS = 256
"""Longest sample for which attention is computed plainly: the CPU's fused kernel works in blocks of that order, and on
samples of 50 tokens costs a fifth of the step more."""


@dataclass(frozen=True, slots=True)
class Network:
    """A model ready to be trained."""

    model: nn.Module
    trained: Mapping[str, nn.Parameter]
    """What is trained, by name in the model."""

    export: Mapping[str, Any] = field(default_factory=dict)
    """What the export must know beside the trained values; plain JSON values, kept in every checkpoint."""


def load_network(folder: Path, train: Train, longest: int) -> Network:
    """The model in `folder` (Hugging Face layout), for `train.method` and `train.precision`.

    longest: tokens of the longest sample. Adapters begin from `train.seed`, so that every worker begins alike.

    Raises NotExecutable for a method or precision that this version does not train with, StageFailed when the model's
    trained part cannot be found again among the stored weights.
    """
    if train.method not in ("lora", "full") or train.precision not in DTYPES:
        problem = (
            f"trains with method lora or full and precision fp32 or bf16, not {train.method} and {train.precision}"
        )
        raise NotExecutable([Problem(path="spec.train", message=f"this version {problem}; change them")])
    from transformers import AutoModelForCausalLM

    torch.manual_seed(train.seed)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=DTYPES[train.precision],
        attn_implementation="eager" if longest < EAGER_BELOW_TOKENS else "sdpa",
        local_files_only=True,
        trust_remote_code=False,
    )
    model.train()
    stored = stored_names(folder)
    return _lora(model, train.lora or Lora(), stored) if train.method == "lora" else _full(model, stored)


def stored_names(folder: Path) -> set[str]:
    """Names of all tensors in the safetensors files of `folder`."""
    names: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names.update(tensors.keys())
    return names


def _full(model: nn.Module, stored: set[str]) -> Network:
    trained = dict(model.named_parameters())
    # Weights that are one tensor under two names (tied embeddings) are trained once and stored under every name.
    first = {parameter.data_ptr(): name for name, parameter in trained.items()}
    same = {
        name: first[tensor.data_ptr()]
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in trained and tensor.data_ptr() in first
    }
    _require_stored(trained, stored | set(same.values()))
    return Network(model, trained, {"method": "full", "aliases": {a: n for a, n in same.items() if a in stored}})


def _lora(model: nn.Module, lora: Lora, stored: set[str]) -> Network:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets) or "all-linear",
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    layers = {
        name.removeprefix(PEFT_PREFIX): module
        for name, module in adapted.named_modules()
        if isinstance(module, LoraLayer)
    }
    _require_stored([f"{name}.weight" for name in layers], stored)
    described = adapted.peft_config["default"].to_dict()
    described.update(inference_mode=True, base_model_name_or_path=None)
    return Network(
        adapted,
        trained,
        {
            "method": "lora",
            "scale": lora.alpha / lora.rank,
            "transposed": sorted(name for name, layer in layers.items() if getattr(layer, "fan_in_fan_out", False)),
            "adapterConfig": json.loads(json.dumps(described, default=_plain)),
        },
    )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(getattr(value, "value", value))


def _require_stored(names: Any, stored: set[str]) -> None:
    missing = sorted(name for name in names if name not in stored)
    if missing:
        raise StageFailed(
            f"{missing[0]} and {len(missing) - 1} more weights of the model are stored under other names than they are "
            "computed under, so the trained model could not be written; use a source whose names agree"
        )
