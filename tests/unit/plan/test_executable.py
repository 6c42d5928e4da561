from __future__ import annotations

import pytest

from fastserve.errors import ManifestInvalid, NotExecutable, PvcNotMounted
from fastserve.plan.executable import check, check_access_key
from fastserve.plan.facts import Hardware
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
        ({"train": DATA | {"method": "qlora"}}, "spec.train.method", "profile local has none; write lora"),
        ({"train": DATA | {"precision": "fp8"}}, "spec.train.precision", "profile local does not compute fp8"),
        (
            {"train": DATA | {"method": "scratch"}, "evaluate": {"data": "file:///e"}},
            "spec.evaluate",
            "use train.validation",
        ),
        ({"compress": [{"prune": {"layers": 0.5}}]}, "spec.compress[0].prune", "int8"),
        ({"compress": [{"quantize": {"format": "int4"}}]}, "spec.compress[0].quantize.format", "write int8"),
        ({"compress": [{"quantize": {"format": "fp8"}}]}, "spec.compress[0].quantize.format", "write int8"),
        ({"compress": [{"quantize": {"format": "int8"}}] * 2}, "spec.compress[1]", "keep one"),
        ({"source": "pvc://claim/model"}, "spec.source", "file://"),
        ({"train": {"dataset": "pvc://claim/rows"}}, "spec.train.dataset", "s3://"),
        (
            {"train": DATA | {"validation": {"data": "pvc://claim/rows"}}},
            "spec.train.validation.data",
            "s3://",
        ),
        ({"evaluate": {"data": "pvc://claim/rows"}}, "spec.evaluate.data", "file://"),
        ({"serve": {"profiles": ["local", "l4"]}}, "spec.serve.profiles[1]", "no HardwareProfile is named l4"),
        ({"serve": {"task": "transcribe"}, "train": DATA}, "spec.train", "serve.task is transcribe"),
        ({"serve": {"task": "embed"}, "train": DATA}, "spec.train", "task: generate"),
        ({"serve": {"task": "score"}, "compress": [{"quantize": {"format": "int8"}}]}, "spec.compress", "remove"),
        ({"serve": {"task": "embed"}, "evaluate": {"data": "file:///e"}}, "spec.evaluate", "remove evaluate"),
        (
            {"serve": {"task": "embed", "adapters": [{"name": "de", "source": "s3://b/de"}]}},
            "spec.serve.adapters",
            "task: generate",
        ),
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
            train=DATA | {"method": "qlora", "precision": "fp8"},
            compress=[{"prune": {"layers": 0.5}}],
            serve={"profiles": ["l4"], "engine": {"tensorParallel": 2}},
        )
    )
    assert len(found) == 5


def hardware_profile(name, **spec):
    return HardwareProfile.model_validate(
        {
            "apiVersion": "fastserve.dev/v1alpha1",
            "kind": "HardwareProfile",
            "metadata": {"name": name},
            "spec": {"cpus": 8, "memory": "32GiB", **spec},
        }
    )


def test_profiles_that_are_described_may_wait_for_a_machine_while_one_of_them_has_one(model):
    profile = hardware_profile("l4")
    check(model(serve={}), [profile])
    check(model(serve={"profiles": ["l4", "local"], "target": {"ttft": "500ms"}}), [profile])
    check(model(serve={"profiles": ["l4"]}), [profile], cluster={"l4"})
    check(model(serve={"profiles": ["l4"]}), cluster={"l4", "local"})
    with pytest.raises(NotExecutable, match="profile l4 is described, but"):
        check(model(serve={"profiles": ["l4"]}), [profile])


def test_a_replica_may_span_the_accelerators_of_a_machine(model):
    card = {"type": "L4", "memory": "24GiB", "count": 4}
    profiles = [hardware_profile("l4", accelerator=card), hardware_profile("plain")]
    check(model(serve={"profiles": ["l4"], "engine": {"tensorParallel": 4}}), profiles, cluster={"l4"})
    for serve, words in [
        ({"profiles": ["l4"], "engine": {"tensorParallel": 8}}, "profile l4 has 4 accelerators; write 4"),
        ({"profiles": ["l4", "plain"], "engine": {"tensorParallel": 2}}, "profile plain has 0 accelerators; remove"),
    ]:
        with pytest.raises(NotExecutable, match=words):
            check(model(serve=serve), profiles, cluster={"l4", "plain"})


