"""A revision's application: what decides the answers in `args`, what may change lightly under `deployments:`."""

from __future__ import annotations

from typing import Any

import pytest

from fastserve.cluster.ray_serve import app_for, app_name, route_prefix, scale
from fastserve.plan.facts import Hardware, ModelFacts
from fastserve.plan.revision import Revision
from fastserve.plan.stages import Stage
from fastserve.spec.serve import Replicas, Serve, Target

FACTS = ModelFacts(
    architecture="LlamaForCausalLM",
    parameters=134_515_008,
    weight_bytes=269_060_552,
    layers=30,
    hidden=576,
    intermediate=1536,
    heads=9,
    kv_heads=3,
    head_dim=64,
    vocab=49152,
    max_context=8192,
    tied_embeddings=True,
    dtype="bfloat16",
)
LAPTOP = Hardware(cpus=2, memory_bytes=8 * 2**30)
GPU = Hardware(cpus=16, memory_bytes=64 * 2**30, accelerators=2, accelerator_memory_bytes=80 * 2**30)


def _app(
    serve: dict[str, Any] | None = None, light: dict[str, Any] | None = None, hardware: Hardware = LAPTOP
) -> dict[str, Any]:
    revision = Revision("chat", Stage.COMPRESS, "k" * 64, "d" * 64, serve or {})
    return app_for(revision, Serve.model_validate(light or {}), "file:///store", FACTS, hardware)


def test_an_application_is_named_by_model_and_revision() -> None:
    app = _app()
    digest = Revision("chat", Stage.COMPRESS, "k" * 64, "d" * 64, {}).digest
    assert app["name"] == app_name("chat", digest) == f"chat-{digest[:8]}"
    assert app["route_prefix"] == route_prefix("chat", digest) == f"/m/chat/{digest[:8]}"


@pytest.mark.parametrize(
    "light",
    [
        {"replicas": {"min": 2}},
        {"replicas": {"min": 0, "max": 4}},
        {"replicas": {"max": 4}, "target": {"queue": 9}},
        {"streamLimit": "2m"},
    ],
)
def test_what_may_change_lightly_leaves_the_args_alone(light: dict[str, Any]) -> None:
    before, after = _app(), _app(light=light)
    assert after["deployments"] != before["deployments"]
    assert {**after, "deployments": 0} == {**before, "deployments": 0}


def test_what_decides_the_answers_is_in_the_args_with_the_digest_that_was_evaluated() -> None:
    args = _app({"context": 512})["args"]
    assert args["revision"]["artifact_digest"] == "d" * 64
    assert "--max-model-len=512" in args["argv"]
    assert not [argument for argument in args["argv"] if argument.startswith("--model=")]


def test_a_fixed_number_is_bounds_that_meet_since_serve_restarts_replicas_when_the_block_comes_or_goes() -> None:
    fixed, free = scale(Replicas(min=3, max=3), Target()), scale(Replicas(min=1, max=4), Target())
    assert (fixed["autoscaling_config"]["min_replicas"], fixed["autoscaling_config"]["max_replicas"]) == (3, 3)
    assert fixed.keys() == free.keys()
    assert fixed["autoscaling_config"].keys() == free["autoscaling_config"].keys()


def test_bounds_become_autoscaling_that_reacts_in_a_second() -> None:
    wanted = scale(Replicas(min=0, max=8), Target(queue=4))["autoscaling_config"]
    assert (wanted["min_replicas"], wanted["initial_replicas"], wanted["max_replicas"]) == (0, 1, 8)
    assert wanted["target_ongoing_requests"] == 4
    assert wanted["metrics_interval_s"] == 0.5
    assert wanted["look_back_period_s"] == 2


def test_a_replica_takes_little_more_than_the_engine_has_slots() -> None:
    app = _app({"engine": {"maxSequences": 32}})
    assert app["deployments"][0]["max_ongoing_requests"] == 36


def test_a_scheduler_that_chooses_sees_more_requests_than_there_are_slots() -> None:
    for scheduler in ("priority", "mlfq"):
        app = _app({"scheduler": scheduler, "engine": {"maxSequences": 32}})
        assert app["deployments"][0]["max_ongoing_requests"] == 8 * 32 + 4


def test_a_replica_that_is_taken_away_outlives_the_longest_stream() -> None:
    assert _app(light={"streamLimit": "10m"})["deployments"][0]["graceful_shutdown_timeout_s"] > 600


def test_accelerators_are_asked_for_where_there_are_some() -> None:
    assert _app(hardware=LAPTOP)["deployments"][0]["ray_actor_options"]["num_gpus"] == 0
    wide = _app({"engine": {"tensorParallel": 2}}, hardware=GPU)
    assert wide["deployments"][0]["ray_actor_options"]["num_gpus"] == 2


def test_the_engine_on_cpu_is_one_process_beside_the_replica() -> None:
    assert _app()["args"]["env"]["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in _app(hardware=GPU)["args"]["env"]
