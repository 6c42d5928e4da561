from __future__ import annotations

import copy
import json

import pytest

from fastserve.plan.keys import data_of, inputs_of, outside, request_for, stage_keys, wanted_stages
from fastserve.plan.stages import Stage, StageRequest
from fastserve.spec.compress import CompressStep
from fastserve.spec.evaluate import Evaluate
from fastserve.spec.source import Source
from fastserve.spec.train import Train

GOLDEN = {"source": "e8375bab4e40", "train": "28589d01a6e2", "compress": "0502f33aa971", "evaluate": "c74d4e494933"}
ALL = [Stage.SOURCE, Stage.TRAIN, Stage.COMPRESS, Stage.EVALUATE]


def digests(model, **changed):
    found = {item.ident: f"digest of {item.ident}" for item in outside(model)}
    return found | {ident: digest for ident, digest in changed.items() if ident in found}


def keys(model, **changed):
    return stage_keys(model, digests(model) | changed)


def changed_stages(before, after):
    return [stage for stage in Stage if before.get(stage) != after.get(stage)]


def varied(model, all_stages, path, value):
    """The model with one value of its spec changed; path: keys joined by dots."""
    spec = copy.deepcopy(all_stages)
    block = spec
    *parents, last = path.split(".")
    for parent in parents:
        block = block[int(parent)] if isinstance(block, list) else block.setdefault(parent, {})
    block[last] = value
    return model(**spec)


def test_stages_that_the_manifest_leaves_out_are_absent(model):
    assert wanted_stages(model(serve={})) == (Stage.SOURCE,)
    assert list(keys(model(serve={}))) == [Stage.SOURCE]
    assert wanted_stages(model(evaluate={"data": "file:///e"})) == (Stage.SOURCE, Stage.EVALUATE)


def test_every_outside_source_is_listed_once_with_its_role(model, all_stages):
    all_stages["compress"][0]["quantize"]["calibration"] = {"data": "file:///data/train.jsonl"}
    all_stages["evaluate"]["tasks"] = [{"name": "t", "data": "file:///data/task.jsonl"}]
    all_stages["serve"] = {"adapters": [{"name": "de", "source": "s3://acme/de"}]}
    found = [(item.ident, item.role) for item in outside(model(**all_stages))]
    assert found == [
        ("file:///models/base", "model"),
        ("file:///data/train.jsonl", "data"),
        ("file:///data/held-out.jsonl", "data"),
        ("file:///data/task.jsonl", "data"),
        ("s3://acme/de", "adapter"),
    ]


def test_a_source_named_twice_keeps_the_entry_with_a_token(model):
    train = {"dataset": {"uri": "hf://acme/rows", "revision": "main"}}
    held_out = {"data": {"uri": "hf://acme/rows@main", "tokenSecret": "hub"}}
    found = outside(model(train=train, evaluate=held_out))
    assert [item.ident for item in found] == ["file:///models/base", "hf://acme/rows@main"]
    assert found[1].source.token_secret == "hub"


def test_inputs_name_what_each_stage_reads(model, all_stages):
    full = model(**all_stages)
    assert inputs_of(full, Stage.SOURCE) == {}
    assert inputs_of(full, Stage.TRAIN) == {"model": Stage.SOURCE}
    assert inputs_of(full, Stage.COMPRESS) == {"model": Stage.TRAIN}
    assert inputs_of(full, Stage.EVALUATE) == {
        "candidate": Stage.COMPRESS,
        "parent": Stage.TRAIN,
        "source": Stage.SOURCE,
    }
    no_compress = model(train=all_stages["train"], evaluate=all_stages["evaluate"])
    assert inputs_of(no_compress, Stage.EVALUATE) == {"candidate": Stage.TRAIN, "parent": Stage.SOURCE}
    no_train = model(compress=all_stages["compress"], evaluate=all_stages["evaluate"])
    assert inputs_of(no_train, Stage.COMPRESS) == {"model": Stage.SOURCE}
    assert inputs_of(no_train, Stage.EVALUATE) == {"candidate": Stage.COMPRESS, "parent": Stage.SOURCE}
    as_it_is = model(evaluate=all_stages["evaluate"])
    assert inputs_of(as_it_is, Stage.EVALUATE) == {"candidate": Stage.SOURCE, "parent": Stage.SOURCE}


def test_an_unresolved_source_leaves_out_its_stage_and_what_follows(model, all_stages):
    full = model(**all_stages)
    known = digests(full)
    del known["file:///data/train.jsonl"]
    assert list(stage_keys(full, known)) == [Stage.SOURCE]
    assert stage_keys(full, {}) == {}


