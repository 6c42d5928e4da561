"""From a folder to a network: the model loaded or made for a method and a precision, adapted where that is asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from fastserve.errors import StageFailed
from fastserve.spec.train import Lora, Train
from fastserve.stages.train import adapters, fp8
from fastserve.stages.train.network import (
    DTYPES,
    STORED_AS,
    Network,
    as_stored,
    blocks_of,
    new_model,
    read_config,
    require_stored,
    stored_names,
)

EAGER_BELOW_TOKENS = 256
"""Longest sample for which attention is computed plainly: the CPU's fused kernel works in blocks of that order, and on
samples of 50 tokens costs a fifth of the step more."""


_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def load_network(folder: Path, train: Train, longest: int, config: Mapping[str, Any] | None = None) -> Network:
    """The model in `folder` (Hugging Face layout), for `train.method` and `train.precision`.

    longest: tokens of the longest sample. config: for method scratch, the whole config.json of the model to make;
    without it that of `folder` is taken. Adapters and new weights follow from `train.seed` alone, so that every worker
    begins alike.

    Raises NotExecutable for a precision, a method or a target that cannot be trained here, StageFailed when the model's
    trained part cannot be found again among the stored weights.
    """
    network = _network(folder, train, longest, config)
    if train.precision == "fp8":
        fp8.convert(network.model, network.blocks)
    return network


def _network(folder: Path, train: Train, longest: int, config: Mapping[str, Any] | None) -> Network:
    torch.manual_seed(train.seed)
    attention = "eager" if longest < EAGER_BELOW_TOKENS else "sdpa"
    if train.method == "scratch":
        return _scratch(read_config(folder) if config is None else config, train, attention)
    stored = stored_names(folder)
    if not stored:
        raise StageFailed(
            f"the source has no weights, and method: {train.method} goes on from weights; "
            "write method: scratch, or name a source that has them"
        )
    if train.method == "full":
        return _full(_load(folder, _exact(folder, DTYPES[train.precision]), attention), stored)
    quantised = adapters.four_bit(DTYPES[train.precision]) if train.method == "qlora" else None
    model = _load(folder, DTYPES[train.precision], attention, quantised)
    return adapters.adapted(model, train.lora or Lora(), stored, blocks_of(model), train.method)


def _load(folder: Path, dtype: torch.dtype, attention: str, quantised: Any = None) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attention,
        local_files_only=True,
        trust_remote_code=False,
        **({"quantization_config": quantised} if quantised is not None else {}),
    )
    loaded: nn.Module = model.train()
    return loaded


def _exact(folder: Path, computing: torch.dtype) -> torch.dtype:
    """The type to load a model in that is trained whole: half of the memory where nothing is lost by it, else fp32."""
    if computing is torch.float32:
        return computing
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                dtype = tensors.get_slice(name).get_dtype()
                if dtype[:1] in ("F", "B") and dtype not in ("BOOL", _SAFETENSORS_DTYPES[computing]):
                    return torch.float32
    return computing


def _full(model: nn.Module, stored: set[str]) -> Network:
    trained = dict(model.named_parameters())
    # Weights that are one tensor under two names (tied embeddings) are trained once and stored under every name.
    first = {parameter.data_ptr(): name for name, parameter in trained.items() if parameter.numel()}
    same = {
        name: first[tensor.data_ptr()]
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in trained and tensor.data_ptr() in first
    }
    converted = any(name not in stored for name in trained.keys() - set(same.values()))
    names: Iterable[str] = trained
    if converted:
        names = as_stored(model, {name: tensor.detach().to("meta") for name, tensor in trained.items()})
    require_stored(names, stored | set(same.values()))
    facts = {
        "method": "full",
        "aliases": {alias: name for alias, name in same.items() if alias in stored},
        "converted": converted,
    }
    return Network(model, trained, facts, blocks_of(model))


def _scratch(config: Mapping[str, Any], train: Train, attention: str) -> Network:
    model = new_model(config, train.seed, attention).train()
    facts = {"method": "scratch", "dtype": STORED_AS[train.precision], "seed": train.seed}
    return Network(model, dict(model.named_parameters()), facts, blocks_of(model))
