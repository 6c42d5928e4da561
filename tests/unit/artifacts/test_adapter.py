"""Adapters read from their folders; the public case with its exact facts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_adapters import write_adapter

from fastserve.artifacts.adapter import read_adapter
from fastserve.errors import SourceInvalid

CASES = Path(__file__).parents[2] / "data" / "cases"


def test_the_rank_is_read_without_the_weights(tmp_path: Path) -> None:
    found = read_adapter(CASES / "15-rank48", "adapter a48")
    assert (found.rank, found.modules) == (48, ("q_proj",))
    assert found.size_bytes == 2 * 48 * 576 * 2


def test_a_whole_head_is_refused_with_what_to_do() -> None:
    with pytest.raises(SourceInvalid) as caught:
        read_adapter(CASES / "15-extra-head", "adapter head")
    message = str(caught.value)
    assert message.startswith("adapter head: tensor base_model.model.lm_head.weight ")
    assert "modules_to_save" in message
    assert "merge it into the model" in message
    assert "a model of its own" in message


def test_a_configuration_that_says_another_rank_names_both(tmp_path: Path) -> None:
    with pytest.raises(SourceInvalid, match=r"adapter a: .* r: 48, but tensor .* has rank 8"):
        read_adapter(write_adapter(tmp_path / "a", r=48), "adapter a")


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_is_missing_is_named(tmp_path: Path, missing: str) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / missing).unlink()
    with pytest.raises(SourceInvalid, match=f"adapter a: has no {missing}"):
        read_adapter(folder, "adapter a")


def test_torn_weights_and_code_are_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(SourceInvalid, match=r"adapter a: .*adapter_model\.safetensors"):
        read_adapter(folder, "adapter a")
    other = write_adapter(tmp_path / "b")
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(settings | {"auto_map": {"base_model_class": "x.Y"}}))
    read = pytest.raises(SourceInvalid, match="auto_map")
    with read:
        read_adapter(other, "adapter b")


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder = write_adapter(tmp_path / "a")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file(
        {name.format("A"): torch.zeros(8, 32, dtype=torch.int8), name.format("B"): torch.zeros(32, 8)},
        folder / "adapter_model.safetensors",
    )
    with pytest.raises(SourceInvalid, match="of type I8"):
        read_adapter(folder, "adapter a")
