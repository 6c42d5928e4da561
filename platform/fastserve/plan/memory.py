"""What has to fit where, byte for byte, before anything runs.

A table is an estimate with its reasons beside it. Weights, optimizer state and KV cache follow from the model's
shape; activations and the processes' own memory are rounded up from what was measured on a small model, so that a
plan that fits does fit. What training needs follows from its shares: `plan.training`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from fastserve.errors import InsufficientMemory, Problem
from fastserve.plan.facts import Hardware, ModelFacts
from fastserve.plan.tasks import is_encoder
from fastserve.spec.compress import CompressStep
from fastserve.spec.serve import Serve
from fastserve.spec.train import Lora
from fastserve.units import show_bytes

KV_BLOCK_TOKENS = 128
"""Tokens in one block of the KV cache on CPU: vLLM's default there."""

_ENGINE_BYTES = 1_700_000_000
"""The processes of an engine on CPU without weights and cache (measured: server 0.8 GB, engine with its worker 0.8 GB,
pages shared)."""

ACCELERATOR_RUNTIME_BYTES = 1_500_000_000
"""Context, captured graphs and libraries on an accelerator; an allowance, not measured."""

_ENGINE_BATCH_TOKENS = 2048
"""Tokens of one engine step for which there must be room."""


LORA_SLOTS = 4
"""Different adapters in one batch of the engine."""


@dataclass(frozen=True, slots=True)
class ByteLine:
    """One part of a table."""

    what: str
    size_bytes: int
    why: str
    """How it was computed."""


@dataclass(frozen=True, slots=True)
class ByteTable:
    """What one copy (a worker, a replica) needs, and how many copies share the memory."""

    title: str
    lines: tuple[ByteLine, ...]
    copies: int = 1
    available_bytes: int = 0
    """Memory that they share; 0 while it is not known."""

    advice: str = ""
    """What to change when it does not fit, in the manifest's words."""

    @property
    def copy_bytes(self) -> int:
        """Bytes of one copy."""
        return sum(line.size_bytes for line in self.lines)

    @property
    def total_bytes(self) -> int:
        """Bytes of all copies."""
        return self.copies * self.copy_bytes

    def to_json(self) -> dict[str, Any]:
        """Plain values with the manifest's kind of keys."""
        return {
            "title": self.title,
            "lines": [{"what": line.what, "bytes": line.size_bytes, "why": line.why} for line in self.lines],
            "copies": self.copies,
            "copyBytes": self.copy_bytes,
            "totalBytes": self.total_bytes,
            "availableBytes": self.available_bytes,
        }

    def text(self) -> str:
        """The table as lines of text, for messages."""
        rows = [(line.what, line.size_bytes, line.why) for line in self.lines]
        rows.append(("one copy" if self.copies > 1 else "total", self.copy_bytes, ""))
        if self.copies > 1:
            rows.append((f"all {self.copies}", self.total_bytes, ""))
        width = max(len(what) for what, _, _ in rows)
        listed = (f"  {what:<{width}}  {show_bytes(size):>9}  {why}".rstrip() for what, size, why in rows)
        return "\n".join([self.title, *listed])


def lora_parameters(facts: ModelFacts, lora: Lora) -> int:
    """Numbers in the adapters: rank x (inputs + outputs) of every linear layer that gets one."""
    chosen = [shape for name, shape in linear_layers(facts).items() if not lora.targets or name in lora.targets]
    # A target that is not among the usual names cannot be counted here; all layers are the cautious answer.
    shapes = chosen or list(linear_layers(facts).values())
    return facts.layers * lora.rank * sum(inputs + outputs for inputs, outputs in shapes)


