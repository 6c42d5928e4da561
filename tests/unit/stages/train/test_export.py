"""The trained model loads in transformers and computes what was trained, whatever its architecture and method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import ARCHITECTURES, write_model
from safetensors.torch import load_file

from fastserve.artifacts.describe import describe
from fastserve.errors import StageFailed
from fastserve.spec.train import Train
from fastserve.stages.train.export import export
from fastserve.stages.train.loading import load_network
from fastserve.stages.train.network import Network
from fastserve.stages.train.state import RunState

IDS = torch.tensor([[5, 9, 77, 130, 2, 40]])
CURVE = [{"step": 1, "loss": 5.0, "tokens": 9, "trainedTokens": 8, "learningRate": 1e-3}]


def trained(folder: Path, config: dict[str, Any] | None = None, **values: Any) -> Network:
    """A network whose trained values have moved, as after a step."""
    section = Train.model_validate({"dataset": "x", "precision": "fp32", **values})
    network = load_network(folder, section, longest=64, config=config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.trained.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def write(source: Path, network: Network, into: Path) -> Path:
    into.mkdir()
    parameters = {name: parameter.detach().float() for name, parameter in network.trained.items()}
    run = RunState(step=1, curve=CURVE, export=json.loads(json.dumps(network.export)))
    export(source, run, parameters, into)
    return into


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager")


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_was_trained_is_what_is_loaded(kind: str, method: str, tmp_path: Path) -> None:
    source = write_model(kind, tmp_path / "source")
    network = trained(source, method=method)
    model = write(source, network, tmp_path / "artifact") / "model"
    torch.testing.assert_close(logits(loaded(model)), logits(network.model), atol=2e-4, rtol=1e-4)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, model))
    assert {name: tensor.shape for name, tensor in before.items()} == {n: t.shape for n, t in after.items()}
    assert not torch.allclose(logits(loaded(model)), logits(loaded(source)), atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_the_adapter_alone_is_read_by_peft(kind: str, tmp_path: Path) -> None:
    from peft import PeftModel

    source = write_model(kind, tmp_path / "source")
    network = trained(source, method="lora", lora={"rank": 4, "alpha": 8})
    adapter = write(source, network, tmp_path / "artifact") / "adapter"
    together = PeftModel.from_pretrained(loaded(source), adapter)
    torch.testing.assert_close(logits(together), logits(network.model), atol=1e-5, rtol=1e-5)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert all("." not in name for name in config["target_modules"])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_model_from_scratch_is_a_whole_model(kind: str, tmp_path: Path) -> None:
    source = write_model(kind, tmp_path / "source")
    for file in source.glob("*.safetensors"):
        file.unlink()
    network = trained(source, method="scratch", seed=3)
    model = write(source, network, tmp_path / "artifact") / "model"
    torch.testing.assert_close(logits(loaded(model)), logits(network.model), atol=1e-5, rtol=1e-5)
    config = json.loads((model / "config.json").read_text())
    assert (config["dtype"], config["architectures"]) == ("float32", [ARCHITECTURES[kind][0]])
    facts = describe(model)
    assert (facts.architecture, facts.dtype, facts.vocab) == (ARCHITECTURES[kind][0], "float32", 259)
    assert (model / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_model_from_scratch_is_stored_as_it_computed(tmp_path: Path) -> None:
    source = write_model("llama", tmp_path / "source")
    network = trained(source, method="scratch", precision="bf16")
    model = write(source, network, tmp_path / "artifact") / "model"
    tensors = load_file(model / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in tensors, "a tied head is stored once"
    assert loaded(model).dtype == torch.bfloat16


def test_large_weights_from_scratch_are_stored_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastserve.stages.train.export.LARGEST_FILE", "40KB")
    source = write_model("llama", tmp_path / "source")
    network = trained(source, method="scratch")
    model = write(source, network, tmp_path / "artifact") / "model"
    assert len(list(model.glob("*.safetensors"))) > 1
    assert (model / "model.safetensors.index.json").is_file()
    torch.testing.assert_close(logits(loaded(model)), logits(network.model), atol=1e-5, rtol=1e-5)


def test_a_trained_value_without_a_stored_weight_is_refused(tmp_path: Path) -> None:
    source = write_model("llama", tmp_path / "source")
    run = RunState(step=1, curve=CURVE, export={"method": "full", "aliases": {}})
    (tmp_path / "artifact").mkdir()
    with pytest.raises(StageFailed, match="nowhere was trained"):
        export(source, run, {"nowhere": torch.zeros(2)}, tmp_path / "artifact")


def test_the_curve_lies_beside_the_model(tmp_path: Path) -> None:
    source = write_model("llama", tmp_path / "source")
    folder = write(source, trained(source, method="full"), tmp_path / "artifact")
    assert [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()] == CURVE
    import importlib.util

    assert (folder / "curve.png").is_file() == (importlib.util.find_spec("matplotlib") is not None)
