"""Real engines one after the other, started from the planner's own arguments, and requests that come at given steps.

python mlfq_engine.py MODEL SECTIONS: SECTIONS are serve sections as a JSON list; prints token ids and counters of each
as a JSON list.
"""

from __future__ import annotations

import gc
import json
import random
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fastserve.artifacts.describe import describe
from fastserve.plan.engine import engine_args, engine_env
from fastserve.plan.facts import Hardware
from fastserve.plan.revision import Revision, deciding
from fastserve.plan.stages import Stage
from fastserve.spec.serve import Serve
from fastserve.stages.serve.server import parse, prepare_environment

REQUESTS = 40
STRICT = range(2, REQUESTS, 5)
"""Requests for structured output, short and long ones among them."""

LETTERS = "[a-z ]*"
MACHINE = Hardware(cpus=2, memory_bytes=8 * 2**30)


def workload() -> list[tuple[int, list[int], int]]:
    """(step at which it comes, prompt, tokens of the answer): 80 % short, 20 % long, some prompts of several blocks."""
    draw, step, found = random.Random(5), 0, []
    for _ in range(REQUESTS):
        step += draw.choice([0, 0, 1, 3, 8])
        prompt = [draw.randint(10, 250) for _ in range(draw.choice([3, 20, 33, 64, 150]))]
        found.append((step, prompt, draw.randint(100, 160) if draw.random() < 0.2 else draw.randint(4, 16)))
    return found


def engine_of(model: Path, section: dict[str, Any]) -> Any:
    serve = Serve.model_validate(section)
    revision = Revision("tiny", Stage.SOURCE, "k" * 64, "d" * 64, deciding(serve))
    prepare_environment(engine_env(revision, MACHINE))
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    argv = parse(model, engine_args(revision, describe(model), MACHINE))
    return LLMEngine.from_engine_args(EngineArgs.from_cli_args(argv))


def run(model: Path, section: dict[str, Any]) -> dict[str, Any]:
    engine = engine_of(model, section)
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    coming, answers, step = workload(), {}, 0
    for number, (when, prompt, tokens) in enumerate(coming):
        while step < when:
            step += 1
            _take(engine, answers)
        wanted = StructuredOutputsParams(regex=LETTERS) if number in STRICT else None
        parameters = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, structured_outputs=wanted
        )
        engine.add_request(str(number), {"prompt_token_ids": prompt}, parameters)
    while engine.has_unfinished_requests():
        _take(engine, answers)
    scheduler = engine.engine_core.engine_core.scheduler
    counters = {name: getattr(scheduler, name, 0) for name in ("preemptions", "demotions", "promotions")}
    ids = [answers[str(number)] for number in range(REQUESTS)]
    read = Tokenizer.from_file(str(model / "tokenizer.json")).decode
    strict = [read(ids[number]) for number in STRICT]
    return {"ids": ids, "strict": strict, "scheduler": type(scheduler).__name__, **counters}


def main() -> None:
    found = []
    for section in json.loads(sys.argv[2]):
        found.append(run(Path(sys.argv[1]), section))
        gc.collect()  # frees the engine before
    sys.stdout.write("\n" + json.dumps(found) + "\n")


def _take(engine: Any, answers: dict[str, list[int]]) -> None:
    for output in engine.step():
        if output.finished:
            answers[output.request_id] = list(output.outputs[0].token_ids)


if __name__ == "__main__":
    main()
