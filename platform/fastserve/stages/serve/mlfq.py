"""Skip-join multi-level feedback queue as a scheduler of vLLM, with preemption after any token.

vLLM's own scheduler does nearly all of it: its waiting queue and its choice of a victim follow `request.priority`, so
this one keeps the request's class there. What it adds is done before each step: requests sink, starved ones rise, and
whoever stands in the way of a better class is preempted. It never preempts within a step, since vLLM then lets nobody
in for the whole of it.

A preempted request loses its KV blocks to the prefix cache and finds them there when it resumes; what is computed
again is at most one block, unless others needed the memory meanwhile. Tokens do not change: a request goes on from the
tokens that it has.

vLLM's scheduler interface is not public; the names used here are those of 0.32.0 and stand in this file alone.

Source: Wu et al., FastServe, arXiv 2305.05920.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from fastserve.stages.serve.levels import Lengths, Levels, Place, Waits
from fastserve.stages.serve.preemption import Rank, Room, Running, Waiting, victims

OPTIONS = "mlfq"
"""Where in vLLM's `additional_config` the levels are described."""

log = logging.getLogger("fastserve.serve")


def scheduler(vllm_config: Any, **others: Any) -> Any:
    """What `--scheduler-cls` names: the scheduler that fits the engine, made when vLLM has settled how it runs."""
    kind = MlfqAsyncScheduler if vllm_config.scheduler_config.async_scheduling else MlfqScheduler
    return kind(vllm_config=vllm_config, **others)


