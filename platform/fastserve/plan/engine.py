"""The engine's command line and environment, derived from what is served; what the manifest leaves out is filled in
here.

Both are pure functions of the revision, the model and the machine, so what was evaluated and what is served start the
same engine.
"""

from __future__ import annotations

import json

from fastserve.errors import ManifestInvalid
from fastserve.plan.engine_rules import problems_in
from fastserve.plan.facts import Hardware, ModelFacts
from fastserve.plan.memory import KV_BLOCK_TOKENS, LORA_SLOTS, plan_cache
from fastserve.plan.revision import Revision
from fastserve.plan.tasks import is_encoder, is_speech
from fastserve.spec.serve import SchedulerOptions, Serve

RUNNERS = {"generate": "generate", "embed": "pooling", "score": "pooling", "transcribe": "generate"}
"""vLLM's runner by serve.task."""

_LEAST_CACHE_BYTES = 2**20
"""What a model without a KV cache is given: told nothing, vLLM wants nearly all of the memory on CPU."""

_BATCHED = "--max-num-batched-tokens"
LORA_KEPT = 16
"""Adapters that the engine keeps in main memory beside those in use; others are read again when they are asked for."""

MLFQ = "fastserve.stages.serve.mlfq.scheduler"
"""What vLLM imports for `serve.scheduler: mlfq`."""

MLFQ_BLOCK_TOKENS = 32
"""Tokens in one block of the KV cache on CPU under mlfq: the smallest that vLLM's kernels there take. Only whole blocks
are kept, so a request that resumes computes up to one block again."""


def check_extra_args(serve: Serve) -> None:
    """Raise ManifestInvalid, with every problem, when serve.engine.extraArgs holds what may not reach the engine."""
    problems = problems_in(serve.engine.extra_args)
    if problems:
        raise ManifestInvalid(problems)


def engine_args(revision: Revision, facts: ModelFacts, hardware: Hardware) -> list[str]:
    """Arguments of vLLM's server for one replica, without `--model`, which only the machine that serves can know.

    facts: of the artifact that is served. Each argument is one item, `--flag=value`; extraArgs come last.

    Raises ManifestInvalid for a flag in extraArgs that may not be there.
    """
    serve = revision.section()
    check_extra_args(serve)
    cache = plan_cache(facts, serve, hardware)
    on_cpu = hardware.accelerators == 0
    eager = on_cpu if serve.engine.enforce_eager is None else serve.engine.enforce_eager
    found = [
        f"--served-model-name={revision.model}",
        f"--runner={RUNNERS[serve.task]}",
        f"--dtype={_dtype(serve, facts, on_cpu)}",
        f"--max-model-len={cache.context}",
        f"--max-num-seqs={cache.sequences}",
        "--enable-prefix-caching" if _keeps_prefixes(serve, facts) else "--no-enable-prefix-caching",
        "--enforce-eager" if eager else "--no-enforce-eager",
    ]
    if cache.kv_cache_bytes is not None:
        found.append(f"--kv-cache-memory-bytes={max(cache.kv_cache_bytes, _LEAST_CACHE_BYTES)}")
    if on_cpu and not any(item.split("=")[0] == "--block-size" for item in serve.engine.extra_args):
        found.append(f"--block-size={MLFQ_BLOCK_TOKENS if serve.scheduler == 'mlfq' else KV_BLOCK_TOKENS}")
    if facts.heard_positions and not any(item.startswith(_BATCHED) for item in serve.engine.extra_args):
        # vLLM takes a piece of sound whole, and its own number is below that on CPU.
        found.append(f"{_BATCHED}={max(2048, facts.heard_positions)}")
    if serve.engine.tensor_parallel is not None:
        found.append(f"--tensor-parallel-size={serve.engine.tensor_parallel}")
    own = [*found, *_lora_args(revision), *_parser_args(serve, facts), *_scheduler_args(serve)]
    return [*own, *serve.engine.extra_args]


def _dtype(serve: Serve, facts: ModelFacts, on_cpu: bool) -> str:
    """An encoder's vectors are compared with others that were made long ago, so on CPU it computes as it is stored."""
    exact = on_cpu and is_encoder(facts.architecture) and facts.dtype == "float32"
    return "float32" if exact and serve.engine.dtype == "auto" else serve.engine.dtype


def _keeps_prefixes(serve: Serve, facts: ModelFacts) -> bool:
    return serve.engine.prefix_caching and not is_encoder(facts.architecture) and not is_speech(facts.architecture)


def _parser_args(serve: Serve, facts: ModelFacts) -> list[str]:
    """Tool calls and thinking of the families that are known; what extraArgs say comes later and counts."""
    if serve.task != "generate":
        return []
    found = []
    if facts.tool_parser:
        found += ["--enable-auto-tool-choice", f"--tool-call-parser={facts.tool_parser}"]
    if facts.reasoning_parser:
        found.append(f"--reasoning-parser={facts.reasoning_parser}")
    return found


def _lora_args(revision: Revision) -> list[str]:
    """Adapters come and go while the engine runs; what it sets aside for them is settled when it starts."""
    if not revision.lora_rank:
        return []
    return [
        "--enable-lora",
        f"--max-lora-rank={revision.lora_rank}",
        f"--max-loras={LORA_SLOTS}",
        f"--max-cpu-loras={LORA_KEPT}",
    ]


def _scheduler_args(serve: Serve) -> list[str]:
    """mlfq is vLLM's priority policy with a scheduler of ours in front, which keeps the priorities."""
    if serve.scheduler == "fcfs":
        return []
    found = ["--scheduling-policy=priority"]
    if serve.scheduler == "mlfq":
        options = serve.scheduler_options or SchedulerOptions()
        told = {"levels": options.levels, "quantum": options.quantum, "starvation": options.starvation}
        found += [f"--scheduler-cls={MLFQ}", f"--additional-config={json.dumps({'mlfq': told})}"]
    return found


def engine_env(revision: Revision, hardware: Hardware) -> dict[str, str]:
    """Environment variables of the engine's processes: nothing is fetched, nothing is reported, and cores are shared.

    VLLM_CPU_KVCACHE_SPACE is left out on purpose: it counts whole GiB and overrides `--kv-cache-memory-bytes`, which
    is exact.
    """
    found = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_PREFIX": f"{revision.model}-{revision.short} ",
    }
    if hardware.accelerators == 0:
        if revision.section().engine.enforce_eager is not False:
            # A request for logprobs makes the sampler compile a small function even so, with a C++ compiler, which
            # images and many machines lack.
            found["TORCHDYNAMO_DISABLE"] = "1"
        # Two engines run side by side while a revision takes over; bound to cores, both would get the same ones.
        found["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        # Ray sets 1 in a replica that asks for one CPU.
        found["OMP_NUM_THREADS"] = str(hardware.cpus)
        if (revision.section().engine.tensor_parallel or 1) == 1:
            # For vLLM's asynchronous server this means "the worker lives in the engine's process": two processes not
            # three. Measured on two cores: up in 20 s instead of 33 s, 1.3 times the tokens/s, 0.6 GB less.
            found["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return found