def linear_layers(facts: ModelFacts) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each linear layer of one block, by the usual name: grouped-query attention and a gated
    feed-forward."""
    queries, keys = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    return {
        "q_proj": (facts.hidden, queries),
        "k_proj": (facts.hidden, keys),
        "v_proj": (facts.hidden, keys),
        "o_proj": (queries, facts.hidden),
        "gate_proj": (facts.hidden, facts.intermediate),
        "up_proj": (facts.hidden, facts.intermediate),
        "down_proj": (facts.intermediate, facts.hidden),
    }


def compressed_bytes(facts: ModelFacts, steps: Sequence[CompressStep]) -> int:
    """Bytes of the weights after the compress steps.

    Quantisation shrinks the linear layers of the blocks; embeddings, head and norms stay as they are. int8 and fp8
    keep one 16-bit scale an output, int4 one a group. Measured on a 135M model: int8 163.2 MB, int4 in groups of 64
    113.2 MB.
    """
    size = facts.weight_bytes
    linear = facts.layers * sum(inputs * outputs for inputs, outputs in linear_layers(facts).values())
    stored = 4 if facts.dtype == "float32" else 2
    for step in steps:
        if step.quantize is None:
            continue
        if step.quantize.format == "int4":
            group = step.quantize.group_size or _largest_group(facts)
            size += linear // 2 + 2 * (linear // group) - linear * stored
        else:
            outputs = facts.layers * sum(out for _, out in linear_layers(facts).values())
            size += linear + 2 * outputs - linear * stored
        stored = 1
    return max(size, 0)


def _largest_group(facts: ModelFacts) -> int:
    widths = {inputs for inputs, _ in linear_layers(facts).values()}
    return next((group for group in (128, 64, 32) if all(width % group == 0 for width in widths)), 32)


@dataclass(frozen=True, slots=True)
class CachePlan:
    """How long and how many sequences the engine takes, and the KV cache that follows."""

    context: int
    """Longest prompt and answer together, in tokens."""

    sequences: int
    """Most sequences in one batch."""

    kv_cache_bytes: int | None
    """None: the engine takes what its accelerator has left."""

    token_bytes: int
    """Bytes of one token's keys and values in all layers."""


def plan_cache(facts: ModelFacts, serve: Serve, hardware: Hardware) -> CachePlan:
    """The KV cache of one replica.

    serve.context and serve.engine.kvCache are kept as they are written. What is left out is derived: on CPU the cache
    holds four of the longest sequences within a quarter of the memory, and the context is what the model was made
    for, or what the cache can hold.
    """
    token_bytes = 2 * facts.layers * facts.kv_heads * facts.head_dim * (4 if serve.engine.dtype == "float32" else 2)
    wanted = serve.context or facts.max_context
    if is_encoder(facts.architecture):
        return CachePlan(wanted, serve.engine.max_sequences or min(64, max(16, 8 * hardware.cpus)), 0, token_bytes)
    if hardware.accelerators and serve.engine.kv_cache is None:
        return CachePlan(wanted, serve.engine.max_sequences or 256, None, token_bytes)
    sequences = serve.engine.max_sequences or min(64, max(16, 8 * hardware.cpus))
    longest = _whole_sequence_bytes(wanted, token_bytes) + _heard_bytes(facts, token_bytes)
    cache = serve.engine.kv_cache
    if cache is None:
        share = hardware.memory_bytes // 4
        cache = min(longest * min(4, sequences), max(share, longest if serve.context else 0))
    if serve.context is None and cache < longest:
        blocks = cache // (KV_BLOCK_TOKENS * token_bytes) - 1
        wanted = max(KV_BLOCK_TOKENS, min(wanted, blocks * KV_BLOCK_TOKENS))
    return CachePlan(wanted, sequences, cache, token_bytes)


def context_problem(serve: Serve, facts: ModelFacts) -> Problem | None:
    """Why the engine would not take `serve.context`; None when it does, or nobody knows."""
    most = facts.most_context
    if serve.context is None or not most or serve.context <= most:
        return None
    told = f"is {serve.context}, and the model has positions for {most} tokens; write at most {most}"
    return Problem("spec.serve.context", told, suggestion=str(most))


def _whole_sequence_bytes(context: int, token_bytes: int) -> int:
    """Bytes of the blocks of one longest sequence, and the one block that the engine keeps for itself."""
    return (ceil(context / KV_BLOCK_TOKENS) + 1) * KV_BLOCK_TOKENS * token_bytes


