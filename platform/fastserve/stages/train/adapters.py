"""Adapters on a frozen model: which layers get them, and what becomes of them in the trained model.

LoRA: Hu et al., 2021, arXiv 2106.09685. QLoRA, the same on a base that is kept in four bits: Dettmers et al., 2023,
arXiv 2305.14314.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastserve.errors import NotExecutable, Problem
from fastserve.spec.train import Lora
from fastserve.stages.train.network import PEFT_PREFIX, Network, as_stored, blocks_of, require_stored

_MOST_NAMED = 8


def adapted(model: nn.Module, lora: Lora, stored: set[str], blocks: Sequence[str], method: str) -> Network:
    """`model` with adapters on `lora.targets`, or on all linear layers of its blocks; they alone are trained, in fp32.

    Raises NotExecutable when a target is no linear layer of the model, or the model has none.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    targets = target_names(model, lora.targets, blocks)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        fan_in_fan_out=any(not isinstance(layer, nn.Linear) for layer in _hit(model, targets).values()),
    )
    wrapped = get_peft_model(model, config)  # casts adapters to fp32, whatever the base computes in
    trained = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    layers = {
        name.removeprefix(PEFT_PREFIX): module
        for name, module in wrapped.named_modules()
        if isinstance(module, LoraLayer)
    }
    weights = {f"{name}.weight" for name in layers}
    converted = not weights <= stored
    if converted:
        weights = set(as_stored(model, {name: torch.empty(1, 1, device="meta") for name in sorted(weights)}))
    require_stored(weights, stored)
    described = wrapped.peft_config["default"].to_dict()
    described.update(inference_mode=True, base_model_name_or_path=None)
    facts = {
        "method": method,
        "scale": lora.alpha / lora.rank,
        "transposed": sorted(name for name, layer in layers.items() if getattr(layer, "fan_in_fan_out", False)),
        "adapterConfig": json.loads(json.dumps(described, default=_plain)),
        "converted": converted,
    }
    return Network(wrapped, trained, facts, blocks_of(wrapped))


def target_names(model: nn.Module, targets: Sequence[str], blocks: Sequence[str]) -> list[str]:
    """Names for peft's `target_modules`, each of which is a linear layer or the end of such layers' names.

    targets: as in the manifest; none means all linear layers of the blocks.

    Raises NotExecutable that lists the layers there are.
    """
    linear = _hit(model)
    inside = [name for name in linear if any(name.startswith(f"{block}.") for block in blocks)]
    leaves = sorted({name.rpartition(".")[2] for name in inside or linear})
    known = ", ".join(leaves[:_MOST_NAMED]) + (", ..." if len(leaves) > _MOST_NAMED else "")
    if not targets:
        if not inside:
            kinds = "no linear layer in repeated blocks" if linear else "no linear layer"
            raise _refused("method", f"the model has {kinds} that an adapter could go on; write method: full")
        others = {name.rpartition(".")[2] for name in linear.keys() - set(inside)}
        # Short names where they mean these layers alone: what reads the adapter later knows layers by them.
        return leaves if not others & set(leaves) else sorted(inside)
    weights = _shared(model)
    for target in targets:
        hit = _hit(model, [target])
        if not hit:
            raise _refused("lora.targets", f"the model has no linear layer '{target}'; it has {known}")
        tied = [name for name in hit if id(getattr(linear[name], "weight", None)) in weights]
        if tied:
            raise _refused(
                "lora.targets", f"'{target}' shares its weight with another layer of the model; leave it out: {known}"
            )
    return sorted(set(targets))


def is_linear(module: nn.Module) -> bool:
    """Whether `module` multiplies by one matrix: torch's Linear, what derives from it, and GPT-2's Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _hit(model: nn.Module, targets: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The linear layers that `targets` name, whole or by the end of their names; all of them without targets."""
    return {
        name: module
        for name, module in model.named_modules()
        if is_linear(module)
        and (targets is None or any(name == target or name.endswith(f".{target}") for target in targets))
    }


def four_bit(computing: torch.dtype) -> Any:
    """transformers' settings for a base in 4-bit normal floats.

    Raises NotExecutable, with what to do, where that cannot be computed: no CUDA device, or no bitsandbytes.
    """
    if not torch.cuda.is_available():
        raise _refused(
            "method", "qlora computes on a CUDA device, and this worker has none; write method: lora, or use a GPU"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise _refused(
            "method", "qlora needs the package bitsandbytes in the workers' environment; add it, or write method: lora"
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=computing,
        bnb_4bit_quant_storage=torch.uint8,
    )


def _shared(model: nn.Module) -> set[int]:
    """Ids of the parameters that stand in more than one layer."""
    seen: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    return {key for key, count in seen.items() if count > 1}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(getattr(value, "value", value))


def _refused(key: str, message: str) -> NotExecutable:
    return NotExecutable([Problem(path=f"spec.train.{key}", message=message)])
