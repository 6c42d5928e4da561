"""The engine that serves, in this process, for a stage that needs figures and not a server.

What is measured is what will answer: the same vLLM, the same kernels, the same quantised weights. It runs without a
process of its own, without compilation and with a small KV cache, so that two of them fit beside each other and a
further one is up in seconds.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from fastserve.errors import EngineFailed
from fastserve.stages.cgroup import let_engines_reclaim
from fastserve.stages.evaluate.divergence import RowScore
from fastserve.stages.evaluate.endless import Answer

TOP_TOKENS = 20
"""Most likely tokens asked for at each position; vLLM's own upper bound unless it is raised."""

STREAMS = 16
"""Most rows that are computed together."""

BATCH_TOKENS = 1024
"""Most prompt tokens in one forward pass: logits over the vocabulary are held for each of them."""

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    # The sampler compiles a small function even in an engine that compiles nothing else, and needs a C++ compiler then.
    "TORCHDYNAMO_DISABLE": "1",
}
"""Read by vLLM and torch when they are imported."""


@dataclass(frozen=True, slots=True)
class Round:
    """One timed round of generation."""

    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Over all streams."""
        return self.tokens / self.seconds


class Engine:
    """A loaded model. Use as a context manager: leaving it frees the weights."""

    def __init__(self, model: Path, context: int) -> None:
        """Load the Hugging Face folder `model` for rows and answers of at most `context` tokens together.

        Raises EngineFailed with the engine's own words when the model does not come up.
        """
        os.environ.update(ENVIRONMENT)
        os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
        from vllm import LLM

        let_engines_reclaim()
        config = json.loads((model / "config.json").read_text())
        self.context = min(context, int(config.get("max_position_embeddings") or context))
        self._stop = stop_tokens(model)
        try:
            self._llm: Any = LLM(
                model=str(model),
                dtype="auto",
                seed=0,
                enforce_eager=True,
                max_model_len=self.context,
                max_num_seqs=STREAMS,
                max_num_batched_tokens=max(BATCH_TOKENS, STREAMS),
                enable_prefix_caching=False,
                kv_cache_memory_bytes=kv_cache_bytes(config, self.context),
                disable_log_stats=True,
            )
        except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
            raise EngineFailed(
                f"the engine cannot load {model.parent.name}/{model.name}: {error}; see the log of the evaluate stage"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the weights and the KV cache."""
        del self._llm
        gc.collect()

    def score(self, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> list[RowScore]:
        """What the model says of some tokens of each row, given the tokens before them.

        rows: token ids, each at most `context - 1` long.
        positions: places of the tokens in their row, each at least 1: nothing precedes the first.
        """
        from vllm import SamplingParams

        parameters = SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=TOP_TOKENS, flat_logprobs=True, detokenize=False
        )
        outputs = self._generate(rows, parameters)
        return [row_score(output.prompt_logprobs, wanted) for output, wanted in zip(outputs, positions, strict=True)]

    def answer(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Answer]:
        """Greedy answers, up to the model's own stop tokens."""
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0.0, max_tokens=max_tokens, stop_token_ids=self._stop)
        found = [output.outputs[0] for output in self._generate(prompts, parameters)]
        return [Answer(list(item.token_ids), item.text, item.finish_reason == "stop") for item in found]

    def timed_round(self, prompts: Sequence[Sequence[int]], tokens: int) -> Round:
        """Generate exactly `tokens` tokens for every prompt at once, and take the time."""
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        outputs = self._generate(prompts, parameters)
        seconds = time.perf_counter() - began
        return Round(sum(len(output.outputs[0].token_ids) for output in outputs), seconds)

    def _generate(self, prompts: Sequence[Sequence[int]], parameters: Any) -> list[Any]:
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs: list[Any] = self._llm.generate(asked, parameters, use_tqdm=False)
        return outputs


def row_score(found: Any, positions: Sequence[int]) -> RowScore:
    """From the engine's flat lists to arrays; at each position the row's own token comes first, then the likeliest."""
    width = TOP_TOKENS + 1
    starts = [found.start_indices[position] for position in positions]
    return RowScore(
        top_ids=np.array([found.token_ids[start : start + width] for start in starts], np.int32).reshape(-1, width),
        top_logprobs=np.array([found.logprobs[start : start + width] for start in starts]).reshape(-1, width),
    )


def stop_tokens(model: Path) -> list[int]:
    """Ids at which the model ends its answer, from generation_config.json, else config.json."""
    for name in ("generation_config.json", "config.json"):
        file = model / name
        ends = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
        if ends is not None:
            return list(ends) if isinstance(ends, list) else [ends]
    return []


def kv_cache_bytes(config: Mapping[str, Any], context: int) -> int:
    """Bytes that hold `STREAMS` sequences of `context` tokens, keys and values in 16 bits, at least 64 MiB.

    config: content of config.json.
    """
    text = config.get("text_config") or config
    heads = int(text.get("num_attention_heads") or 1)
    kv_heads = int(text.get("num_key_value_heads") or heads)
    head = int(text.get("head_dim") or int(text.get("hidden_size") or 4096) // heads)
    width = 4 if (text.get("dtype") or text.get("torch_dtype")) == "float32" else 2
    token = 2 * int(text.get("num_hidden_layers") or 32) * kv_heads * head * width
    return max(64 * 2**20, token * (context + 256) * STREAMS)
