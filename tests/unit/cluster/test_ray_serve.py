"""A revision's application: what decides the answers in `args`, what may change lightly under `deployments:`."""

from __future__ import annotations

from typing import Any

import pytest

from fastserve.cluster.ray_serve import (
    AppStatus,
    app_for,
    app_name,
    beginning,
    place_of,
    revision_name,
    route_prefix,
    scale,
)
from fastserve.plan.facts import Hardware, ModelFacts
from fastserve.plan.placement import Bounds
from fastserve.plan.revision import Revision
from fastserve.plan.stages import Stage
from fastserve.spec.serve import Serve

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
    serve: dict[str, Any] | None = None,
    light: dict[str, Any] | None = None,
    hardware: Hardware = LAPTOP,
    bounds: Bounds | None = None,
) -> dict[str, Any]:
    revision = Revision("chat", Stage.COMPRESS, "k" * 64, "d" * 64, serve or {})
    now = Serve.model_validate(light or {})
    bounds = bounds or Bounds("local", now.replicas.min, now.replicas.max, "")
    return app_for(revision, now, "file:///store", FACTS, hardware, bounds)


def test_an_application_is_named_by_model_revision_and_profile() -> None:
    app = _app(bounds=Bounds("l4", 1, 2, ""))
    digest = Revision("chat", Stage.COMPRESS, "k" * 64, "d" * 64, {}).digest
    assert app["name"] == app_name("chat", digest, "l4") == f"chat-{digest[:8]}-l4"
    assert app["route_prefix"] == route_prefix("chat", digest, "l4") == f"/m/chat/{digest[:8]}/l4"
    assert app["name"].startswith(revision_name("chat", digest))
    assert place_of(app["name"], "chat", digest) == "l4"
    assert place_of(app["name"], "other", digest) is None


def test_its_replicas_go_to_machines_with_the_label_of_its_profile() -> None:
    deployment = _app(bounds=Bounds("cpu", 1, 2, ""))["deployments"][0]
    assert deployment["ray_actor_options"]["label_selector"] == {"fastserve.dev/profile": "cpu"}
    assert deployment["max_replicas_per_node"] == 1, "without accelerators a replica computes on all cores"
    assert "max_replicas_per_node" not in _app(hardware=GPU, bounds=Bounds("l4", 1, 2, ""))["deployments"][0]
    assert "max_replicas_per_node" not in _app()["deployments"][0]


@pytest.mark.parametrize(
    "light",
    [
        {"replicas": {"min": 2}},
        {"replicas": {"min": 0, "max": 4}},
        {"replicas": {"max": 4}, "target": {"queue": 9, "ttft": "500ms"}},
        {"replicas": {"min": 0, "idle": "10s"}},
        {"streamLimit": "2m"},
    ],
)
def test_what_may_change_lightly_leaves_the_args_alone(light: dict[str, Any]) -> None:
    before, after = _app(), _app(light=light)
    assert after["deployments"] != before["deployments"]
    assert {**after, "deployments": 0} == {**before, "deployments": 0}
    policies = [app["deployments"][0]["autoscaling_config"]["policy"] for app in (before, after)]
    assert policies[0] == policies[1], "to Serve another policy is another code"
    assert before["deployments"][0].keys() == after["deployments"][0].keys()


def test_what_decides_the_answers_is_in_the_args_with_the_digest_that_was_evaluated() -> None:
    args = _app({"context": 512})["args"]
    assert args["revision"]["artifact_digest"] == "d" * 64
    assert "--max-model-len=512" in args["argv"]
    assert not [argument for argument in args["argv"] if argument.startswith("--model=")]


def test_a_fixed_number_is_bounds_that_meet_since_serve_restarts_replicas_when_the_block_comes_or_goes() -> None:
    fixed, free = scale(Bounds("local", 3, 3, ""), Serve()), scale(Bounds("local", 1, 4, ""), Serve())
    assert (fixed["autoscaling_config"]["min_replicas"], fixed["autoscaling_config"]["max_replicas"]) == (3, 3)
    assert fixed.keys() == free.keys()
    assert fixed["autoscaling_config"].keys() == free["autoscaling_config"].keys()