def test_what_training_runs_since_it_shares_unequally(model):
    check(model(train=DATA | {"method": "scratch", "precision": "fp16", "elastic": {"minWorkers": 1}}))
    groups = [{"profile": "local", "count": 1, "speed": 3}, {"profile": "local", "count": 2}]
    check(model(train=DATA | {"workers": groups, "elastic": {"minWorkers": 2}}))


def test_workers_of_a_profile_that_nobody_describes_are_a_mistake(model):
    workers = [{"profile": "local", "count": 1}, {"profile": "l40", "count": 2}]
    with pytest.raises(ManifestInvalid) as caught:
        check(model(train=DATA | {"workers": workers}), [hardware_profile("l4")])
    (problem,) = caught.value.problems
    assert (problem.path, problem.suggestion) == ("spec.train.workers[1].profile", "l4")
    assert "no HardwareProfile is named l40; write l4, or add one" in problem.message


def test_workers_of_a_profile_that_the_cluster_lacks_are_refused_and_those_that_it_has_run(model):
    profiles = [hardware_profile("l4"), hardware_profile("a100")]
    workers = [{"profile": "a100", "count": 1}, {"profile": "l4", "count": 2}]
    unequal = model(train=DATA | {"workers": workers})
    with pytest.raises(NotExecutable, match="on the machine it is started on; write local"):
        check(unequal, profiles)
    with pytest.raises(NotExecutable) as caught:
        check(unequal, profiles, cluster={"l4", "h100"})
    (problem,) = caught.value.problems
    assert problem.path == "spec.train.workers[0].profile"
    assert "no machine of it; write one of those it has: h100, l4" in problem.message
    check(unequal, profiles, cluster={"l4", "a100"})


@pytest.mark.parametrize(
    ("settings", "accelerator", "words"),
    [
        ({"method": "qlora"}, "L4", None),
        ({"method": "qlora"}, None, "profile gpu has none; write lora"),
        ({"precision": "fp8"}, "A100", "profile gpu does not compute fp8"),
        ({"precision": "fp8"}, "H100", None),
        ({"precision": "fp8", "engine": "fsdp2"}, "H100", "fsdp2 does not go with precision: fp8; write sharded"),
        ({"precision": "bf16"}, "nvidia-t4", "the nvidia-t4 of profile gpu does not compute bf16; write fp16"),
        ({"precision": "fp16"}, "T4", None),
        ({"precision": "bf16"}, "Unheard-Of", None),
    ],
)
def test_what_the_hardware_of_a_profile_cannot_do_is_refused(model, settings, accelerator, words):
    has = {} if accelerator is None else {"accelerator": {"type": accelerator, "memory": "24GiB"}}
    found = model(train=DATA | settings | {"workers": [{"profile": "gpu", "count": 2}]})
    if words is None:
        check(found, [hardware_profile("gpu", **has)], cluster={"gpu"})
        return
    with pytest.raises(NotExecutable, match=words):
        check(found, [hardware_profile("gpu", **has)], cluster={"gpu"})


def test_the_accelerator_of_this_machine_counts(model):
    card = Hardware(cpus=8, memory_bytes=2**35, accelerators=1, accelerator_memory_bytes=2**34, accelerator_type="L4")
    check(model(train=DATA | {"method": "qlora"}), local=card)


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


def test_a_claim_that_the_pods_have_is_a_source_as_any_other(model):
    found = model(source="pvc://weights/model", train=DATA | {"validation": {"data": "pvc://rows/held"}})
    check(found, claims={"weights", "rows"})
    with pytest.raises(PvcNotMounted, match=r"the claim rows is not mounted \(weights\).*ray\.sourceClaims") as caught:
        check(found, claims={"weights"})
    assert [problem.path for problem in caught.value.problems] == ["spec.train.validation.data"]
    with pytest.raises(PvcNotMounted, match="none is"):
        check(found, claims=())
