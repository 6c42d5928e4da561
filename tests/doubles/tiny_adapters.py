"""LoRA adapters of a few kilobytes, as peft writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_adapter(
    folder: Path,
    width: int = 32,
    rank: int = 8,
    value: float = 0.0,
    module: str = "model.layers.0.self_attn.q_proj",
    extra: dict[str, tuple[int, ...]] | None = None,
    **config: Any,
) -> Path:
    """An adapter on one square matrix of a model of this width.

    value: of all numbers, in lora_A without its sign; 0 changes nothing. extra: further tensors by name and shape.
    config: keys of adapter_config.json that differ.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    shapes = {
        f"base_model.model.{module}.lora_A.weight": (rank, width),
        f"base_model.model.{module}.lora_B.weight": (width, rank),
        **(extra or {}),
    }
    numbers = {name: abs(value) if "lora_A" in name else value for name in shapes}
    tensors = {name: torch.full(shape, numbers[name]) for name, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    plain = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "bias": "none",
        "target_modules": [module.rpartition(".")[2]],
    }
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    return folder
