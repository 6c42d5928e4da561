import json

import pytest

from fastserve.errors import DatasetInvalid, SourceInvalid
from fastserve.stages.compress import int8
from fastserve.stages.compress.calibration import spread
from fastserve.stages.compress.run import choose_method, require_unquantised, weight_bytes


@pytest.mark.parametrize(
    ("wanted", "has_rows", "method"),
    [
        ("auto", True, "gptq"),
        ("auto", False, "roundToNearest"),
        ("roundToNearest", True, "roundToNearest"),
        ("roundToNearest", False, "roundToNearest"),
        ("gptq", True, "gptq"),
        ("smoothquantGptq", True, "smoothquantGptq"),
    ],
)
def test_auto_calibrates_where_there_are_rows(wanted, has_rows, method):
    assert choose_method(wanted, has_rows) == method


@pytest.mark.parametrize("wanted", ["gptq", "smoothquantGptq"])
def test_a_method_that_needs_rows_is_refused_without_them(wanted):
    with pytest.raises(DatasetInvalid, match=r"calibration\.data"):
        choose_method(wanted, has_rows=False)


def test_a_model_that_is_already_quantised_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "compressed-tensors"}}))
    with pytest.raises(SourceInvalid, match=r"compressed-tensors.*remove spec\.compress"):
        require_unquantised(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    require_unquantised(tmp_path)


def test_only_weights_count_as_bytes(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(bytes(10))
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(bytes(5))
    (tmp_path / "tokenizer.json").write_bytes(bytes(99))
    assert weight_bytes(tmp_path) == 15


@pytest.mark.parametrize(
    ("count", "wanted", "chosen"),
    [(3, 5, [0, 1, 2]), (10, 5, [0, 2, 4, 6, 8]), (7, 3, [0, 2, 4]), (5, 5, [0, 1, 2, 3, 4])],
)
def test_calibration_rows_are_spread_over_the_data_set(count, wanted, chosen):
    assert spread(count, wanted) == chosen


def test_everything_but_weights_and_config_is_carried_over_as_it_is(tmp_path):
    model, target = tmp_path / "model", tmp_path / "target"
    model.mkdir()
    target.mkdir()
    kept = {
        "tokenizer.json": "{}",
        "chat_template.jinja": "{{ messages }}\n",
        "generation_config.json": '{"eos_token_id": [2, 7]}',
    }
    for name, text in {
        **kept,
        "config.json": "old",
        "model.safetensors": "old",
        "model.safetensors.index.json": "old",
    }.items():
        (model / name).write_text(text)
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (target / name).write_text("new")
    int8.copy_companions(model, target)
    assert {file.name: file.read_text() for file in target.iterdir()} == kept | {
        "config.json": "new",
        "model.safetensors": "new",
    }
