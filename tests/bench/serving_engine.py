"""One real engine of a bench, in a process of its own: `python -m tests.bench.serving_engine MODEL SECTION`.

SECTION is a serve section as JSON; the engine is started with the planner's own arguments. Then each line of the input
is a round, `[[at, prompt, tokens, priority], ...]` with times in seconds from its beginning, and each line of the
output its answers: `{"rows": [[first, last, tokens], ...], "ids": [...], "seconds": ...}`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from fastserve.artifacts.describe import describe
from fastserve.plan.engine import engine_args, engine_env
from fastserve.plan.facts import Hardware
from fastserve.plan.revision import Revision, deciding
from fastserve.plan.stages import Stage
from fastserve.spec.serve import Serve
from fastserve.stages.serve.server import parse, prepare_environment

MACHINE = Hardware(cpus=1, memory_bytes=8 * 2**30)
"""One thread for each engine: those of several would spin against each other on the same cores (measured with three
engines of two threads on two busy cores: 140 ms a step of a model of a few hundred thousand parameters)."""


def engine_of(model: Path, section: dict[str, Any]) -> Any:
    serve = Serve.model_validate(section)
    revision = Revision("bench", Stage.SOURCE, "k" * 64, "d" * 64, deciding(serve))
    prepare_environment(engine_env(revision, MACHINE) | {"VLLM_LOGGING_LEVEL": "ERROR"})
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    argv = parse(model, [*engine_args(revision, describe(model), MACHINE), "--disable-log-stats"])
    return AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(argv))


async def play(engine: Any, round_: int, rows: list[list[Any]]) -> dict[str, Any]:
    """Ask for everything at its time; times of the answers count from when they were due."""
    from vllm import SamplingParams

    began = time.monotonic()

    async def ask(
        number: int, at: float, prompt: list[int], tokens: int, priority: int
    ) -> tuple[float, float, list[int]]:
        await asyncio.sleep(max(0.0, began + at - time.monotonic()))
        parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        name, times, ids = f"{round_}-{number}", [], []
        async for output in engine.generate({"prompt_token_ids": prompt}, parameters, name, priority=priority):
            times.append(time.monotonic() - began - at)
            ids = output.outputs[0].token_ids
        return times[0], times[-1], list(ids)

    answers = await asyncio.gather(*(ask(number, *row) for number, row in enumerate(rows)))
    return {
        "rows": [[first, last, len(ids)] for first, last, ids in answers],
        "ids": [ids for _, _, ids in answers],
        "seconds": time.monotonic() - began,
    }


async def serve() -> None:
    # All engines of a bench on one core: three on two cores get unequal parts, and load decides more than the order.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    engine = engine_of(Path(sys.argv[1]), json.loads(sys.argv[2]))
    out = sys.stdout
    out.write("up\n")
    out.flush()
    loop = asyncio.get_running_loop()
    round_ = 0
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        out.write(json.dumps(await play(engine, round_, json.loads(line))) + "\n")
        out.flush()
        round_ += 1
    engine.shutdown()


if __name__ == "__main__":
    asyncio.run(serve())
