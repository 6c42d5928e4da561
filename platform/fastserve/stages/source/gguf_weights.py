"""Weights of a GGUF file, dequantised to bf16 in Hugging Face layout.

transformers does the work, but reads a vocabulary item by item in Python, twice: 4 of 12 seconds for 49,000 tokens. The
tokenizer is ours anyway (`artifacts.tokenizer`), so it gets a copy of the file whose header has no vocabulary.
"""

from __future__ import annotations

import functools
import json
import shutil
import struct
from pathlib import Path
from typing import Any

from fastserve.artifacts import safetensors_header
from fastserve.artifacts.gguf_header import GgufHeader
from fastserve.errors import SourceInvalid, StageFailed

_LEFT_OUT = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type", "tokenizer.ggml.scores")
_UINT32 = 4


def without_vocabulary(source: Path, header: GgufHeader, target: Path) -> None:
    """Write a copy of a .gguf file without the tokenizer's lists; its size is kept as `<architecture>.vocab_size`.

    The tensors keep their offsets, which count from the end of the header.
    """
    size_key = f"{header.text('general.architecture')}.vocab_size"
    kept = [span for key, span in header.spans.items() if key not in _LEFT_OUT]
    vocabulary = header.texts("tokenizer.ggml.tokens")
    added = b""
    if size_key not in header.metadata and vocabulary:
        name = size_key.encode()
        added = struct.pack(f"<Q{len(name)}sII", len(name), name, _UINT32, len(vocabulary))
    alignment = int(header.metadata.get("general.alignment", 32))
    with source.open("rb") as old, target.open("wb") as new:
        new.write(struct.pack("<4sIQQ", b"GGUF", header.version, len(header.tensors), len(kept) + bool(added)))
        for begin, end in [*kept, header.tensor_span]:
            if (begin, end) == header.tensor_span:
                new.write(added)
            old.seek(begin)
            new.write(old.read(end - begin))
        new.write(b"\0" * (-new.tell() % alignment))
        old.seek(header.header_bytes)
        shutil.copyfileobj(old, new, 2**22)


def dequantise(packed: Path, header: GgufHeader, model: Path, scratch: Path) -> dict[str, Any]:
    """Write the weights as bf16 safetensors into `model`, and return the configuration for config.json.

    scratch: a folder for a copy as large as `packed`.
    Raises SourceInvalid when the architecture or a quantisation cannot be imported, StageFailed when a weight went
    missing.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    slim = scratch / "without-vocabulary.gguf"
    without_vocabulary(packed, header, slim)
    _remember_name_maps()
    try:
        loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
            str(scratch),
            gguf_file=slim.name,
            dtype=torch.bfloat16,
            quantization_config=transformers.GgufConfig(dequantize=True),
            local_files_only=True,
            output_loading_info=True,
        )
    except (ValueError, KeyError, NotImplementedError, ImportError) as error:
        raise SourceInvalid(
            f"{packed.name}: cannot be imported ({error}); use the model's folder in Hugging Face layout instead"
        ) from error
    finally:
        slim.unlink(missing_ok=True)
    missing = sorted(report["missing_keys"])
    if missing:
        raise SourceInvalid(
            f"{packed.name}: has no weights for {', '.join(missing[:3])}; the file is incomplete, replace it"
        )
    loaded.hf_quantizer = None  # the weights are plain now; with it, saving refuses
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    loaded.save_pretrained(str(model))
    config: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = [type(loaded).__name__]
    written, _ = safetensors_header.total(
        {path.name: safetensors_header.check(path) for path in model.glob("*.safetensors")}
    )
    expected = sum(tensor.elements for name, tensor in header.tensors.items() if not name.startswith("rope_"))
    if written != expected:
        raise StageFailed(
            f"{packed.name}: {expected} parameters went in and {written} came out; the importer does not know this "
            "layout: "
            "use the model's folder in Hugging Face layout instead"
        )
    return config


def _remember_name_maps() -> None:
    """transformers builds one map of tensor names anew for every module of a model: 4 of 9 seconds for 30 layers."""
    import gguf

    if not hasattr(gguf.get_tensor_name_map, "cache_info"):
        gguf.get_tensor_name_map = functools.lru_cache(maxsize=8)(gguf.get_tensor_name_map)
