"""The model that is trained: loaded or made, its trained part chosen, traced back to the names of the stored weights.

No architecture is known here by name. Repeated blocks and linear layers are found by their structure, and what a model
calls its weights is compared with what its files call them, so whatever decoder transformers loads can be trained.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from fastserve.errors import NotExecutable, Problem, StageFailed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""What weights are computed with; fp8 rounds them to eight bits only inside its products."""

STORED_AS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "bfloat16"}
"""In the words of config.json; what a model from scratch is stored as."""

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Network:
    """A model ready to be trained."""

    model: nn.Module
    """On the CPU. What is frozen is in the computing precision; what is trained is exact: see `trained`."""

    trained: Mapping[str, nn.Parameter]
    """What is trained, by name in the model: fp32, or the stored type where all weights are stored in the computing
    precision, so that `.float()` gives the exact master."""

    export: Mapping[str, Any] = field(default_factory=dict)
    """What the export must know beside the trained values; plain JSON values, kept in every checkpoint."""

    blocks: Sequence[str] = ()
    """Names of the repeated blocks as in `model.named_modules()`, in their order; empty when there are none."""


def blocks_of(model: nn.Module) -> list[str]:
    """Names of the repeated blocks, in order: the items of the ModuleList that holds most of the parameters.

    Lists inside such a list (a block's experts) are parts of a block and not looked at.
    """
    lists: dict[str, nn.ModuleList] = {}

    def walk(name: str, module: nn.Module) -> None:
        for child_name, child in module.named_children():
            full = f"{name}.{child_name}" if name else child_name
            if isinstance(child, nn.ModuleList):
                lists[full] = child
            else:
                walk(full, child)

    walk("", model)
    if not lists:
        return []
    numbers = {name: sum(p.numel() for p in found.parameters()) for name, found in lists.items()}
    largest = max(lists, key=numbers.__getitem__)
    return [f"{largest}.{index}" for index in range(len(lists[largest]))] if numbers[largest] else []


def stored_names(folder: Path) -> set[str]:
    """Names of all tensors in the safetensors files of `folder`."""
    names: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names.update(tensors.keys())
    return names


def as_stored(model: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """`tensors` by the names, and in the pieces, that their architecture is stored under: transformers fuses some
    weights when it loads them (the experts of a mixture), and this takes them apart again."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(tensors)))


def empty_model(config: Mapping[str, Any]) -> nn.Module:
    """The model that config.json describes, without memory for its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return _module(AutoModelForCausalLM.from_config(_config_of(config), trust_remote_code=False))


def new_model(config: Mapping[str, Any], seed: int, attention: str = "sdpa") -> nn.Module:
    """The model that config.json describes, with random weights that follow from `seed`; fp32, on the CPU."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return _module(
        AutoModelForCausalLM.from_config(
            _config_of(config), dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
        )
    )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of `folder`. Raises StageFailed when there is none."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise StageFailed("the source has no config.json; name a model in Hugging Face layout") from error
    return config


def require_stored(names: Iterable[str], stored: set[str]) -> None:
    """Raise StageFailed when a weight that is trained has no stored one to go to."""
    missing = sorted(name for name in names if name not in stored)
    if missing:
        raise StageFailed(
            f"{missing[0]} and {len(missing) - 1} more weights of the model are stored under other names than they are "
            "computed under, so the trained model could not be written; use a source whose names agree"
        )


def _config_of(config: Mapping[str, Any]) -> Any:
    """transformers' own reading of a config.json, which knows every architecture's older spellings."""
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory(prefix="fastserve-config-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _refused("scratch.config", f"does not describe a model ({_first_line(error)}); correct it") from error


def _module(model: Any) -> nn.Module:
    loaded: nn.Module = model
    return loaded


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _refused(key: str, message: str) -> NotExecutable:
    return NotExecutable([Problem(path=f"spec.train.{key}", message=message)])