def adapter_slot_bytes(facts: ModelFacts, rank: int) -> int:
    """What the engine sets aside for one adapter: matrices of the largest rank at every linear layer of the blocks."""
    stored = 4 if facts.dtype == "float32" else 2
    return facts.layers * rank * stored * sum(inputs + outputs for inputs, outputs in linear_layers(facts).values())


def _heard_bytes(facts: ModelFacts, token_bytes: int) -> int:
    """Bytes of the keys and values of what was heard, which every position of the answer looks at."""
    return ceil(facts.heard_positions / KV_BLOCK_TOKENS) * KV_BLOCK_TOKENS * token_bytes


def serving_memory(
    facts: ModelFacts, serve: Serve, weight_bytes: int, hardware: Hardware, lora_rank: int = 0
) -> ByteTable:
    """What one replica needs.

    weight_bytes: of the artifact that is served, after compression. lora_rank: largest rank of an adapter; 0: none.

    Raises InsufficientMemory when serve.engine.kvCache cannot hold one sequence of serve.context.
    """
    cache = plan_cache(facts, serve, hardware)
    longest = _whole_sequence_bytes(cache.context, cache.token_bytes) + _heard_bytes(facts, cache.token_bytes)
    if is_encoder(facts.architecture):
        longest = 0
    kv_cache_bytes = longest if cache.kv_cache_bytes is None else cache.kv_cache_bytes
    if kv_cache_bytes < longest:
        raise InsufficientMemory(
            f"serve.engine.kvCache is {show_bytes(kv_cache_bytes)}, but one sequence of serve.context: {cache.context} "
            f"needs {show_bytes(longest)} ({cache.token_bytes} bytes a token); raise serve.engine.kvCache or lower "
            "serve.context."
        )
    # One step: the residual stream and the widest inner layer of a batch; logits in fp32, twice for sampling.
    step = _ENGINE_BATCH_TOKENS * (4 * facts.hidden + 2 * facts.intermediate) * 4
    logits = 2 * min(cache.sequences, _ENGINE_BATCH_TOKENS) * facts.vocab * 4
    tokens = kv_cache_bytes // cache.token_bytes
    accelerated = hardware.accelerators > 0
    runtime = ACCELERATOR_RUNTIME_BYTES if accelerated else _ENGINE_BYTES
    what_runtime = "context and graphs, an allowance" if accelerated else "its processes, measured"
    kv_why = f"{tokens:,} tokens of {cache.token_bytes} bytes; context {cache.context:,}"
    slots = LORA_SLOTS * adapter_slot_bytes(facts, lora_rank)
    adapters = (ByteLine("adapters", slots, f"{LORA_SLOTS} at a time of rank {lora_rank}"),) if slots else ()
    lines = (
        ByteLine("weights", weight_bytes, "the artifact that is served"),
        *adapters,
        *((ByteLine("KV cache", kv_cache_bytes, kv_why),) if kv_cache_bytes else ()),
        ByteLine("activations", step + logits, f"one step with {cache.sequences} sequences, an estimate"),
        ByteLine("engine", runtime, what_runtime),
    )
    advice = "Lower serve.context, serve.engine.maxSequences or serve.engine.kvCache, or add a compress step."
    return ByteTable("Memory of one replica", lines, advice=advice)


def replica_memory_bytes(serve: Serve, hardware: Hardware, described: bool) -> int:
    """Memory for one replica on a machine: of its accelerators where a HardwareProfile says that there are some.

    described: whether a HardwareProfile says so. On a machine that is only discovered, main memory is looked at.
    """
    if hardware.accelerators and described:
        return hardware.accelerator_memory_bytes * (serve.engine.tensor_parallel or 1)
    return hardware.memory_bytes


def fits(table: ByteTable, available_bytes: int) -> ByteTable:
    """The table with what is available written in.

    Raises InsufficientMemory when all copies together need more; the message is the table, the shortfall and what to
    change.
    """
    if table.total_bytes > available_bytes:
        short = show_bytes(table.total_bytes - available_bytes)
        raise InsufficientMemory(
            f"{table.text()}\nThere are {show_bytes(available_bytes)}, so {short} are missing. {table.advice}"
        )
    return replace(table, available_bytes=available_bytes)
