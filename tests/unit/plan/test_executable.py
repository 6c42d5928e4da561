from __future__ import annotations

import pytest

from fastserve.errors import ManifestInvalid, NotExecutable
from fastserve.plan.executable import check, check_access_key
from fastserve.spec.model import AccessKey, HardwareProfile

DATA = {"dataset": "file:///d"}


def refusals(found):
    with pytest.raises(NotExecutable) as caught:
        check(found)
    return {problem.path: problem for problem in caught.value.problems}


def test_everything_that_the_quickstart_asks_for_runs(model, all_stages):
    all_stages["train"]["workers"] = [{"profile": "local", "count": 2}]
    check(model(**all_stages))
    check(model(serve={"target": {"queue": 2}, "replicas": {"min": 0, "max": 2}, "context": 512}))
    check(model(train=DATA | {"method": "full", "precision": "fp32", "steps": 3}))


@pytest.mark.parametrize(
    ("spec", "path", "instead"),
    [
        ({"train": DATA | {"method": "qlora"}}, "spec.train.method", "lora or full"),
        ({"train": DATA | {"method": "scratch"}}, "spec.train.method", "lora or full"),
        ({"train": DATA | {"precision": "fp16"}}, "spec.train.precision", "bf16"),
        ({"train": DATA | {"precision": "fp8"}}, "spec.train.precision", "bf16"),
        ({"train": DATA | {"elastic": {"minWorkers": 1}}}, "spec.train.elastic", "remove elastic"),
        (
            {"train": DATA | {"workers": [{"profile": "a100", "count": 1}]}},
            "spec.train.workers[0].profile",
            "write local",
        ),
        (
            {"train": DATA | {"workers": [{"profile": "local", "count": 1, "speed": 2}]}},
            "spec.train.workers[0].speed",
            "remove speed",
        ),
        (
            {"train": DATA | {"workers": [{"profile": "local", "count": 1}, {"profile": "local", "count": 2}]}},
            "spec.train.workers",
            "{profile: local, count: 3}",
        ),
        ({"compress": [{"prune": {"layers": 0.5}}]}, "spec.compress[0].prune", "int8"),
        ({"compress": [{"quantize": {"format": "int4"}}]}, "spec.compress[0].quantize.format", "write int8"),
        ({"compress": [{"quantize": {"format": "fp8"}}]}, "spec.compress[0].quantize.format", "write int8"),
        ({"compress": [{"quantize": {"format": "int8"}}] * 2}, "spec.compress[1]", "keep one"),
        ({"source": "pvc://claim/model"}, "spec.source", "file://"),
        ({"train": {"dataset": "pvc://claim/rows"}}, "spec.train.dataset", "s3://"),
        ({"evaluate": {"data": "pvc://claim/rows"}}, "spec.evaluate.data", "file://"),
        ({"serve": {"task": "embed"}}, "spec.serve.task", "write generate"),
        ({"serve": {"scheduler": "mlfq"}}, "spec.serve.scheduler", "write fcfs"),
        ({"serve": {"adapters": [{"name": "de", "source": "s3://b/de"}]}}, "spec.serve.adapters", "method: lora"),
        ({"serve": {"rollout": {}}}, "spec.serve.rollout", "remove rollout"),
        ({"serve": {"profiles": ["local", "l4"]}}, "spec.serve.profiles[1]", "write local"),
        ({"serve": {"target": {"ttft": "500ms"}}}, "spec.serve.target.ttft", "target.queue"),
        ({"serve": {"engine": {"tensorParallel": 2}}}, "spec.serve.engine.tensorParallel", "remove tensorParallel"),
    ],
)
def test_what_does_not_run_yet_is_refused_by_name_with_a_way_out(model, spec, path, instead):
    found = refusals(model(**spec))
    assert list(found) == [path]
    assert instead in found[path].message


def test_everything_is_told_in_one_go(model):
    found = refusals(
        model(
            train=DATA | {"method": "qlora", "precision": "fp8", "elastic": {"minWorkers": 1}},
            compress=[{"prune": {"layers": 0.5}}],
            serve={"task": "embed", "rollout": {}},
        )
    )
    assert len(found) == 6


def test_a_profile_of_the_file_is_accepted_and_still_not_used(model):
    profile = HardwareProfile.model_validate(
        {
            "apiVersion": "fastserve.dev/v1alpha1",
            "kind": "HardwareProfile",
            "metadata": {"name": "l4"},
            "spec": {"cpus": 8, "memory": "32GiB"},
        }
    )
    check(model(serve={}), [profile])
    with pytest.raises(NotExecutable, match="profile l4 is described, but"):
        check(model(serve={"profiles": ["l4"]}), [profile])


def test_a_flag_that_may_not_reach_the_engine_is_a_mistake_and_not_a_missing_feature(model):
    with pytest.raises(ManifestInvalid, match="--trust-remote-code is refused"):
        check(model(serve={"engine": {"extraArgs": ["--trust-remote-code"]}}))


def access_key(**spec):
    return AccessKey.model_validate(
        {
            "apiVersion": "fastserve.dev/v1alpha1",
            "kind": "AccessKey",
            "metadata": {"name": "team"},
            "spec": {"models": ["chat"], **spec},
        }
    )


def test_limits_of_a_key_that_nobody_keeps_are_refused():
    check_access_key(access_key(expires="2027-06-30"))
    with pytest.raises(NotExecutable) as caught:
        check_access_key(
            access_key(
                requestsPerMinute=1, tokensPerMinute=1, maxParallel=1, tokenBudget={"tokens": 5e8, "window": "30d"}
            )
        )
    assert [problem.path for problem in caught.value.problems] == [
        "spec.requestsPerMinute",
        "spec.tokensPerMinute",
        "spec.maxParallel",
        "spec.tokenBudget",
    ]
