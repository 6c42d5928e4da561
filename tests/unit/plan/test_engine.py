from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fastserve.errors import ManifestInvalid
from fastserve.plan import engine_rules
from fastserve.plan.engine import check_extra_args, engine_args, engine_env
from fastserve.plan.engine_flags import FLAGS, SWITCHES
from fastserve.plan.engine_rules import OWNED, REFUSED, TUNING, problems_in
from fastserve.plan.facts import Hardware
from fastserve.plan.revision import Revision, deciding
from fastserve.plan.stages import Stage
from fastserve.spec.serve import Serve


def revision(**serve):
    section = deciding(Serve.model_validate(serve))
    return Revision("chat", Stage.SOURCE, "k" * 64, "d" * 64, section)


def args(smol, hardware, **serve):
    return engine_args(revision(**serve), smol, hardware)


def test_the_command_line_is_derived_from_model_and_machine(smol, laptop):
    assert args(smol, laptop) == [
        "--served-model-name=chat",
        "--runner=generate",
        "--dtype=auto",
        "--max-model-len=8192",
        "--max-num-seqs=16",
        "--enable-prefix-caching",
        "--enforce-eager",
        "--kv-cache-memory-bytes=766771200",
        "--block-size=128",
    ]


def test_what_the_manifest_says_reaches_the_engine(smol, laptop):
    engine = {
        "maxSequences": 4,
        "kvCache": "1GiB",
        "dtype": "float32",
        "prefixCaching": False,
        "enforceEager": False,
        "extraArgs": ["--block-size=32", "--seed", "7"],
    }
    found = args(smol, laptop, context=1024, engine=engine)
    for item in ("--max-model-len=1024", "--max-num-seqs=4", "--kv-cache-memory-bytes=1073741824", "--dtype=float32"):
        assert item in found
    assert "--no-enable-prefix-caching" in found
    assert "--no-enforce-eager" in found
    assert found[-3:] == ["--block-size=32", "--seed", "7"]
    assert "--block-size=128" not in found


def test_first_come_first_served_is_vllms_own(smol, laptop):
    assert not any("schedul" in item for item in args(smol, laptop))


def test_priority_is_vllms_own_policy(smol, laptop):
    assert [item for item in args(smol, laptop, scheduler="priority") if "schedul" in item] == [
        "--scheduling-policy=priority"
    ]


def test_mlfq_is_a_scheduler_of_ours_with_its_options_and_small_blocks(smol, laptop):
    found = args(smol, laptop, scheduler="mlfq", schedulerOptions={"quantum": 64, "starvation": "10s"})
    assert "--scheduling-policy=priority" in found
    assert "--scheduler-cls=fastserve.stages.serve.mlfq.scheduler" in found
    (told,) = [item.partition("=")[2] for item in found if item.startswith("--additional-config=")]
    assert json.loads(told) == {"mlfq": {"levels": 3, "quantum": 64, "starvation": 10}}
    assert "--enable-prefix-caching" in found
    assert "--block-size=32" in found
    assert "--block-size=64" in args(smol, laptop, scheduler="mlfq", engine={"extraArgs": ["--block-size=64"]})


def test_every_flag_of_every_scheduler_is_one_of_vllm(smol, laptop):
    for scheduler in ("fcfs", "priority", "mlfq"):
        assert {item.split("=")[0] for item in args(smol, laptop, scheduler=scheduler)} <= FLAGS


def test_adapters_are_set_aside_for(smol, laptop):
    found = engine_args(Revision("chat", Stage.SOURCE, "k", "d", deciding(Serve(), [48])), smol, laptop)
    assert {"--enable-lora", "--max-lora-rank=64", "--max-loras=4", "--max-cpu-loras=16"} <= set(found)
    assert {item.split("=")[0] for item in found} <= FLAGS
    assert not any("lora" in item for item in args(smol, laptop))


def test_parsers_of_a_known_family_are_told_and_the_manifest_has_the_last_word(smol, laptop):
    qwen = replace(smol, tool_parser="hermes", reasoning_parser="qwen3")
    found = args(qwen, laptop)
    assert {"--enable-auto-tool-choice", "--tool-call-parser=hermes", "--reasoning-parser=qwen3"} <= set(found)
    assert {item.split("=")[0] for item in found} <= FLAGS
    mine = args(qwen, laptop, engine={"extraArgs": ["--tool-call-parser=xlam"]})
    assert mine.index("--tool-call-parser=xlam") > mine.index("--tool-call-parser=hermes")
    assert not any("parser" in item for item in args(qwen, laptop, task="embed"))