@pytest.mark.parametrize(
    ("path", "value", "stages"),
    [
        ("source", {"uri": "file:///elsewhere/base"}, []),
        ("train.learningRate", 1e-3, ALL[1:]),
        ("train.seed", 1, ALL[1:]),
        ("train.lora", {"rank": 8}, ALL[1:]),
        ("train.workers", [{"profile": "local", "count": 2}], []),
        ("train.checkpoint", {"everySteps": 7}, []),
        ("train.elastic", {"minWorkers": 1}, []),
        ("train.activationCheckpointing", True, []),
        ("train.engine", "fsdp2", []),
        ("train.priority", 5, []),
        ("serve.priority", 5, []),
        ("train.packing", True, ALL[1:]),
        ("train.overLength", "drop", ALL[1:]),
        ("train.validation", {"data": "file:///data/validation.jsonl"}, ALL[1:]),
        ("compress.0.quantize.method", "roundToNearest", ALL[2:]),
        ("compress.0.quantize.calibration", {"rows": 16}, ALL[2:]),
        ("evaluate.maxRows", 20, ALL[3:]),
        ("evaluate.gate", {"perplexityIncrease": "1%"}, []),
        ("evaluate.gate", None, []),
        ("serve.context", 512, []),
        ("serve.engine", {"dtype": "float32", "kvCache": "1GiB"}, []),
        ("serve.replicas", {"min": 0, "max": 3}, []),
    ],
)
def test_a_change_runs_its_stage_and_the_later_ones_again(model, all_stages, path, value, stages):
    before = model(**all_stages)
    after = varied(model, all_stages, path, value)
    moved = {"file:///elsewhere/base": "digest of file:///models/base"}
    assert changed_stages(keys(before), keys(after, **moved)) == stages


def test_the_content_of_a_source_decides_and_not_its_place(model, all_stages):
    before, after = model(**all_stages), varied(model, all_stages, "train.dataset", "s3://acme/train.jsonl")
    same = {"s3://acme/train.jsonl": "digest of file:///data/train.jsonl"}
    assert keys(before) == keys(after, **same)
    assert changed_stages(keys(before), keys(before, **{"file:///data/train.jsonl": "other"})) == ALL[1:]
    assert changed_stages(keys(before), keys(before, **{"file:///models/base": "other"})) == ALL
    assert changed_stages(keys(before), keys(before, **{"file:///data/held-out.jsonl": "other"})) == ALL[3:]


def test_a_token_never_enters_a_key(model, all_stages):
    dataset = {"uri": "file:///data/train.jsonl", "tokenSecret": "secret"}
    after = varied(model, all_stages, "train.dataset", dataset)
    assert keys(model(**all_stages)) == keys(after)


@pytest.mark.parametrize("written", ["2e-4", "0.0002", "2.0e-4", "2E-4", "20e-5"])
def test_equal_numbers_written_differently_give_one_key(model, all_stages, written):
    after = varied(model, all_stages, "train.learningRate", json.loads(written))
    assert keys(after) == keys(model(**all_stages))


def test_a_whole_number_and_its_float_give_one_key(model, all_stages):
    one, other = (varied(model, all_stages, "train.lora", {"alpha": alpha}) for alpha in (32, 32.0))
    assert keys(one) == keys(other)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("train.method", "lora"),
        ("train.lora", {}),
        ("train.lora", {"rank": 16, "alpha": 32, "targets": []}),
        ("train.epochs", 1),
        ("train.batchTokens", 4096),
        ("train.workers", [{"profile": "local", "count": 1}]),
        ("train.packing", False),
        ("train.overLength", "truncate"),
        ("compress.0.quantize.calibration", {"rows": 64}),
        ("compress.0.quantize.calibration", {"data": "file:///data/train.jsonl"}),
        ("evaluate.context", 1024),
        ("serve.task", "generate"),
    ],
)
def test_a_default_written_out_gives_the_same_key(model, all_stages, path, value):
    assert keys(varied(model, all_stages, path, value)) == keys(model(**all_stages))


def test_scratch_settings_left_out_are_those_of_an_empty_block(model):
    bare, empty, small = (
        model(train={"dataset": "file:///d", "method": "scratch", **more})
        for more in ({}, {"scratch": {}}, {"scratch": {"config": {"num_hidden_layers": 2}}})
    )
    assert keys(bare) == keys(empty)
    assert changed_stages(keys(bare), keys(small)) == [Stage.TRAIN]


