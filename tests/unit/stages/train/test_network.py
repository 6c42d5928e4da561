"""What is trained of a model, found by structure alone: blocks, linear layers, names of stored weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import ARCHITECTURES, BLOCKS, write_model
from safetensors.torch import load_file, save_file
from tiny_llama import write_tiny_llama
from torch import nn

from fastserve.errors import NotExecutable, StageFailed
from fastserve.spec.train import Train
from fastserve.stages.train.adapters import target_names
from fastserve.stages.train.loading import load_network
from fastserve.stages.train.network import Network, as_stored, blocks_of, empty_model, read_config


def section(**values: Any) -> Train:
    return Train.model_validate({"dataset": "x", "precision": "fp32", **values})


def network(folder: Path, **values: Any) -> Network:
    return load_network(folder, section(**values), longest=64)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_model(kind, tmp_path_factory.mktemp("zoo") / kind) for kind in ARCHITECTURES}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_blocks_are_found_in_any_architecture(zoo: dict[str, Path], name: str, method: str) -> None:
    found = network(zoo[name], method=method)
    prefix = "base_model.model." if method == "lora" else ""
    assert list(found.blocks) == [f"{prefix}{BLOCKS[name]}.{index}" for index in range(2)]
    known = dict(found.model.named_modules())
    assert all(block in known for block in found.blocks)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_adapters_go_on_the_linear_layers_of_the_blocks_and_nowhere_else(zoo: dict[str, Path], name: str) -> None:
    found = network(zoo[name], method="lora", lora={"rank": 2, "alpha": 4})
    assert found.trained
    assert all(any(block + "." in parameter for block in found.blocks) for parameter in found.trained)
    assert all(".lora_" in parameter for parameter in found.trained)
    assert all(parameter.dtype == torch.float32 for parameter in found.trained.values())


def test_a_list_of_experts_inside_a_block_is_no_list_of_blocks() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(9))

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(5))
            self.layers = nn.ModuleList(Block() for _ in range(2))

    assert blocks_of(Decoder()) == ["layers.0", "layers.1"]
    assert blocks_of(nn.Linear(2, 2)) == []


def test_the_same_seed_gives_every_worker_the_same_adapters(tiny_model: Path) -> None:
    one, two = network(tiny_model, seed=5), network(tiny_model, seed=5)
    other = network(tiny_model, seed=6)
    assert all(torch.equal(one.trained[name], two.trained[name]) for name in one.trained)
    assert any(not torch.equal(one.trained[name], other.trained[name]) for name in one.trained)


@pytest.mark.parametrize(
    ("targets", "word"),
    [(["q_proj", "c_attn"], "'c_attn'"), (["norm"], "'norm'"), (["embed_tokens"], "'embed_tokens'")],
)
def test_a_target_that_is_no_linear_layer_is_refused_with_those_there_are(
    tiny_model: Path, targets: list[str], word: str
) -> None:
    with pytest.raises(NotExecutable, match=word) as refused:
        network(tiny_model, lora={"targets": targets})
    assert "q_proj" in str(refused.value)
    assert "spec.train.lora.targets" in str(refused.value)


def test_a_head_that_is_the_embedding_gets_no_adapter(tiny_model: Path) -> None:
    with pytest.raises(NotExecutable, match="'lm_head' shares its weight"):
        network(tiny_model, lora={"targets": ["lm_head"]})


def test_a_model_without_linear_layers_is_refused() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.LayerNorm(4) for _ in range(2))

    with pytest.raises(NotExecutable, match="write method: full"):
        target_names(Plain(), [], ["layers.0", "layers.1"])


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_masters_lose_nothing_of_what_is_stored(tmp_path: Path, stored: str) -> None:
    folder = write_tiny_llama(tmp_path / "model", dtype=stored)
    found = network(folder, method="full", precision="bf16")
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(found.trained[name].float(), weights[name].float()) for name in weights)
    assert {parameter.dtype for parameter in found.trained.values()} == {getattr(torch, stored)}


def test_a_frozen_base_is_in_the_computing_precision(tiny_model: Path) -> None:
    found = network(tiny_model, method="lora", precision="bf16")
    frozen = {name: parameter.dtype for name, parameter in found.model.named_parameters() if name not in found.trained}
    assert set(frozen.values()) == {torch.bfloat16}


def test_fused_experts_are_traced_back_to_the_stored_ones(zoo: dict[str, Path]) -> None:
    found = network(zoo["mixtral"], method="full")
    assert found.export["converted"]
    stored = as_stored(empty_model(read_config(zoo["mixtral"])), {n: p.detach() for n, p in found.trained.items()})
    weights = load_file(zoo["mixtral"] / "model.safetensors")
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], weights[name]) for name in weights)


def test_weights_under_foreign_names_are_refused(tmp_path: Path) -> None:
    from transformers.core_model_loading import revert_weight_conversion  # noqa: F401 - the name this leans on

    folder = write_tiny_llama(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["foreign"] = weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageFailed, match=r"model\.norm\.weight"):
        network(folder, method="full")


def test_scratch_needs_no_weights_and_follows_from_the_seed(tiny_model: Path, tmp_path: Path) -> None:
    config = read_config(tiny_model) | {"num_hidden_layers": 3, "hidden_size": 16}
    one = load_network(tmp_path, section(method="scratch", seed=4), 64, config=config)
    two = load_network(tmp_path, section(method="scratch", seed=4), 64, config=config)
    other = load_network(tmp_path, section(method="scratch", seed=5), 64, config=config)
    assert list(one.blocks) == [f"model.layers.{index}" for index in range(3)]
    assert all(torch.equal(one.trained[name], two.trained[name]) for name in one.trained)
    assert not torch.equal(one.trained["model.embed_tokens.weight"], other.trained["model.embed_tokens.weight"])
    assert one.trained["model.embed_tokens.weight"].shape == (259, 16)
    assert one.model.training


def test_a_method_that_needs_weights_says_so(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    with pytest.raises(StageFailed, match="write method: scratch"):
        network(tmp_path, method="full")


def test_four_bits_are_refused_where_no_device_can(tiny_model: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a device that can")
    with pytest.raises(NotExecutable, match=r"spec\.train\.method: qlora .* write method: lora"):
        network(tiny_model, method="qlora")


def test_eight_bit_floats_are_for_products_alone(tiny_model: Path) -> None:
    loaded = network(tiny_model, method="full", precision="fp8")
    assert not any(parameter.dtype.itemsize == 1 for parameter in loaded.model.parameters())
    with torch.no_grad():
        ids = torch.arange(8).unsqueeze(0)
        eight = loaded.model(input_ids=ids).logits
        sixteen = network(tiny_model, method="full", precision="bf16").model(input_ids=ids).logits
    assert not torch.equal(eight, sixteen)
    assert torch.nn.functional.cosine_similarity(eight.flatten().float(), sixteen.flatten().float(), dim=0) > 0.99
