"""Samples as tensors: filled up or packed, each has the loss and the gradient that it has alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fastserve.data.samples import Sample
from fastserve.errors import NotExecutable
from fastserve.stages.train.corpus import Corpus, Rectangle
from fastserve.stages.train.packing import PACKABLE, require_packable

VOCABULARY = 96
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "attn_pdrop": 0,
        "embd_pdrop": 0,
        "resid_pdrop": 0,
    },
    "mixtral": {"num_local_experts": 4},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma2": {"layer_types": ["sliding_attention", "full_attention"]},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 0},
}
KINDS = ["llama", "gpt2", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "mistral", "mixtral", "phi3", "gpt_neox"]


def model_of(kind: str, attention: str) -> torch.nn.Module:
    config = AutoConfig.for_model(kind, **{**SHAPE, **OTHERS.get(kind, {})})
    torch.manual_seed(3)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.float().train()


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Four samples, longer and shorter than the window; in each the second half is trained."""
    random = np.random.default_rng(5)
    lengths = [21, 5, 17, 9]
    return Corpus.of(
        [
            Sample(
                ids=random.integers(3, VOCABULARY, length).tolist(),
                trained=[False] * (length // 2) + [True] * (length - length // 2),
                digest="",
                place="",
                full_length=length,
            )
            for length in lengths
        ]
    )


def loss_and_gradient(model: torch.nn.Module, rectangles: list[Rectangle]) -> tuple[float, torch.Tensor]:
    """Sum of the trained tokens' losses, and the whole gradient."""
    model.zero_grad()
    total = 0.0
    for rectangle in rectangles:
        logits = model(
            input_ids=rectangle.ids_BL,
            position_ids=rectangle.positions_BL,
            attention_mask=rectangle.mask,
            use_cache=False,
        ).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1)[rectangle.predicts_K], rectangle.targets_K, reduction="sum"
        )
        loss.backward()
        total += loss.item()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return total, torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_row_has_the_loss_and_gradient_of_its_samples_alone(kind: str, attention: str, corpus: Corpus) -> None:
    assert kind in PACKABLE
    model = model_of(kind, attention)
    samples = [0, 1, 2, 3]
    loss, gradient = loss_and_gradient(model, [corpus.rectangle([sample]) for sample in samples])
    filled_loss, filled = loss_and_gradient(model, [corpus.rectangle(samples)])
    packed_loss, packed = loss_and_gradient(model, [corpus.packed(samples)])
    assert gradient.norm() > 1
    for other_loss, other in ((filled_loss, filled), (packed_loss, packed)):
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert ((other - gradient).norm() / gradient.norm()).item() < 1e-6


def test_packed_samples_that_were_not_kept_apart_would_be_another_loss(corpus: Corpus) -> None:
    model = model_of("llama", "sdpa")
    packed = corpus.packed([0, 1, 2, 3])
    right, _ = loss_and_gradient(model, [packed])
    mixed, _ = loss_and_gradient(model, [Rectangle(packed.ids_BL, packed.predicts_K, packed.targets_K)])
    assert abs(mixed - right) / right > 1e-4


@pytest.mark.parametrize("kind", ["bloom", "mamba", "jamba", "opt", "made_up"])
def test_models_that_would_learn_across_samples_are_refused_by_name(kind: str) -> None:
    with pytest.raises(
        NotExecutable, match=rf"spec\.train\.packing: samples of {kind} cannot be packed.*remove packing"
    ):
        require_packable({"model_type": kind})


def test_bloom_really_is_not_exact(corpus: Corpus) -> None:
    model = model_of("bloom", "eager").eval()
    alone = [corpus.rectangle([sample]) for sample in (0, 1)]
    loss = sum(loss_of_logits(model(input_ids=one.ids_BL).logits, one) for one in alone)
    packed = corpus.packed([0, 1])
    with torch.no_grad():
        logits = model(input_ids=packed.ids_BL).logits
    assert abs(loss_of_logits(logits, packed) - loss) / loss > 1e-6


def loss_of_logits(logits: torch.Tensor, rectangle: Rectangle) -> float:
    picked = logits.flatten(0, 1)[rectangle.predicts_K]
    return torch.nn.functional.cross_entropy(picked, rectangle.targets_K, reduction="sum").item()


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "phi3", "rope_scaling": {"type": "longrope"}},
        {"model_type": "llama", "rope_parameters": {"rope_type": "dynamic"}},
        {"model_type": "gemma3_text", "rope_parameters": {"full_attention": {"rope_type": "dynamic"}}},
    ],
)
def test_positions_that_depend_on_the_row_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(NotExecutable, match="positions depend on their neighbours"):
        require_packable(config)


def test_what_keeps_samples_apart_is_let_through() -> None:
    require_packable({"model_type": "llama", "rope_parameters": {"rope_type": "llama3", "factor": 8.0}})
    require_packable({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}})


def test_the_tensors_of_packed_rows(corpus: Corpus) -> None:
    packed = corpus.packed([1, 3])
    assert packed.ids_BL.shape == (1, 14)
    assert packed.positions_BL is not None
    assert packed.positions_BL.tolist() == [[*range(9), *range(5)]]
    assert packed.predicts_K.tolist() == [3, 4, 5, 6, 7, 10, 11, 12]
    assert torch.equal(packed.targets_K, packed.ids_BL[0, packed.predicts_K + 1])
    assert packed.to(torch.device("cpu")) is packed
    packed = corpus.packed([0, 1, 2, 3])
    assert packed.ids_BL.shape == (2, 26)
    assert packed.positions_BL is not None
    assert packed.positions_BL.tolist() == [[*range(21), *range(5)], [*range(17), *range(9)]]


def test_what_fills_a_row_up_is_kept_apart_and_not_trained() -> None:
    corpus = Corpus.of([Sample([5] * n, [True] * n, "", "", n) for n in (7, 6)])
    packed = corpus.packed([1, 0])
    assert packed.positions_BL is not None
    assert packed.positions_BL.tolist() == [[*range(7), *range(6)]] or packed.positions_BL.tolist() == [
        [*range(7)],
        [*range(6), 0],
    ]
    assert packed.targets_K.tolist() == [5] * 11


def test_the_first_token_of_a_packed_sample_is_never_predicted_by_its_neighbour() -> None:
    corpus = Corpus.of([Sample([5, 6], [True, True], "", "", 2), Sample([7, 8], [True, True], "", "", 2)])
    assert corpus.packed([0, 1]).targets_K.tolist() == [6, 8]
    assert corpus.rectangle([0, 1]).targets_K.tolist() == [6, 8]


def test_counts_are_plain_numbers(corpus: Corpus) -> None:
    assert (corpus.tokens([0, 3]), corpus.trained_tokens([0, 3])) == (30, 16)
    assert {type(corpus.tokens([0])), type(corpus.trained_tokens([0]))} == {int}
    assert corpus.lengths.tolist() == [21, 5, 17, 9]
    assert corpus.lengths.dtype == np.int32
