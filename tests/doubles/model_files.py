"""Bytes of small model files, well-formed or with one thing wrong."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STRING, ARRAY, UINT32, INT32, FLOAT32, BOOL = 8, 9, 4, 5, 6, 7

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 6,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>\n{% endfor %}"


def safetensors(
    tensors: Mapping[str, Any] | None = None, data_bytes: int | None = None, header: bytes | None = None
) -> bytes:
    """A file of float32 zeros. tensors: entries of the header; header: its very text; data_bytes: bytes behind it."""
    if tensors is None:
        tensors = {"embed": {"dtype": "F32", "shape": [6, 8], "data_offsets": [0, 192]}}
    text = json.dumps(tensors).encode() if header is None else header
    if data_bytes is None:
        data_bytes = max(
            (entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"), default=0
        )
    return struct.pack("<Q", len(text)) + text + b"\0" * data_bytes


def tokenizer() -> dict[str, Any]:
    """A tokenizer.json of six tokens; `<|im_end|>` is 2."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab"]
    special = [
        {
            "id": n,
            "content": word,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for n, word in enumerate(words[:3])
    ]
    model = {"type": "BPE", "vocab": {word: n for n, word in enumerate(words)}, "merges": [["a", "b"]]}
    return {"version": "1.0", "added_tokens": special, "model": model}


def model_folder(**changed: bytes | None) -> dict[str, bytes]:
    """Files of a model in Hugging Face layout, by name; `changed` replaces or (None) removes, `__` for the dot."""
    files: dict[str, bytes] = {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors": safetensors(),
        "tokenizer.json": json.dumps(tokenizer()).encode(),
        "tokenizer_config.json": json.dumps({"eos_token": "<|im_end|>", "chat_template": TEMPLATE}).encode(),
        "generation_config.json": json.dumps({"eos_token_id": [1, 2]}).encode(),
    }
    for name, data in changed.items():
        shown = name.replace("__", ".")
        if data is None:
            del files[shown]
        else:
            files[shown] = data
    return files


def write_model(folder: Path) -> Path:
    """Files of a model, in a folder that is made where it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in model_folder().items():
        (folder / name).write_bytes(content)
    return folder


def write_inputs(folder: Path) -> Path:
    """What a whole pipeline reads: `model`, and rows to train on and to evaluate with in its six tokens."""
    write_model(folder / "model")
    for name, ask, answer in (("train", "a", "b"), ("held", "b", "a")):
        rows = [{"messages": [_turn("user", ask, n), _turn("assistant", answer, n)]} for n in range(1, 20)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _turn(role: str, word: str, times: int) -> dict[str, str]:
    return {"role": role, "content": " ".join([word] * times)}


def text(value: str) -> bytes:
    """A string of GGUF."""
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, value: Any) -> bytes:
    """One metadata entry of GGUF; the type follows from the value."""
    return text(key) + _typed(value)


def _typed(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + text(value)
    kind = {str: STRING, int: INT32, float: FLOAT32}[type(value[0])]
    items = b"".join(
        text(item) if kind == STRING else struct.pack("<i" if kind == INT32 else "<f", item) for item in value
    )
    return struct.pack("<IIQ", ARRAY, kind, len(value)) + items


def gguf(metadata: Mapping[str, Any], tensors: Mapping[str, tuple[list[int], int]] | None = None) -> bytes:
    """A file of float32 zeros. tensors: shape and offset by name."""
    tensors = {"token_embd.weight": ([8, 6], 0)} if tensors is None else tensors
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    head += b"".join(entry(key, value) for key, value in metadata.items())
    end = 0
    for name, (shape, offset) in tensors.items():
        head += (
            text(name)
            + struct.pack("<I", len(shape))
            + struct.pack(f"<{len(shape)}Q", *shape)
            + struct.pack("<IQ", 0, offset)
        )
        size = 4
        for length in shape:
            size *= length
        end = max(end, offset + size)
    return head + b"\0" * (-len(head) % 32) + b"\0" * end


def gguf_metadata() -> dict[str, Any]:
    """Metadata of a model of six tokens."""
    return {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "llama.embedding_length": 8,
        "llama.block_count": 1,
        "llama.feed_forward_length": 16,
        "llama.attention.head_count": 2,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab"],
        "tokenizer.ggml.token_type": [3, 3, 3, 1, 1, 1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 0,
    }
