"""A run before it runs: workers of the manifest, what they need, what is refused, what is shown."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fastserve.errors import InsufficientHardware, InsufficientMemory, ManifestInvalid
from fastserve.plan.facts import DatasetFacts, Hardware
from fastserve.plan.memory import lora_parameters
from fastserve.plan.training import (
    MICRO_BATCH_TOKENS,
    plan_training,
    require_targets,
    training_facts,
    worker_facts,
)
from fastserve.spec.hardware import HardwareProfileSpec
from fastserve.spec.train import Lora, Train

GIB = 2**30

PROFILES = {
    "h100": HardwareProfileSpec.model_validate(
        {"accelerator": {"type": "H100", "memory": "80GiB", "count": 8}, "cpus": 64, "memory": "1TiB"}
    ),
    "l4": HardwareProfileSpec.model_validate(
        {"accelerator": {"type": "L4", "memory": "24GiB"}, "cpus": 8, "memory": "32GiB"}
    ),
    "cpu": HardwareProfileSpec.model_validate({"cpus": 32, "memory": "64GiB"}),
}


def train(**settings):
    return Train.model_validate({"dataset": "file:///d", **settings})


def groups(*written):
    return [
        {"profile": profile, "count": count, **({"speed": speed} if speed else {})} for profile, count, speed in written
    ]


def sizes(table):
    return {line.what: line.size_bytes for line in table.lines}


class TestFacts:
    def test_full_training_keeps_16_bytes_a_number(self, smol):
        for precision in ("bf16", "fp32"):
            found = training_facts(smol, train(method="full", precision=precision))
            assert found.state_bytes == 16 * smol.parameters
            assert found.frozen_bytes == 0
        assert found.unit_bytes * smol.layers + found.root_bytes == 4 * smol.parameters

    def test_lora_keeps_16_bytes_an_adapter_number_and_the_model_frozen(self, smol):
        found = training_facts(smol, train())
        assert found.state_bytes == 16 * lora_parameters(smol, Lora())
        assert found.frozen_bytes == 2 * smol.parameters
        assert found.root_bytes == 0
        assert found.frozen_unit_bytes * smol.layers + found.frozen_root_bytes == found.frozen_bytes

    def test_qlora_keeps_the_blocks_in_four_bits(self, smol):
        four, sixteen = (training_facts(smol, train(method=method)) for method in ("qlora", "lora"))
        assert four.state_bytes == sixteen.state_bytes
        blocks = smol.parameters - smol.vocab * smol.hidden
        assert sixteen.frozen_bytes - four.frozen_bytes == pytest.approx(blocks * (2 - 4.5 / 8), rel=0.01)

    def test_longer_samples_need_more_and_no_sample_is_longer_than_the_model_takes(self, smol):
        assert training_facts(smol, train(maxLength=64)).longest_tokens == 64
        assert training_facts(smol, train(maxLength=100_000)).longest_tokens == 8192

    def test_activation_checkpointing_keeps_less(self, smol):
        kept, computed = (
            training_facts(smol, train(activationCheckpointing=flag)).activation_bytes_per_token
            for flag in (False, True)
        )
        assert computed < kept
        # The logits stay.
        assert computed > 3 * 4 * smol.vocab

    def test_a_cpu_worker_loads_the_whole_model_first(self, smol):
        def loaded(**settings):
            return training_facts(smol, train(**settings)).loaded_bytes

        assert loaded(method="full", precision="bf16") == 2 * smol.parameters  # as it is stored
        assert loaded(method="full", precision="fp32") == 4 * smol.parameters
        assert loaded(method="scratch") == 4 * smol.parameters
        assert loaded() == 2 * smol.parameters + 4 * lora_parameters(smol, Lora())
        assert training_facts(smol, train(), accelerated=True).loaded_bytes == 0

    def test_short_samples_attend_through_a_matrix(self, smol):
        short, long = (training_facts(smol, train(maxLength=length)) for length in (256, 257))
        assert short.activation_bytes_per_token > long.activation_bytes_per_token

    def test_on_accelerators_the_copy_for_checkpoints_is_in_main_memory(self, smol):
        assert training_facts(smol, train(), accelerated=True).copy_bytes == 0
        assert training_facts(smol, train()).copy_bytes == 12 * lora_parameters(smol, Lora())


class TestWorkers:
    def test_local_workers_share_cores_and_memory(self, smol, laptop):
        one = worker_facts(smol, train(), laptop, {})
        two = worker_facts(smol, train(workers=groups(("local", 2, None))), laptop, {})
        assert [worker.memory_bytes for worker in two] == [12 * GIB, 12 * GIB]
        assert sum(worker.tokens_per_s for worker in two) == pytest.approx(one[0].tokens_per_s)
        assert {worker.most_tokens for worker in two} == {MICRO_BATCH_TOKENS}

    def test_given_speeds_are_relative(self, smol, laptop):
        written = groups(("local", 1, 4), ("local", 1, 2), ("local", 1, None))
        found = worker_facts(smol, train(workers=written), laptop, {})
        (alone,) = worker_facts(smol, train(), laptop, {})
        speeds = [worker.tokens_per_s for worker in found]
        assert speeds == pytest.approx([alone.tokens_per_s * part / 7 for part in (4, 2, 1)])

    def test_profiles_are_guessed_from_the_data_sheet(self, smol, laptop):
        fast, slow, cpu = worker_facts(
            smol, train(workers=groups(("h100", 1, None), ("l4", 1, None), ("cpu", 1, None))), laptop, PROFILES
        )
        assert fast.tokens_per_s / slow.tokens_per_s == pytest.approx(989 / 121)
        assert 70 * GIB < fast.memory_bytes < 80 * GIB
        assert (cpu.memory_bytes, cpu.profile) == (64 * GIB, "cpu")
        assert slow.tokens_per_s > cpu.tokens_per_s

    def test_more_local_workers_than_accelerators_are_refused(self, smol):
        card = Hardware(cpus=8, memory_bytes=32 * GIB, accelerators=1, accelerator_memory_bytes=24 * GIB)
        assert worker_facts(smol, train(), card, {})[0].memory_bytes < 24 * GIB
        with pytest.raises(InsufficientHardware, match="write count: 1"):
            worker_facts(smol, train(workers=groups(("local", 2, None))), card, {})


class TestPlan:
    def test_unequal_machines_get_unequal_parts(self, smol, laptop):
        written = groups(("h100", 2, None), ("l4", 4, None))
        plan = plan_training(smol, train(method="full", batchTokens=65_536, workers=written), laptop, PROFILES)
        shares = plan.shares
        assert shares.batch[0] / shares.batch[5] == pytest.approx(989 / 121, rel=1e-6)
        assert plan.given == (False,) * 6
        first, second = plan.tables
        assert "2 training workers, profile h100 (worker-0 to worker-1)" in first.title
        assert second.copies == 4
        for table, index in ((first, 0), (second, 5)):
            assert table.copy_bytes == shares.peak_bytes[index]
            assert table.total_bytes <= table.available_bytes

    def test_given_and_assumed_are_told_apart(self, smol, laptop):
        plan = plan_training(smol, train(workers=groups(("local", 1, 3), ("local", 1, None))), laptop)
        plain = json.loads(json.dumps(plan.to_json(), allow_nan=False))
        assert [worker["speedFrom"] for worker in plain["workers"]] == ["given", "assumed"]
        assert [worker["batchShare"] for worker in plain["workers"]] == pytest.approx([0.75, 0.25])
        assert plain["stepSeconds"] == plan.shares.step_seconds > 0
        assert {"microBatchTokens", "peakBytes", "keptBytes", "memoryBytes", "stateShare"} <= plain["workers"][0].keys()

    def test_the_table_of_one_worker_names_every_part(self, smol, laptop):
        (table,) = plan_training(smol, train(), laptop).tables
        found = sizes(table)
        assert set(found) == {"state", "frozen weights", "working copy", "activations", "checkpoint", "process"}
        assert found["frozen weights"] == 2 * smol.parameters
        assert found["working copy"] == 2 * lora_parameters(smol, Lora())
        assert table.title == "Memory of the training worker"

    def test_where_loading_needs_the_most_the_table_says_so(self, smol, laptop):
        deep = replace(smol, layers=300, parameters=1_000_000_000, vocab=8192)
        settings = {"method": "full", "precision": "fp32", "maxLength": 16, "batchTokens": 200}
        written = groups(("local", 1, 0.01), ("local", 1, 1))
        roomy = replace(laptop, memory_bytes=128 * GIB)
        tables = plan_training(deep, train(**settings, workers=written), roomy).tables
        small = sizes(tables[0])
        assert set(small) == {"state", "model", "process"}
        assert small["model"] == 4 * deep.parameters
        assert "model" not in sizes(tables[1])

    def test_fsdp2_shares_evenly(self, smol, laptop):
        plan = plan_training(smol, train(engine="fsdp2", workers=groups(("local", 4, None))), laptop)
        assert plan.shares.batch == plan.shares.state == (0.25,) * 4
        assert "train.engine: fsdp2" in plan.shares.because

    def test_a_big_model_does_not_fit_a_laptop(self, smol, laptop):
        big = replace(smol, parameters=8_000_000_000, layers=36, hidden=4096, intermediate=12288)
        with pytest.raises(
            InsufficientMemory, match=r"are missing\. Lower train\.maxLength.*or write train\.method: lora\."
        ):
            plan_training(big, train(method="full"), laptop)
        with pytest.raises(InsufficientMemory, match=r"or take a smaller spec\.source\."):
            plan_training(replace(big, parameters=80_000_000_000), train(activationCheckpointing=True), laptop)

    def test_a_batch_with_fewer_samples_than_workers_is_refused(self, smol, laptop):
        rows = DatasetFacts(rows=10, used=10, tokens=10_000, trained_tokens=9000)
        four = train(batchTokens=2000, workers=groups(("local", 4, None)))
        with pytest.raises(ManifestInvalid) as caught:
            plan_training(smol, four, laptop, dataset=rows)
        (problem,) = caught.value.problems
        assert (problem.path, problem.suggestion) == ("spec.train.batchTokens", "4000")
        assert "about 2 samples" in problem.message
        assert "write at least 4000, or list fewer workers" in problem.message
        plan_training(smol, four.model_copy(update={"batch_tokens": 4000}), laptop, dataset=rows)

    def test_a_run_that_could_shrink_too_far_is_warned_of(self, smol):
        machine = Hardware(cpus=8, memory_bytes=12 * GIB)
        settings = {"method": "full", "maxLength": 64, "workers": groups(("local", 4, None))}
        (warning,) = plan_training(smol, train(elastic={"minWorkers": 1}, **settings), machine).warnings
        assert "train.elastic.minWorkers is 1" in warning
        assert "Raise minWorkers" in warning
        assert plan_training(smol, train(elastic={"minWorkers": 4}, **settings), machine).warnings == ()

    def test_fp16_on_cpus_is_warned_of(self, smol, laptop):
        (warning,) = plan_training(smol, train(precision="fp16"), laptop).warnings
        assert "bf16" in warning


def test_adapters_on_layers_that_the_model_does_not_have_are_refused_with_those_it_has():
    layers = ("k_proj", "o_proj", "q_proj")
    require_targets(train(lora=Lora(targets=["q_proj", "self_attn.k_proj"])), layers)
    with pytest.raises(
        ManifestInvalid, match=r"no layer 'q_projj'; write q_proj, or another of k_proj, o_proj, q_proj"
    ):
        require_targets(train(lora=Lora(targets=["q_projj"])), layers)
    with pytest.raises(
        ManifestInvalid, match=r"spec.train.lora.targets: the model has no layer 'c_attn'; write one of"
    ):
        require_targets(train(lora=Lora(targets=["q_proj", "c_attn"])), layers)


def test_targets_are_left_to_the_run_where_the_layers_are_not_known():
    require_targets(train(lora=Lora(targets=["c_attn"])), ())
