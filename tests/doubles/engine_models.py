"""Tiny random models of several architectures, and the batches and steps that the engine's tests put them through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama  # noqa: F401 - loaded here, so that no forked rank does it

from fastserve.stages.train.network import Network, blocks_of

VOCABULARY = 128
TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCABULARY}
GROUPED = {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**TINY, **GROUPED, "tie_word_embeddings": False},
    "llama-tied": {**TINY, **GROUPED, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
    | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "qwen2": {**TINY, **GROUPED, "tie_word_embeddings": True},
    "qwen3": {**TINY, **GROUPED, "head_dim": 8},
    "gemma": {**TINY, **GROUPED, "head_dim": 8},
    "phi": {**TINY, "intermediate_size": 48, "max_position_embeddings": 64, "resid_pdrop": 0.0},
    "falcon": {**TINY, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "gpt_neox": {**TINY, "intermediate_size": 48, "max_position_embeddings": 64},
    "mixtral": {**TINY, **GROUPED, "num_local_experts": 4, "num_experts_per_tok": 1},
}


def model_of(kind: str = "llama", seed: int = 3, **changes: Any) -> Any:
    """A causal language model of an architecture in `CONFIGS`, fp32, the same for the same seed."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind.partition("-")[0], **{**CONFIGS[kind], **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.2)  # gradients large enough to be told from rounding
    return model.train()


def full(kind: str = "llama", **changes: Any) -> Network:
    """All of it trained."""
    model = model_of(kind, **changes)
    return Network(model, dict(model.named_parameters()), {}, blocks_of(model))


def lora(kind: str = "llama", **changes: Any) -> Network:
    """Adapters on the attention trained, with values that are not zero."""
    model = get_peft_model(
        model_of(kind, **changes), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    )
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(0, 0.1)
    return Network(model, trained, {}, blocks_of(model))


def samples(count: int, length: int = 12, seed: int = 5) -> torch.Tensor:
    """Token ids, shape [count, length]."""
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Sum of the losses of all tokens but the first, a scalar."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def trained_tokens(ids: torch.Tensor) -> int:
    """Tokens that `loss_of` sums over."""
    return ids[:, 1:].numel()


def micro_batches(ids: torch.Tensor, counts: Sequence[Sequence[int]], rank: int) -> list[torch.Tensor]:
    """This rank's part of `ids`. counts: samples by micro-batch and rank, shape [micro-batches][ranks]."""
    found, begin = [], 0
    for row in counts:
        begin_of_rank = begin + sum(row[:rank])
        found.append(ids[begin_of_rank : begin_of_rank + row[rank]])
        begin += sum(row)
    return found


def accumulate(engine: Any, micros: Sequence[torch.Tensor]) -> float:
    """Gradients of the micro-batches into the engine; returns this rank's summed loss."""
    total = 0.0
    for ids in micros:
        if len(ids):
            loss = loss_of(engine.model, ids)
            engine.backward(loss)
            total += loss.item()
        else:
            engine.idle()
    return total


def difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of what is wanted, all tensors together."""
    assert set(found) == set(wanted)
    apart = sum(float((found[name] - tensor).double().pow(2).sum()) for name, tensor in wanted.items())
    return float((apart / sum(float(tensor.double().pow(2).sum()) for tensor in wanted.values())) ** 0.5)