def test_validation_rows_are_an_outside_source_whose_content_decides(model):
    train = {"dataset": "file:///d", "validation": {"data": "file:///v", "patience": 3}}
    full = model(train=train)
    assert [item.ident for item in data_of(full, Stage.TRAIN)] == ["file:///d", "file:///v"]
    assert changed_stages(keys(full), keys(full, **{"file:///v": "other"})) == [Stage.TRAIN]
    moved = model(train=train | {"validation": {"data": "s3://b/v", "patience": 3}})
    assert keys(moved, **{"s3://b/v": "digest of file:///v"}) == keys(full)
    section = request_for(full, Stage.TRAIN, digests(full), 1).section
    assert Train.model_validate(section).validation.data.uri == "file:///v"


def test_a_request_carries_what_the_key_leaves_out(model):
    train = {"dataset": "file:///d", "engine": "fsdp2", "activationCheckpointing": True, "elastic": {"minWorkers": 1}}
    full = model(train=train)
    found = Train.model_validate(request_for(full, Stage.TRAIN, digests(full), 1).section)
    assert (found.engine, found.activation_checkpointing, found.elastic.min_workers) == ("fsdp2", True, 1)


def test_the_order_of_adapter_targets_does_not_matter(model, all_stages):
    one, other = (
        varied(model, all_stages, "train.lora", {"targets": targets}) for targets in (["a", "b"], ["b", "a", "a"])
    )
    assert keys(one) == keys(other)


def test_steps_and_the_epochs_that_they_replace_are_not_one_thing(model, all_stages):
    assert keys(varied(model, all_stages, "train.steps", 1)) != keys(model(**all_stages))


def test_calibration_rows_enter_the_compress_key(model, all_stages):
    own = varied(model, all_stages, "compress.0.quantize.calibration", {"data": "file:///data/own.jsonl"})
    assert changed_stages(keys(own), keys(own, **{"file:///data/own.jsonl": "other"})) == ALL[2:]
    assert [item.ident for item in data_of(own, Stage.COMPRESS)] == ["file:///data/own.jsonl"]
    borrowed = model(**all_stages)
    assert [item.ident for item in data_of(borrowed, Stage.COMPRESS)] == ["file:///data/train.jsonl"]
    without = model(compress=all_stages["compress"])
    assert data_of(without, Stage.COMPRESS) == ()


def test_the_name_of_the_model_does_not_enter_a_key(model, all_stages):
    assert keys(model(name="one", **all_stages)) == keys(model(name="two", **all_stages))


def test_a_request_can_be_read_again_as_the_section_it_came_from(model, all_stages):
    all_stages["train"]["workers"] = [{"profile": "local", "count": 2}]
    full = model(**all_stages)
    requests = {stage: request_for(full, stage, digests(full), 3) for stage in wanted_stages(full)}
    source = requests[Stage.SOURCE].section
    assert source == {"uri": "file:///models/base", "revision": None, "tokenSecret": None}
    assert Source.model_validate(source).uri == "file:///models/base"
    assert Train.model_validate(requests[Stage.TRAIN].section).worker_count == 2
    step = CompressStep.model_validate(requests[Stage.COMPRESS].section["steps"][0])
    assert step.quantize.calibration.data.uri == "file:///data/train.jsonl"
    assert Evaluate.model_validate(requests[Stage.EVALUATE].section).gate is None
    assert {request.attempt for request in requests.values()} == {3}
    assert all(StageRequest.from_json(request.to_json()) == request for request in requests.values())


def test_a_request_names_the_keys_stages_and_digests_that_it_reads(model, all_stages):
    full = model(**all_stages)
    found = keys(full)
    request = request_for(full, Stage.EVALUATE, digests(full), 1)
    assert request.key == found[Stage.EVALUATE]
    assert request.inputs["parent"] == found[Stage.TRAIN]
    assert request.input_stages["parent"] == Stage.TRAIN
    assert request.data == {"file:///data/held-out.jsonl": "digest of file:///data/held-out.jsonl"}


def test_keys_are_64_hex_digits_and_differ(model, all_stages):
    found = list(keys(model(**all_stages)).values())
    assert len(set(found)) == 4
    assert all(len(key) == 64 and set(key) <= set("0123456789abcdef") for key in found)


def test_keys_do_not_change_by_accident(model, all_stages):
    """A changed key trains every model anew. Change these only with a stage's FORMAT or a meant change of a section."""
    found = {stage.value: key[:12] for stage, key in keys(model(**all_stages)).items()}
    assert found == GOLDEN
