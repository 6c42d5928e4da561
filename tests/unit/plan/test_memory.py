from __future__ import annotations

from dataclasses import replace

import pytest

from fastserve.errors import InsufficientMemory
from fastserve.plan.facts import Hardware
from fastserve.plan.memory import (
    compressed_bytes,
    fits,
    linear_layers,
    lora_parameters,
    plan_cache,
    replica_memory_bytes,
    serving_memory,
)
from fastserve.spec.compress import CompressStep
from fastserve.spec.serve import Serve
from fastserve.spec.train import Lora

GIB = 2**30
MB = 10**6


def quantize(**settings):
    return CompressStep.model_validate({"quantize": settings})


def serve(**settings):
    return Serve.model_validate(settings)


def sizes(table):
    return {line.what: line.size_bytes for line in table.lines}


def test_the_shapes_of_the_linear_layers_add_up_to_the_model(smol):
    linear = smol.layers * sum(inputs * outputs for inputs, outputs in linear_layers(smol).values())
    norms = (2 * smol.layers + 1) * smol.hidden
    assert linear + norms + smol.vocab * smol.hidden == smol.parameters


@pytest.mark.parametrize(
    ("step", "measured_mb"),
    [
        (quantize(format="int8"), 163.2),
        (quantize(format="fp8"), 163.2),
        (quantize(format="int4", groupSize=64), 113.2),
        (quantize(format="int4"), 113.2),
    ],
)
def test_the_predicted_size_is_within_one_percent_of_the_measured_one(smol, step, measured_mb):
    assert compressed_bytes(smol, [step]) == pytest.approx(measured_mb * MB, rel=0.01)


def test_without_steps_the_size_stays(smol):
    assert compressed_bytes(smol, []) == smol.weight_bytes


def test_lora_counts_its_targets(smol):
    assert lora_parameters(smol, Lora()) == 4_884_480
    assert lora_parameters(smol, Lora(rank=8, targets=["q_proj"])) == 30 * 8 * (576 + 576)
    assert lora_parameters(smol, Lora(rank=8, targets=["renamed"])) == lora_parameters(smol, Lora(rank=8))


def test_what_does_not_fit_is_told_with_the_table_and_the_way_out(smol, laptop):
    table = replace(serving_memory(smol, serve(), smol.weight_bytes, laptop), copies=2)
    with pytest.raises(InsufficientMemory) as caught:
        fits(table, table.total_bytes - GIB)
    told = str(caught.value)
    assert caught.value.exit_code == 3
    for word in ("weights", "KV cache", "all 2", "so 1 GiB are missing", "Lower serve.context"):
        assert word in told


def test_the_cache_of_a_small_model_holds_four_long_sequences(smol, laptop):
    cache = plan_cache(smol, serve(), laptop)
    assert (cache.context, cache.sequences, cache.token_bytes) == (8192, 16, 23_040)
    assert cache.kv_cache_bytes >= 4 * 8192 * 23_040


def test_what_the_manifest_says_of_the_cache_is_kept(smol, laptop):
    cache = plan_cache(smol, serve(context=512, engine={"maxSequences": 3, "kvCache": "1GiB"}), laptop)
    assert (cache.context, cache.sequences, cache.kv_cache_bytes) == (512, 3, GIB)


def test_a_context_left_out_shrinks_to_what_the_cache_holds(smol, laptop):
    cache = plan_cache(smol, serve(engine={"kvCache": "64MiB"}), laptop)
    assert cache.context % 128 == 0
    assert (cache.context + 128) * cache.token_bytes <= 64 * 2**20
    small = plan_cache(smol, serve(), Hardware(cpus=1, memory_bytes=256 * 2**20))
    assert 128 <= small.context < 8192


def test_a_context_that_is_asked_for_is_never_shrunk(smol):
    tiny = Hardware(cpus=1, memory_bytes=128 * 2**20)
    cache = plan_cache(smol, serve(context=8192), tiny)
    assert cache.context == 8192
    assert cache.kv_cache_bytes >= 8192 * 23_040
    with pytest.raises(InsufficientMemory, match=r"serve\.context"):
        fits(serving_memory(smol, serve(context=8192), smol.weight_bytes, tiny), tiny.memory_bytes)


def test_a_cache_below_one_sequence_is_refused_with_both_figures(smol, laptop):
    with pytest.raises(InsufficientMemory, match=r"serve\.engine\.kvCache is 64 MiB.*23040 bytes a token"):
        serving_memory(smol, serve(context=8192, engine={"kvCache": "64MiB"}), 1, laptop)


def test_float32_doubles_the_cache(smol, laptop):
    one, other = (plan_cache(smol, serve(engine={"dtype": dtype}), laptop) for dtype in ("bfloat16", "float32"))
    assert other.token_bytes == 2 * one.token_bytes


def test_serving_counts_the_artifact_that_is_served(smol, laptop):
    table = serving_memory(smol, serve(), 163 * MB, laptop)
    assert sizes(table)["weights"] == 163 * MB
    assert 2 * GIB < table.total_bytes < 4 * GIB
    assert fits(table, laptop.memory_bytes).to_json()["availableBytes"] == laptop.memory_bytes


def test_on_an_accelerator_the_engine_takes_what_is_left(smol):
    card = Hardware(cpus=8, memory_bytes=32 * GIB, accelerators=1, accelerator_memory_bytes=24 * GIB)
    assert plan_cache(smol, serve(), card).kv_cache_bytes is None
    assert serving_memory(smol, serve(), smol.weight_bytes, card).total_bytes < 4 * GIB


def test_a_replica_has_the_accelerators_of_its_profile_and_elsewhere_the_machine():
    card = Hardware(cpus=8, memory_bytes=2**36, accelerators=4, accelerator_memory_bytes=24 * 2**30)
    alone, spread = Serve(), Serve.model_validate({"engine": {"tensorParallel": 2}})
    assert replica_memory_bytes(alone, card, described=True) == 24 * 2**30
    assert replica_memory_bytes(spread, card, described=True) == 48 * 2**30
    assert replica_memory_bytes(alone, Hardware(cpus=8, memory_bytes=2**36), described=True) == 2**36
    assert replica_memory_bytes(alone, card, described=False) == 2**36
