"""A LoRA adapter as it lies in a folder, read without its weights."""

from __future__ import annotations

from pathlib import Path

from fastserve.artifacts import safetensors_header
from fastserve.artifacts.file_types import read_object
from fastserve.errors import SourceInvalid
from fastserve.plan.facts import ModelFacts
from fastserve.plan.lora import AdapterFacts, adapter_facts, check_fit

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_FLOATS = ("F32", "F16", "BF16")


def read_adapter(folder: Path, called: str, model: ModelFacts | None = None) -> AdapterFacts:
    """Facts of the adapter in `folder`.

    called: what messages call it, such as `adapter de`. model: what it shall be applied to, where that is known.
    Raises SourceInvalid that names the adapter, the tensor or key, and what to do.
    """
    try:
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise SourceInvalid(f"has no {name}; save it with peft's save_pretrained")
        config = read_object(folder / CONFIG, CONFIG, called)
        header = safetensors_header.check(folder / WEIGHTS, WEIGHTS)
        odd = next((name for name, info in sorted(header.tensors.items()) if info.dtype not in _FLOATS), None)
        if odd is not None:
            kind = header.tensors[odd].dtype
            raise SourceInvalid(f"tensor {odd} is of type {kind}; an adapter is of {', '.join(_FLOATS)}: save it again")
        shapes = {name: info.shape for name, info in header.tensors.items()}
        facts = adapter_facts(config, shapes, header.weight_bytes)
        if model is not None:
            check_fit(shapes, model)
    except SourceInvalid as error:
        raise SourceInvalid(str(error) if str(error).startswith(called) else f"{called}: {error}") from None
    return facts
