"""Tiny models of several architectures, so that nothing leans on the names of one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SHAPE = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
GPT2 = {"vocab_size": 259, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_inner": 64}
DROPLESS = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SHAPE | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", SHAPE | {"head_dim": 8, "tie_word_embeddings": False}),
    "gpt2": ("GPT2LMHeadModel", GPT2 | DROPLESS),
    "gpt_neox": ("GPTNeoXForCausalLM", SHAPE),
    "opt": ("OPTForCausalLM", SHAPE | {"ffn_dim": 64, "word_embed_proj_dim": 16, "dropout": 0.0}),
    "mixtral": ("MixtralForCausalLM", SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
BLOCKS = {
    "llama": "model.layers",
    "qwen3": "model.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
    "mixtral": "model.layers",
}


def write_model(kind: str, folder: Path) -> Path:
    """A tiny model of `kind` in Hugging Face layout, as transformers stores it, with the byte-level tokenizer."""
    import torch
    from tiny_llama import write_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture, shape = ARCHITECTURES[kind]
    write_tokenizer(folder)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, architectures=[architecture], **shape))
    model.save_pretrained(folder)
    return folder
