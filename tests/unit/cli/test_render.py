"""What a person is shown: no colour and no folding outside a terminal, the same figures as in JSON."""

import io

from rich.console import Console

from fastserve.cli import render
from fastserve.cli.screen import _detail
from fastserve.plan.gate import decide
from fastserve.spec.evaluate import Gate

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
