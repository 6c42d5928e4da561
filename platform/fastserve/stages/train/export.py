"""The trained model as an artifact: a pure function of the source's folder and the last checkpoint.

Only weights change. Tokenizer, chat template, stop tokens and configuration are copied byte for byte, so that nothing a
library believes about them gets in. A run that was killed after its last step is exported without training again.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from fastserve.artifacts.attempts import CURVE
from fastserve.errors import StageFailed
from fastserve.stages.train.network import PEFT_PREFIX, as_stored, empty_model, new_model, read_config
from fastserve.stages.train.state import RunState
from fastserve.telemetry import curve

Deltas = dict[str, torch.Tensor]

LARGEST_FILE = "5GB"
"""Above it, the weights of a model from scratch are stored in several files."""

_NOT_COPIED = (".safetensors", ".index.json")

_LOG = logging.getLogger(__name__)


def export(
    source: Path, run: RunState, parameters: Mapping[str, torch.Tensor], into: Path, title: str = "Training"
) -> None:
    """Write `model/`, for LoRA `adapter/` too, `curve.jsonl` and `curve.png` into the empty folder `into`.

    source: the model that was trained, in Hugging Face layout; for a model from scratch its configuration and
    tokenizer (`scratch.prepare`).
    parameters: trained values by their names in the model, fp32.
    title: of the picture.

    Raises StageFailed when a trained value has no stored weight to go to.
    """
    method = run.export["method"]
    if method == "scratch":
        _write_new_model(source, into / "model", parameters, run.export)
    elif method in ("lora", "qlora"):
        deltas = lora_deltas(parameters, run.export)
        if run.export.get("converted"):
            deltas = as_stored(empty_model(read_config(source)), deltas)
        _require_written(deltas, _write_model(source, into / "model", deltas, add=True))
        _write_adapter(parameters, run.export["adapterConfig"], into / "adapter")
    else:
        aliases: Mapping[str, str] = run.export["aliases"]
        deltas = {**parameters, **{alias: parameters[name] for alias, name in aliases.items()}}
        # A tied weight may be stored under its second name alone.
        tied = set(aliases.values())
        if run.export.get("converted"):
            deltas = as_stored(empty_model(read_config(source)), deltas)
        _require_written(deltas, _write_model(source, into / "model", deltas, add=False) | tied)
    write_curve(run.curve, into, title)


def write_curve(rows: list[dict[str, Any]], into: Path, title: str) -> None:
    """The curve as rows and, where it can be drawn, as a picture; without the picture a run is as good."""
    (into / CURVE).write_bytes(curve.dumped(rows))
    try:
        if not curve.write_picture(rows, into / "curve.png", title):
            _LOG.info("curve.png was not drawn: matplotlib is not installed, or there is no loss")
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        _LOG.warning("curve.png was not drawn: %s", error)


def lora_deltas(parameters: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> Deltas:
    """What each adapter adds to its weight: alpha / rank * B A, by the weight's name in the model."""
    deltas: Deltas = {}
    for name, down in parameters.items():
        if ".lora_A." not in name:
            continue
        layer = name.removeprefix(PEFT_PREFIX).partition(".lora_A.")[0]
        delta = parameters[name.replace(".lora_A.", ".lora_B.")] @ down * facts["scale"]
        deltas[f"{layer}.weight"] = delta.T if layer in facts["transposed"] else delta
    return deltas


def _require_written(deltas: Mapping[str, torch.Tensor], written: set[str]) -> None:
    missing = sorted(set(deltas) - written)
    if missing:
        raise StageFailed(
            f"{missing[0]} was trained but is not among the source's weights; use a source that stores it"
        )


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


def _write_new_model(
    source: Path, target: Path, parameters: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
) -> None:
    """A folder with the files of `source` and weights that it never had."""
    from huggingface_hub import save_torch_state_dict

    target.mkdir(parents=True)
    for file in sorted(path for path in source.iterdir() if path.is_file()):
        if not file.name.endswith(_NOT_COPIED):
            shutil.copyfile(file, target / file.name)
    config = read_config(source)
    dtype: torch.dtype = getattr(torch, facts["dtype"])
    model = empty_model(config)
    tensors = as_stored(model, {**parameters, **_kept_buffers(model, config, facts["seed"])})
    save_torch_state_dict(
        {name: tensor.to(dtype, copy=True).contiguous() for name, tensor in tensors.items()},
        target,
        max_shard_size=LARGEST_FILE,
        metadata={"format": "pt"},
    )
    config.pop("torch_dtype", None)
    config["dtype"] = facts["dtype"]
    (target / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _kept_buffers(model: nn.Module, config: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Values that a model stores and does not train, as they were when it was made."""
    kept = {name for name, _ in model.named_buffers()} & model.state_dict().keys()
    if not kept:
        return {}
    return {name: tensor for name, tensor in new_model(config, seed).named_buffers() if name in kept}


def _write_adapter(parameters: Mapping[str, torch.Tensor], config: Mapping[str, Any], target: Path) -> None:
    """The adapter by itself, as peft and vLLM read it."""
    target.mkdir(parents=True)
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    # peft names the adapter inside a running model, not in its file.
    tensors = {name.replace(".default.weight", ".weight"): tensor.contiguous() for name, tensor in parameters.items()}
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
