"""What the plan says a worker keeps is what the engine keeps, for any shares: within 2 %."""

from __future__ import annotations

from typing import Any

import engine_models as tiny
import pytest
import torch.distributed as dist
from ranks import run_ranks

from fastserve.plan.facts import ModelFacts, WorkerFacts
from fastserve.plan.shares import plan_shares
from fastserve.plan.training import training_facts
from fastserve.spec.train import Train
from fastserve.stages.train.group import Group
from fastserve.stages.train.shard import Sharded

SHAPE = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 512}
GB = 10**9


def facts_of(model: Any) -> ModelFacts:
    config = model.config
    return ModelFacts(
        architecture="LlamaForCausalLM",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weight_bytes=0,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        vocab=config.vocab_size,
        max_context=64,
        tied_embeddings=config.tie_word_embeddings,
        dtype="float32",
    )


@pytest.mark.parametrize("speeds", [(100.0,), (1.0, 1.0, 1.0), (1.0, 2.0, 7.0), (1e-9, 1.0, 3.0)])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_is_planned_is_what_is_kept(method: str, speeds: tuple[float, ...]) -> None:
    lora = {"lora": {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}} if method == "lora" else {}
    train = Train.model_validate({"dataset": "file:///d", "method": method, "precision": "fp32", **lora})
    facts = training_facts(facts_of(tiny.model_of(**SHAPE)), train)
    workers = [WorkerFacts(f"worker-{index}", "local", speed, 8 * GB) for index, speed in enumerate(speeds)]
    plan = plan_shares(workers, facts, 1024)

    def rank() -> int:
        network = tiny.full(**SHAPE) if method == "full" else tiny.lora(**SHAPE)
        engine = Sharded(network, plan.state, Group.current(), frozen_whole=plan.frozen_whole)
        for _ in range(2):
            engine.clear()
            tiny.accumulate(engine, [tiny.samples(2, seed=dist.get_rank())])
            engine.step(1e-3, None)
        return engine.kept_bytes

    kept = run_ranks(rank, len(speeds))
    assert kept == pytest.approx(list(plan.kept_bytes), rel=0.02, abs=4096)
