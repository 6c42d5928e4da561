"""What a person is shown: no colour and no folding outside a terminal, the same figures as in JSON."""

import io

from rich.console import Console

from fastserve.cli import render
from fastserve.cli.screen import _detail
from fastserve.plan.facts import Hardware, ModelFacts
from fastserve.plan.gate import decide
from fastserve.plan.sheet import Sheet
from fastserve.plan.training import plan_training
from fastserve.spec.evaluate import Gate
from fastserve.spec.train import Train

METRICS = {
    "rows": 131,
    "distinctRows": 131,
    "tokens": 1134,
    "models": {
        "source": {"sizeBytes": 269_060_552, "perplexity": 83.973, "digest": "a"},
        "parent": {"sizeBytes": 269_060_552, "perplexity": 33.264, "tokensPerSecond": 171.0, "digest": "b"},
        "candidate": {"sizeBytes": 163_203_272, "perplexity": 34.384, "tokensPerSecond": 195.0, "digest": "c"},
    },
    "perplexityIncrease": {"value": 0.0337, "low": 0.003, "high": 0.0626},
    "klDivergence": {"value": 0.0365, "low": 0.032, "high": 0.0421},
    "flippedTokens": {"value": 0.0838, "low": 0.0669, "high": 0.102},
}


def drawn(divergence: float) -> str:
    limits = {"perplexityIncrease": "10%", "klDivergence": divergence, "flippedTokens": "15%"}
    gate = Gate.model_validate(limits)
    file = io.StringIO()
    render.comparison(METRICS, decide(METRICS, gate), console=Console(file=file, width=160))
    return file.getvalue()


def test_parent_and_candidate_stand_side_by_side_with_the_verdict() -> None:
    shown = drawn(0.1)
    for word in ("SOURCE", "PARENT", "CANDIDATE", "83.973", "33.264", "34.384", "257 MiB", "156 MiB", "gate: pass"):
        assert word in shown
    assert "\x1b" not in shown


def test_a_refusal_shows_its_reason() -> None:
    shown = drawn(0.01)
    assert "gate: fail" in shown
    assert "klDivergence is broken" in shown


def planned(**settings: object) -> str:
    facts = ModelFacts(
        architecture="LlamaForCausalLM",
        parameters=134_515_008,
        weight_bytes=269_060_552,
        layers=30,
        hidden=576,
        intermediate=1536,
        heads=9,
        kv_heads=3,
        head_dim=64,
        vocab=49_152,
        max_context=8192,
        tied_embeddings=True,
        dtype="bfloat16",
    )
    machine = Hardware(cpus=2, memory_bytes=24 * 2**30)
    train = Train.model_validate({"dataset": "file:///d", **settings})
    plan = plan_training(facts, train, machine)
    file = io.StringIO()
    render.sheet(Sheet("chat", (), tables=plan.tables, training=plan), Console(file=file, width=160, soft_wrap=True))
    return file.getvalue()


def test_the_shares_of_training_are_a_table_in_which_equal_neighbours_share_a_line() -> None:
    shown = planned(
        workers=[{"profile": "local", "count": 1, "speed": 2}, {"profile": "local", "count": 2, "speed": 1}]
    )
    lines = shown.splitlines()
    header = next(line for line in lines if line.startswith("WORKER"))
    for column in ("PROFILE", "TOKENS/S", "OF THE BATCH", "OF THE STATE", "TOKENS AT ONCE", "PEAK MEMORY"):
        assert column in header
    first, second = lines[lines.index(header) + 1 :][:2]
    assert first.split()[0] == "0"
    assert "given" in first
    assert "50%" in first
    assert second.startswith("1 to 2")
    assert second.count("25%") == 2
    assert "A step of 4,096 tokens takes about" in shown
    assert "measured when the run starts" not in shown


def test_assumed_speeds_and_one_worker_are_named_as_what_they_are() -> None:
    shown = planned()
    assert "Training on one worker" in shown
    assert "assumed" in shown
    assert "measured when the run starts" not in shown
    assert "measured when the run starts" in planned(workers=[{"profile": "local", "count": 2}])
    assert "measured when the run starts" not in planned(engine="fsdp2", workers=[{"profile": "local", "count": 2}])
    assert "Memory of the training worker" in shown


def test_a_byte_table_of_several_shows_one_of_them_and_all() -> None:
    shown = planned(workers=[{"profile": "local", "count": 3}])
    assert "Memory of each of 3 training workers" in shown
    assert any(line.startswith("each ") for line in shown.splitlines())
    assert any(line.startswith("all 3 ") and "of 24 GiB there are" in line for line in shown.splitlines())


def test_progress_is_one_line_with_rate_and_time_left() -> None:
    progress = {
        "done": 12,
        "total": 40,
        "unit": "steps",
        "ratePerSecond": 1.3,
        "etaSeconds": 21.5,
        "note": "training",
        "metrics": {"loss": 2.3141, "words": "not a number"},
    }
    assert _detail(progress) == "12/40 steps, 1.3 steps/s, 22s left, loss 2.314, training"
    assert _detail({}) == ""
    assert "20 s each" in _detail({**progress, "ratePerSecond": 0.05})
