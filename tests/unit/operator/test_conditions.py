from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from fastserve.cluster.ray_rest import RayRest
from fastserve.errors import (
    ClusterFailed,
    InsufficientMemory,
    ManifestInvalid,
    NotExecutable,
    Problem,
    SourceNotFound,
    StoreFull,
)
from fastserve.spec.crd import crds
from fastserve_operator.conditions import (
    Trouble,
    attempted,
    cause,
    condition,
    in_cluster_words,
    of_serving,
    of_stages,
    of_trouble,
)

NOW = "2027-01-02T03:04:05Z"
BEFORE = "2027-01-01T00:00:00Z"
SCHEMA = crds()["models"]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]
REASON = SCHEMA["properties"]["conditions"]["items"]["properties"]["reason"]["pattern"]


def found(*conditions: dict[str, Any]) -> dict[str, Any]:
    return {"metadata": {"name": "m", "generation": 7}, "spec": {}, "status": {"conditions": list(conditions)}}


def raising(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize(
    ("error", "trouble"),
    [
        (SourceNotFound("it is not there"), Trouble("SourceNotFound", "it is not there", False)),
        (InsufficientMemory("a table"), Trouble("InsufficientMemory", "a table", False)),
        (StoreFull("no space"), Trouble("StoreFull", "no space", True)),
        (ClusterFailed("no answer"), Trouble("ClusterFailed", "no answer", True)),
        (
            NotExecutable([Problem("spec.train", "not yet"), Problem("", "all of it")]),
            Trouble("NotExecutable", "spec.train: not yet; all of it", False),
        ),
        (
            ManifestInvalid([Problem("spec.serve.contxt", "unknown key; write `context`", line=1)]),
            Trouble("ManifestInvalid", "spec.serve.contxt: unknown key; write `context`", False),
        ),
    ],
)
def test_an_error_of_ours_gives_its_name_and_its_words(error: Exception, trouble: Trouble) -> None:
    assert attempted(lambda: raising(error)) == trouble


@pytest.mark.parametrize("error", [KeyError("x"), RecursionError(), ZeroDivisionError("/ 0")])
def test_an_error_of_nobody_is_told_too_and_stops_nothing(error: Exception) -> None:
    trouble = attempted(lambda: raising(error))
    assert isinstance(trouble, Trouble)
    assert (trouble.reason, trouble.passing) == ("InternalError", True)
    assert type(error).__name__ in trouble.message


def test_what_ends_the_process_is_not_kept() -> None:
    with pytest.raises(KeyboardInterrupt):
        attempted(lambda: raising(KeyboardInterrupt()))  # type: ignore[arg-type]


def test_a_result_comes_through() -> None:
    assert attempted(lambda: 3) == 3


def test_what_is_to_blame_decides_between_false_and_unknown() -> None:
    assert of_trouble(Trouble("SourceNotFound", "x", False), found(), NOW)["status"] == "False"
    assert of_trouble(Trouble("ClusterFailed", "x", True), found(), NOW)["status"] == "Unknown"


def test_the_time_stays_while_the_status_does() -> None:
    had = {"type": "Ready", "status": "False", "reason": "Working", "message": "", "lastTransitionTime": BEFORE}
    same = condition("Ready", "False", "Waiting", "another word", found(had), NOW)
    assert same["lastTransitionTime"] == BEFORE
    assert same["observedGeneration"] == 7
    assert condition("Ready", "True", "Ready", "", found(had), NOW)["lastTransitionTime"] == NOW
    assert condition("Train", "False", "Waiting", "", found(had), NOW)["lastTransitionTime"] == NOW


STAGES: dict[str, dict[str, Any]] = {
    "source": {"state": "committed", "digest": "d" * 64},
    "train": {"state": "running", "attempt": 2},
    "compress": {"state": "failed", "attempt": 1, "reason": "DatasetInvalid", "message": "row 3"},
    "evaluate": {"state": "waiting"},
}


def test_each_stage_has_a_condition_of_its_name() -> None:
    told = {item["type"]: (item["status"], item["reason"]) for item in of_stages(STAGES, found(), NOW)}
    assert told == {
        "Source": ("True", "Committed"),
        "Train": ("False", "Running"),
        "Compress": ("False", "DatasetInvalid"),
        "Evaluate": ("False", "Waiting"),
    }


def test_a_lost_attempt_tells_what_ray_said() -> None:
    stage = {
        "train": {"state": "lost", "attempt": 1, "reason": "Lost", "message": "Task was killed: running low on memory"}
    }
    (told,) = of_stages(stage, found(), NOW)
    assert (told["status"], told["reason"]) == ("False", "OutOfMemory")
    assert "running low on memory" in told["message"]


@pytest.mark.parametrize(
    ("reason", "message", "better"),
    [
        ("StageFailed", "torch.OutOfMemoryError: CUDA out of memory", "OutOfMemory"),
        ("EngineFailed", "Deployment engine has taken more than 30s to be scheduled", "Unschedulable"),
        ("Lost", "Back-off: ImagePullBackOff", "ImagePull"),
        ("StageFailed", "loss is not finite", "StageFailed"),
        ("DatasetInvalid", "row 7 says: out of memory", "DatasetInvalid"),
        ("InsufficientMemory", "OOM", "InsufficientMemory"),
    ],
)
def test_a_vague_reason_gives_way_to_a_cause(reason: str, message: str, better: str) -> None:
    assert cause(reason, message) == better


def test_every_reason_is_one_that_the_definition_takes() -> None:
    told = [*of_stages(STAGES, found(), NOW), of_serving([], found(), NOW)]
    told += [of_trouble(Trouble(reason, "x", False), found(), NOW) for reason in ("InternalError", "NameConflict")]
    assert all(re.search(REASON, item["reason"]) for item in told)


def test_serving_is_true_only_with_traffic_and_an_answer() -> None:
    ready = {"digest": "a" * 64, "state": "ready", "weight": 100, "replicas": 1, "message": ""}
    waiting = {"digest": "b" * 64, "state": "starting", "weight": 0, "replicas": 0, "message": ""}
    failed = {"digest": "c" * 64, "state": "failed", "weight": 0, "replicas": 0, "message": "CUDA out of memory"}
    assert of_serving([waiting, ready], found(), NOW)["status"] == "True"
    assert of_serving([waiting, {**ready, "weight": 0}], found(), NOW)["status"] == "False"
    assert of_serving([waiting], found(), NOW)["reason"] == "Starting"
    told = of_serving([failed], found(), NOW)
    assert (told["status"], told["reason"], told["message"]) == ("False", "OutOfMemory", "CUDA out of memory")


def head_says(status: int) -> ClusterFailed:
    """The error of a head that answers so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(httpx.Client, "request", lambda *_, **__: httpx.Response(status))
        with pytest.raises(ClusterFailed) as raised:
            RayRest("http://x", "token").call("GET", "/api/jobs/")
    return raised.value


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "the last one failed. `fastserve logs m train` shows more; `fastserve up` tries again.",
            "the last one failed. `kubectl fastserve logs m train` shows more; "
            "a new value of the annotation fastserve.dev/retry tries again.",
        ),
        (
            "the Ray head at http://x does not answer (refused); run `fastserve up` again to start it",
            "the Ray head at http://x does not answer (refused)",
        ),
        ("Stage train is running (attempt 1).", "Stage train is running (attempt 1)."),
        (
            str(head_says(403)),
            "the Ray head at http://x refuses the token (403): its Secret was changed since the head's pod began; "
            "put the old token back, or delete the RayCluster, and another one is made",
        ),
    ],
)
def test_advice_for_a_laptop_is_left_out(said: str, told: str) -> None:
    assert in_cluster_words(said) == told


def test_a_long_message_is_cut() -> None:
    assert len(condition("Ready", "False", "StageFailed", "x" * 100_000, found(), NOW)["message"]) <= 2000