def test_an_accelerator_is_not_run_eagerly_and_keeps_its_own_cache(smol):
    card = Hardware(cpus=8, memory_bytes=2**35, accelerators=1, accelerator_memory_bytes=2**34)
    found = args(smol, card)
    assert "--no-enforce-eager" in found
    assert not any(item.startswith(("--kv-cache-memory-bytes", "--block-size")) for item in found)


def test_every_flag_that_is_written_is_one_of_vllm(smol, laptop):
    found = args(smol, laptop, engine={"tensorParallel": 1})
    assert {item.split("=")[0] for item in found} <= FLAGS


def test_the_environment_fetches_nothing_and_reports_nothing(laptop):
    env = engine_env(revision(), laptop)
    assert env["HF_HUB_OFFLINE"] == env["VLLM_NO_USAGE_STATS"] == env["DO_NOT_TRACK"] == "1"
    assert env["OMP_NUM_THREADS"] == "2"
    assert "VLLM_CPU_KVCACHE_SPACE" not in env
    card = Hardware(cpus=8, memory_bytes=2**35, accelerators=1, accelerator_memory_bytes=2**34)
    assert "OMP_NUM_THREADS" not in engine_env(revision(), card)


def test_every_rule_names_a_flag_that_exists():
    refused = {flag for flags in REFUSED.values() for flag in flags.split()}
    assert TUNING | OWNED.keys() | refused <= FLAGS
    assert not TUNING & OWNED.keys()
    assert not TUNING & refused
    assert SWITCHES <= FLAGS
    assert engine_rules.VLLM_VERSION == "0.32.0"


@pytest.mark.parametrize(
    "items",
    [
        ["--max-num-batched-tokens=16384"],
        ["--max-num-batched-tokens", "16384"],
        ["--enable-chunked-prefill"],
        ["--no-async-scheduling", "--seed", "-1"],
        ["--limit-mm-per-prompt={}"],
    ],
)
def test_a_flag_that_tunes_is_let_through(items):
    assert problems_in(items) == []


def test_a_mistyped_flag_is_refused_with_the_nearest_one(smol, laptop):
    with pytest.raises(ManifestInvalid) as caught:
        args(smol, laptop, engine={"extraArgs": ["--seed=1", "--max-num-batched-token=16384"]})
    (problem,) = caught.value.problems
    assert problem.path == "spec.serve.engine.extraArgs[1]"
    assert problem.suggestion == "--max-num-batched-tokens"
    assert "the nearest is --max-num-batched-tokens" in problem.message
    assert caught.value.exit_code == 2


def test_underscores_are_told_to_be_dashes():
    (problem,) = problems_in(["--max_num_batched_tokens=1"])
    assert problem.suggestion == "--max-num-batched-tokens"


@pytest.mark.parametrize("flag", sorted(flag for flags in REFUSED.values() for flag in flags.split()))
def test_a_flag_that_opens_the_engine_is_refused_by_name(flag):
    (problem,) = problems_in([f"{flag}=x"])
    assert problem.message.startswith(f"{flag} is refused, since ")


@pytest.mark.parametrize("flag", sorted(OWNED))
def test_a_flag_that_the_manifest_has_a_place_for_is_sent_there(flag):
    (problem,) = problems_in([f"{flag}=x"])
    assert OWNED[flag] in problem.message


def test_a_flag_that_nobody_has_classified_is_refused():
    unclassified = FLAGS - TUNING - OWNED.keys() - {f"--no-{flag[2:]}" for flag in TUNING | OWNED.keys()}
    assert all(len(problems_in([flag])) == 1 for flag in unclassified)


@pytest.mark.parametrize(
    "items",
    [
        ["evil/model"],
        ["--enable-chunked-prefill", "evil/model"],
        ["--seed=1", "evil/model"],
        ["--seed", "1", "evil/model"],
        ["-O3"],
        ["-tp=2"],
        ["--trust-remote"],
        ["--hf-overrides.architectures=x"],
        ["--no-trust-remote-code"],
        ["--enable-chunked-prefill=yes"],
        ["--", "x"],
        [""],
    ],
)
def test_nothing_slips_in_as_a_model_an_abbreviation_or_a_short_flag(items):
    assert problems_in(items)
    with pytest.raises(ManifestInvalid):
        check_extra_args(Serve.model_validate({"engine": {"extraArgs": items}}))