def test_bounds_become_autoscaling_that_reacts_in_a_second() -> None:
    serve = Serve.model_validate({"replicas": {"min": 0, "max": 8, "idle": "10m"}, "target": {"queue": 4}})
    wanted = scale(Bounds("local", 0, 8, ""), serve)["autoscaling_config"]
    assert (wanted["min_replicas"], wanted["max_replicas"]) == (0, 8)
    assert wanted["target_ongoing_requests"] == 4
    assert wanted["metrics_interval_s"] == 0.5
    assert wanted["look_back_period_s"] == 2
    assert wanted["downscale_to_zero_delay_s"] == 600
    helping = scale(Bounds("l4", 0, 8, "", spilled=True), serve)["autoscaling_config"]
    assert helping["downscale_to_zero_delay_s"] == 60, "who only helps out leaves as soon as there is nothing to do"


def test_a_new_application_starts_one_replica_and_a_later_change_leaves_their_number_alone() -> None:
    app = _app(light={"replicas": {"min": 0, "max": 2}})
    assert "initial_replicas" not in app["deployments"][0]["autoscaling_config"]
    assert beginning(app)["deployments"][0]["autoscaling_config"]["initial_replicas"] == 1
    assert beginning(_app(light={"replicas": {"min": 3}}))["deployments"][0]["autoscaling_config"][
        "initial_replicas"
    ] == 3  # fmt: skip


def test_what_serve_tells_of_an_application() -> None:
    replica = {"replica_id": "a", "pid": 7, "state": "RUNNING", "node_id": "n", "start_time_s": 50.0}
    told = {
        "status": "DEPLOYING",
        "message": "",
        "last_deployed_time_s": 40.0,
        "deployed_app_config": {"name": "chat"},
        "deployments": {
            "engine": {
                "status": "UPSCALING",
                "message": "",
                "target_num_replicas": 3,
                "deployment_config": {"max_ongoing_requests": 20},
                "replicas": [
                    replica,
                    {**replica, "replica_id": "b", "state": "STARTING", "node_id": None, "start_time_s": 60.0},
                    {**replica, "replica_id": "c", "state": "STARTING", "start_time_s": 55.0},
                ],
            }
        },
    }
    status = AppStatus.from_json("chat", told)
    assert (status.replicas, status.wanted, status.requests_each) == (1, 3, 20)
    assert status.waiting_since == 60.0, "since when one has no machine; one that loads its engine has one"
    assert (status.deployed_at, status.config) == (40.0, {"name": "chat"})
    building = AppStatus.from_json("chat", {**told, "deployments": {}})
    assert building.waiting_since == 40.0, "it is built on a machine of its profile, so it may wait for one before"


def test_a_replica_takes_little_more_than_the_engine_has_slots() -> None:
    app = _app({"engine": {"maxSequences": 32}})
    assert app["deployments"][0]["max_ongoing_requests"] == 36


def test_a_scheduler_that_chooses_sees_more_requests_than_there_are_slots() -> None:
    for scheduler in ("priority", "mlfq"):
        app = _app({"scheduler": scheduler, "engine": {"maxSequences": 32}})
        assert app["deployments"][0]["max_ongoing_requests"] == 8 * 32 + 4
        shared = _app({"scheduler": scheduler, "engine": {"maxSequences": 32}}, {"profiles": ["local", "l4"]})
        assert shared["deployments"][0]["max_ongoing_requests"] == 2 * 32 + 4


def test_a_replica_that_is_taken_away_outlives_the_longest_stream() -> None:
    assert _app(light={"streamLimit": "10m"})["deployments"][0]["graceful_shutdown_timeout_s"] > 600


def test_accelerators_are_asked_for_where_there_are_some() -> None:
    assert _app(hardware=LAPTOP)["deployments"][0]["ray_actor_options"]["num_gpus"] == 0
    wide = _app({"engine": {"tensorParallel": 2}}, hardware=GPU)
    assert wide["deployments"][0]["ray_actor_options"]["num_gpus"] == 2


def test_the_engine_on_cpu_is_one_process_beside_the_replica() -> None:
    assert _app()["args"]["env"]["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in _app(hardware=GPU)["args"]["env"]
