"""vLLM's real scheduler, KV cache manager and prefix cache in virtual time: everything of an engine but the model.

A step costs what a formula says, so that policies are compared without noise. The "model" is a function of a request's
name and a position, so that a token that is lost, repeated or out of place is seen.
"""

from __future__ import annotations

import logging
import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEP_SECONDS = 0.008
TOKEN_SECONDS = 0.00025
SEQUENCE_SECONDS = 0.0004


@dataclass(frozen=True)
class Asked:
    """A request of a workload."""

    name: str
    arrives: float
    prompt: Sequence[int]
    tokens: int
    priority: int = 0
    grammar_after: float | None = None
    """For structured output: seconds until its grammar is compiled."""

    adapter: int = 0
    """Number of a LoRA adapter."""


@dataclass
class Answer:
    """What a client saw."""

    asked: Asked
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    end: str | None = None

    @property
    def seconds(self) -> float:
        return self.times[-1] - self.asked.arrives

    @property
    def first(self) -> float:
        return self.times[0] - self.asked.arrives


def right_tokens(asked: Asked) -> list[int]:
    """The answer that the "model" gives, whoever schedules it."""
    start = len(asked.prompt)
    return [_token(asked.name, position) for position in range(start, start + asked.tokens)]


def _token(name: str, position: int) -> int:
    return 10 + zlib.crc32(f"{name}:{position}".encode()) % 200


def make_scheduler(
    model: Path,
    kind: str = "fcfs",
    *,
    slots: int = 8,
    blocks: int = 2000,
    block_size: int = 16,
    budget: int = 512,
    options: dict[str, Any] | None = None,
    caching: bool = True,
    pipelined: bool = False,
    adapters: int = 0,
) -> Any:
    """A scheduler of the pinned vLLM. kind: fcfs, priority or mlfq. model: a folder; only its configuration is read.
    adapters: LoRA adapters that a batch may have."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from fastserve.stages.serve.mlfq import OPTIONS, scheduler

    logging.getLogger("vllm").setLevel(logging.ERROR)
    config = EngineArgs(
        model=str(model),
        max_model_len=4096,
        max_num_seqs=slots,
        max_num_batched_tokens=budget,
        scheduling_policy="fcfs" if kind == "fcfs" else "priority",
        enable_prefix_caching=caching,
        block_size=block_size,
        hf_overrides={"max_position_embeddings": 4096},
        additional_config={OPTIONS: options or {}},
        **({"enable_lora": True, "max_loras": adapters} if adapters else {}),
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = blocks
    config.scheduler_config.async_scheduling = pipelined
    spec = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=1, dtype=torch.float32)
    cache = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    make = scheduler if kind == "mlfq" else AsyncScheduler if pipelined else Scheduler
    return make(
        vllm_config=config,
        kv_cache_config=cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=block_size,
        log_stats=False,
    )


class AnyText:
    """A grammar that takes all that the "model" says, as far as the scheduler asks one."""

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        return True

    def is_terminated(self) -> bool:
        return False


class VirtualEngine:
    """One engine. With `depth` 2 a step is scheduled before the output of the one before it is known."""

    def __init__(self, scheduler: Any, depth: int = 1) -> None:
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

        init_none_hash(sha256)
        self.scheduler = scheduler
        self.now = 0.0
        self.steps = 0
        self.scheduled_tokens = 0
        self.answers: dict[str, Answer] = {}
        self._hasher = get_request_block_hasher(scheduler.block_size, sha256)
        self._depth = depth
        self._queue: deque[tuple[Any, dict[str, list[int]]]] = deque()
        self._compiling: list[tuple[float, Future[Any]]] = []
        if hasattr(scheduler, "clock"):
            scheduler.clock = lambda: self.now

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.has_unfinished_requests() or self._queue)

    @property
    def produced(self) -> int:
        return sum(len(answer.tokens) for answer in self.answers.values())

    def request(self, name: str) -> Any:
        """The engine's own request, or None when it has ended."""
        return self.scheduler.requests.get(name)

    def submit(self, asked: Asked) -> None:
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import SamplingParams, StructuredOutputsParams
        from vllm.v1.request import Request

        self.answers[asked.name] = Answer(asked)
        wanted = None if asked.grammar_after is None else StructuredOutputsParams(regex=".*")
        request = Request(
            request_id=asked.name,
            prompt_token_ids=list(asked.prompt),
            sampling_params=SamplingParams(
                max_tokens=asked.tokens, ignore_eos=True, temperature=0, structured_outputs=wanted
            ),
            pooling_params=None,
            arrival_time=asked.arrives,
            priority=asked.priority,
            block_hasher=self._hasher,
            lora_request=LoRARequest(f"a{asked.adapter}", asked.adapter, "nowhere") if asked.adapter else None,
        )
        if asked.grammar_after is not None:
            grammar: Future[Any] = Future()
            request.structured_output_request.grammar = grammar
            self._compiling.append((self.now + asked.grammar_after, grammar))
        self.scheduler.add_request(request)

    def abort(self, name: str) -> None:
        """The client has gone."""
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        if self.answers[name].end is None:
            self.answers[name].end = "abort"

    def step(self) -> None:
        """Schedule once; then, unless steps overlap and there is room for another, take in the oldest output."""
        for at, grammar in self._compiling:
            if at <= self.now and not grammar.done():
                grammar.set_result(AnyText())
        if self.scheduler.has_requests():
            out = self.scheduler.schedule()
            sampled = {}
            for name in out.num_scheduled_tokens:
                request = self.scheduler.requests[name]
                sampled[name] = [] if request.is_prefill_chunk else [_token(name, request.num_computed_tokens)]
            self._queue.append((out, sampled))
            self.steps += 1
            self.scheduled_tokens += out.total_num_scheduled_tokens
            tokens, sequences = out.total_num_scheduled_tokens, len(out.num_scheduled_tokens)
            self.now += STEP_SECONDS + TOKEN_SECONDS * tokens + SEQUENCE_SECONDS * sequences
            if tokens and len(self._queue) < self._depth:
                return
        if self._queue:
            self._take_in()

    def _take_in(self) -> None:
        from vllm.v1.outputs import ModelRunnerOutput

        out, sampled = self._queue.popleft()
        names = list(sampled)
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[list(sampled[name]) for name in names],
        )
        for outputs in self.scheduler.update_from_output(out, result).values():
            for output in outputs.outputs:
                answer = self.answers[output.request_id]
                answer.tokens.extend(output.new_token_ids)
                answer.times.extend([self.now] * len(output.new_token_ids))
                if output.finish_reason is not None:
                    answer.end = str(output.finish_reason)

    def run(self, workload: Iterable[Asked]) -> dict[str, Answer]:
        """Everything of `workload`, each at its time, to the end."""
        coming = deque(sorted(workload, key=lambda one: one.arrives))
        while coming or self.busy:
            if not self.busy and coming:
                self.now = max(self.now, coming[0].arrives)
            while coming and coming[0].arrives <= self.now:
                self.submit(coming.popleft())
            self.step()
        return self.answers
