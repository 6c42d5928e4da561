"""Serve's own context in, plain values out; the story goes on when Serve makes the policy anew."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from fastserve.plan.scaling import State
from fastserve.stages.serve.policy import FILE_PREFIX, KEPT_DECISIONS, Policy, snapshot

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from ray.serve import config


def context(now: float = 1000.0, **more: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = config.AutoscalingConfig(
            min_replicas=0, max_replicas=8, target_ongoing_requests=4, metrics_interval_s=0.5, look_back_period_s=2,
            upscale_delay_s=2, downscale_delay_s=60, downscale_to_zero_delay_s=300,
        )  # fmt: skip
    usual: dict[str, Any] = {
        "deployment_id": None,
        "deployment_name": "engine",
        "app_name": "chat-1234",
        "current_num_replicas": 1,
        "target_num_replicas": 1,
        "running_replicas": [],
        "total_num_requests": lambda: 0.0,
        "total_queued_requests": lambda: 0.0,
        "aggregated_metrics": dict,
        "raw_metrics": dict,
        "capacity_adjusted_min_replicas": 0,
        "capacity_adjusted_max_replicas": 8,
        "policy_state": {},
        "last_scale_up_time": None,
        "last_scale_down_time": None,
        "current_time": now,
        "config": settings,
    }
    return config.AutoscalingContext(**{**usual, **more})


REPORTS = {
    "running_requests": {"a": 3.0, "b": 5.0},
    "running": {"a": 4.0, "b": 6.0},
    "waiting": {"a": 1.0, "b": 0.0},
    "kv_use": {"a": 0.2, "b": 0.7},
    "ttft_ms": {"a": 100.0, "b": 250.0},
    "tokens_per_s": {"a": 30.0, "b": 50.0},
    "slots": {"a": 16.0, "b": 16.0},
    "target_ttft_ms": {"a": 500.0, "b": 500.0},
}


def test_what_engines_report_becomes_one_look() -> None:
    look = snapshot(context(aggregated_metrics=lambda: REPORTS, total_num_requests=lambda: 8.0, current_num_replicas=2))
    assert look.requests == 11, "three more reached the engines past Serve"
    assert (look.ttft_target_seconds, look.ttft_seconds, look.kv_use, look.slots) == (0.5, 0.25, 0.7, 16)
    assert look.tokens_per_s == (30, 50)
    assert (look.queue, look.up_seconds, look.down_seconds, look.idle_seconds) == (4, 2, 60, 300)


def test_replicas_that_report_nothing_are_scaled_by_what_serve_counts() -> None:
    look = snapshot(context(total_num_requests=lambda: 9.0))
    assert (look.requests, look.ttft_target_seconds, look.slots, look.tokens_per_s) == (9, None, 0, ())


def test_the_delays_are_the_policys_own(tmp_path: Path) -> None:
    asked = context(total_num_requests=lambda: 20.0)
    assert Policy(str(tmp_path))(asked) == (2, {})
    assert (asked.config.upscale_delay_s, asked.config.downscale_delay_s, asked.config.downscale_to_zero_delay_s) == (
        0,
        0,
        0,
    )


def test_decisions_and_their_reasons_are_noted_and_outlive_the_policy(tmp_path: Path) -> None:
    Policy(str(tmp_path))(context(total_num_requests=lambda: 20.0))
    file = tmp_path / f"{FILE_PREFIX}chat-1234.json"
    story = json.loads(file.read_text())
    (first,) = story["decisions"]
    assert (first["at"], first["from"], first["to"]) == (1000.0, 1, 2)
    assert "20 requests" in first["because"]
    assert State.from_json(story["state"]).since == 1000.0
    again = Policy(str(tmp_path))
    for number in range(KEPT_DECISIONS + 5):
        again(context(1001.0 + number, total_num_requests=lambda: 20.0))
    story = json.loads(file.read_text())
    assert len(story["decisions"]) == KEPT_DECISIONS
    assert story["state"]["since"] == 1000.0
    assert not list(tmp_path.glob("*.part"))


def test_what_serve_started_by_itself_from_none_is_noted_too(tmp_path: Path) -> None:
    policy = Policy(str(tmp_path))
    none = {"current_num_replicas": 0, "target_num_replicas": 0}
    assert policy(context(**none))[0] == 0
    policy(context(1003.0, current_num_replicas=1, target_num_replicas=1, total_num_requests=lambda: 1.0))
    (entry,) = json.loads((tmp_path / f"{FILE_PREFIX}chat-1234.json").read_text())["decisions"]
    assert (entry["from"], entry["to"], entry["because"]) == (0, 1, "Requests came while there was no replica.")


def test_a_damaged_file_and_a_folder_that_is_gone_cost_the_story_only(tmp_path: Path) -> None:
    (tmp_path / f"{FILE_PREFIX}chat-1234.json").write_text("{")
    assert Policy(str(tmp_path))(context(total_num_requests=lambda: 20.0))[0] == 2
    assert Policy(str(tmp_path / "gone"))(context(total_num_requests=lambda: 20.0))[0] == 2