class MlfqScheduler(Scheduler):  # type: ignore[misc]  # vLLM is not typed for us
    """For engines that schedule a step when the one before it has ended."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError unless the engine's policy is `priority`, on which all of this stands."""
        super().__init__(*args, **kwargs)
        if self.policy is not SchedulingPolicy.PRIORITY:
            raise ValueError("the mlfq scheduler needs --scheduling-policy=priority")
        if not self.cache_config.enable_prefix_caching:
            log.warning("mlfq without prefix caching: a preempted request is computed again from its first token")
        options = self.vllm_config.additional_config
        self.levels = Levels.from_json(options.get(OPTIONS, {}) if isinstance(options, dict) else {})
        self.clock = time.monotonic
        self.waits = Waits()
        self.lengths = Lengths() if self.levels.quantum is None else None
        self.demotions = self.promotions = self.preemptions = 0

    # -- a request's way through the queue ---------------------------------------------------------------------------

    def add_request(self, request: Any) -> None:
        """Called by the engine for a new request, and for the next part of one that streams its input."""
        if request.request_id not in self.requests:
            level = self.levels.join(request.num_prompt_tokens)
            request.place = Place(request.priority, level, since=self.clock())
            request.priority = self.levels.class_of(request.place)
            self.waits.add(request.request_id, request.place.since)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Called by the engine before each step; the answer is vLLM's own."""
        for request in self.running:
            if request.place.sink(self.levels, request.num_output_tokens):
                request.priority = self.levels.class_of(request.place)
                self.demotions += 1
        self._promote_starved()
        # Answers before prompts, or a long prompt would take the whole step; better classes first among each.
        self.running.sort(key=lambda request: (request.is_prefill_chunk, _rank(request)))
        if self._lets_requests_in(*args, **kwargs):
            self._make_room()
        return super().schedule(*args, **kwargs)

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        """Called here and by vLLM itself, for every request that leaves the batch before its end."""
        request.place.stop(request.num_output_tokens, self.clock())
        self.waits.add(request.request_id, request.place.since)
        super()._preempt_request(request, *args, **kwargs)

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """Called by vLLM for every request that ends, whatever the reason."""
        ended = request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
        if ended and self.lengths is not None and self.lengths.add(request.num_output_tokens):
            self.levels = replace(self.levels, quantum=self.lengths.quantum())
        return super()._free_request(request, *args, **kwargs)

    def _promote_starved(self) -> None:
        starved = []
        for name, since in self.waits.pop(self.clock() - self.levels.starvation_seconds):
            request = self.requests.get(name)
            if request is None or request.is_finished() or request.status == RequestStatus.RUNNING:
                continue
            if request.place.since == since and request.place.level > 0:
                request.place.rise()  # here, since one that was stopped twice without a token is told twice
                starved.append(request)
        if not starved:
            return
        # A heap breaks when what it is sorted by changes inside it.
        for queue in (self.waiting, self.kv_holding_waiting):
            inside = set(queue)
            risen = [request for request in starved if request in inside]
            queue.remove_requests(risen)
            for request in risen:
                request.priority = self.levels.class_of(request.place)
                queue.add_request(request)
                self.promotions += 1

    # -- room for better classes -------------------------------------------------------------------------------------

    def _lets_requests_in(self, throttle_prefills: bool = False) -> bool:
        """Whether vLLM will look at its waiting queue in this step, and somebody there could be worth a preemption."""
        if self._pause_state != PauseState.UNPAUSED or (throttle_prefills and not self.prefill_capacity_bound):
            return False
        if not self.waiting or not self.running:
            return False
        worst = max(request.priority for request in self.running)
        return bool(self.waiting.peek_request().priority < worst)

    def _make_room(self) -> None:
        named = {request.request_id: request for request in self.running}
        room, running = self._room()
        for victim in victims(room, running, self._ready(), lambda one: self._blocks_of_its_own(named[one.rank[2]])):
            request = named[victim.rank[2]]
            self.running.remove(request)
            # Resumed in this very step, it must reach the model runner as a new one, with all its tokens.
            self.prev_step_scheduled_req_ids.discard(request.request_id)
            self._preempt_request(request, time.monotonic(), drop_stale_output=self.requires_kv_delivery)
            self.preemptions += 1

    def _room(self) -> tuple[Room, list[Running]]:
        """What is free in the next step, and what each running request takes of it; vLLM serves them in this order."""
        tokens = self.max_num_scheduled_tokens
        blocks = self.kv_cache_manager.block_pool.get_num_free_blocks()
        groups = len(self.kv_cache_config.kv_cache_groups)
        running = []
        for request in self.running:
            computed = request.num_computed_tokens
            wanted = request.num_tokens_with_spec + request.num_output_placeholders - computed
            share = max(0, min(wanted, tokens))
            new = groups * (cdiv(computed + share, self.block_size) - cdiv(computed, self.block_size))
            tokens, blocks = tokens - share, blocks - new
            running.append(Running(_rank(request), share, new, self._request_blocks_can_be_freed(request)))
        taken = len(self.running) + self.num_waiting_for_streaming_input + len(self.kv_holding_waiting)
        return Room(self.max_num_active_reqs - taken, blocks, tokens), running

    def _ready(self) -> Iterator[Waiting]:
        """Who waits and could be let in at once, the best first."""
        adapters = {request.lora_request.lora_int_id for request in self.running if request.lora_request}
        for request in self.waiting:
            if self._is_blocked_waiting_status(request.status) and not _has_its_grammar(request):
                continue
            if request.num_stale_output_tokens and not request.drop_stale_output:
                continue  # a token from before its preemption is still on its way
            adapter = request.lora_request.lora_int_id if request.lora_request else None
            if adapter is not None and adapter not in adapters and len(adapters) >= self.lora_config.max_loras:
                continue
            blocks, cached = self._blocks_to_resume(request)
            tokens = request.num_tokens - cached
            yield Waiting(_rank(request), tokens, blocks, 1 if self.scheduler_config.enable_chunked_prefill else tokens)
            # Only who is let in is followed by another one.
            adapters |= {adapter} - {None}

    def _blocks_to_resume(self, request: Any) -> tuple[int, int]:
        """Free blocks that vLLM asks for before it lets `request` in, and its tokens that the prefix cache holds."""
        manager = self.kv_cache_manager
        found, cached, _ = manager.get_computed_blocks(request)
        tokens = min(request.num_tokens, self.max_model_len)
        blocks: int = manager.coordinator.get_num_blocks_to_allocate(
            request_id=request.request_id,
            num_tokens=tokens,
            new_computed_blocks=found.blocks,
            num_encoder_tokens=0,
            total_computed_tokens=cached,
            num_local_computed_tokens=cached,
            num_tokens_main_model=tokens,
            apply_admission_cap=True,
            prefill_end=max(request.num_prompt_tokens, request.num_tokens - 1),
        )
        return blocks + manager.watermark_blocks, cached

    def _blocks_of_its_own(self, request: Any) -> int:
        """Blocks of a running request that nobody else uses, which its preemption makes free."""
        groups = self.kv_cache_manager.get_blocks(request.request_id).blocks
        return sum(block.ref_cnt == 1 and not block.is_null for group in groups for block in group)


class MlfqAsyncScheduler(MlfqScheduler, AsyncScheduler):  # type: ignore[misc]
    """For engines that schedule a step while the one before it runs: tokens of a victim may still be on their way."""


def _has_its_grammar(request: Any) -> bool:
    """Whether a request for structured output waits for nothing but a place: vLLM itself looks for its grammar only
    while a slot is free."""
    if request.status != RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR:
        return False
    grammar = request.structured_output_request.grammar
    return grammar is not None and not isinstance(grammar, Exception)


def _rank(request: Any) -> Rank:
    return request.priority, request.arrival_time, request.request_id
