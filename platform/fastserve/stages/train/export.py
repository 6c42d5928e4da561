"""The trained model as an artifact: a pure function of the source's folder and the last checkpoint.

Only weights change. Tokenizer, chat template, stop tokens and configuration are copied byte for byte, so that nothing a
library believes about them gets in. A run that was killed after its last step is exported without training again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastserve.errors import StageFailed
from fastserve.stages.train.network import PEFT_PREFIX
from fastserve.stages.train.state import RunState

Deltas = dict[str, torch.Tensor]


def export(source: Path, run: RunState, parameters: Mapping[str, torch.Tensor], into: Path) -> None:
    """Write `model/`, for LoRA `adapter/` too, and `curve.jsonl` into the empty folder `into`.

    source: the model that was trained, in Hugging Face layout.
    parameters: trained values by their names in the model, fp32.

    Raises StageFailed when a trained value has no stored weight to go to.
    """
    if run.export["method"] == "lora":
        deltas = lora_deltas(parameters, run.export)
        written = _write_model(source, into / "model", deltas, add=True)
        _write_adapter(parameters, run.export["adapterConfig"], into / "adapter")
    else:
        aliases: Mapping[str, str] = run.export["aliases"]
        deltas = {**parameters, **{alias: parameters[name] for alias, name in aliases.items()}}
        # A tied weight may be stored under its second name alone.
        tied = set(aliases.values())
        written = _write_model(source, into / "model", deltas, add=False) | tied
    missing = sorted(set(deltas) - written)
    if missing:
        raise StageFailed(
            f"{missing[0]} was trained but is not among the source's weights; use a source that stores it"
        )
    with (into / "curve.jsonl").open("w") as curve:
        for row in run.curve:
            curve.write(json.dumps(row) + "\n")


def lora_deltas(parameters: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> Deltas:
    """What each adapter adds to its weight: alpha / rank * B A, by the weight's stored name."""
    deltas: Deltas = {}
    for name, down in parameters.items():
        if ".lora_A." not in name:
            continue
        layer = name.removeprefix(PEFT_PREFIX).partition(".lora_A.")[0]
        delta = parameters[name.replace(".lora_A.", ".lora_B.")] @ down * facts["scale"]
        deltas[f"{layer}.weight"] = delta.T if layer in facts["transposed"] else delta
    return deltas


def _write_model(source: Path, target: Path, deltas: Mapping[str, torch.Tensor], add: bool) -> set[str]:
    """Copy the folder `source` with changed weights, each in the type it is stored in; returns the names changed."""
    written: set[str] = set()
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix != ".safetensors":
            shutil.copyfile(file, copy)
            continue
        tensors: dict[str, torch.Tensor] = {}
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {"format": "pt"}
            for name in stored.keys():  # noqa: SIM118 - not a mapping
                weight = stored.get_tensor(name)
                if name in deltas:
                    changed = weight.float() + deltas[name] if add else deltas[name]
                    # A copy of its own: a tied weight that is stored twice must not share memory in the file.
                    weight = changed.to(weight.dtype, copy=True).contiguous()
                    written.add(name)
                tensors[name] = weight
        save_file(tensors, copy, metadata=metadata)
    return written


def _write_adapter(parameters: Mapping[str, torch.Tensor], config: Mapping[str, Any], target: Path) -> None:
    """The adapter by itself, as peft and vLLM read it."""
    target.mkdir(parents=True)
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    # peft names the adapter inside a running model, not in its file.
    tensors = {name.replace(".default.weight", ".weight"): tensor.contiguous() for name, tensor in parameters.items()}
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
