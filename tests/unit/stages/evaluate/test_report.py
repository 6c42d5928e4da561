import json
import math

import numpy as np
import pytest

from fastserve.plan.gate import decide
from fastserve.spec.evaluate import Gate
from fastserve.stages.evaluate.divergence import RowScore
from fastserve.stages.evaluate.endless import Answer
from fastserve.stages.evaluate.held_out import HeldOut, HeldOutRow
from fastserve.stages.evaluate.report import Figures, metrics_of, row_lines, write_lines
from fastserve.stages.evaluate.speed import Speeds

ENDED, ENDLESS = Answer([1, 2], "", True), Answer([5] * 48, "", False)


def score(*probabilities):
    """Two known tokens a position; the row's own token has the probability that is given."""
    chosen = np.array(probabilities)
    return RowScore(np.tile(np.array([7, 8], np.int32), (len(chosen), 1)), np.log(np.stack([chosen, 0.9 - chosen], 1)))


@pytest.fixture
def rows():
    return HeldOut(
        rows=[HeldOutRow([1, 2, 7, 7], [2, 3], str(n), f"rows.jsonl:{n}") for n in range(10)],
        excluded={"no assistant token within context": 3},
        truncated=0,
    )


@pytest.fixture
def figures(rows, tmp_path):
    folders = {}
    for role, size in (("parent", 100), ("candidate", 60)):
        folders[role] = tmp_path / role
        folders[role].mkdir()
        (folders[role] / "model.safetensors").write_bytes(bytes(size))
        (folders[role] / "tokenizer.json").write_bytes(bytes(999))
    found = Figures(rows=rows, digests={"parent": "p" * 64, "candidate": "c" * 64}, folders=folders)
    found.scores = {"parent": [score(0.5, 0.4)] * 10, "candidate": [score(0.4, 0.4)] * 10}
    found.speeds = Speeds([100, 110, 90], [120, 132, 108])
    return found


def test_the_figures_of_both_models_stand_side_by_side(figures):
    models = metrics_of(figures, {})["models"]
    assert models["candidate"]["sizeBytes"] == 60
    assert models["candidate"]["digest"] == "c" * 64
    assert models["parent"]["perplexity"] == pytest.approx(math.exp(-(math.log(0.5) + math.log(0.4)) / 2))
    assert (models["parent"]["tokensPerSecond"], models["candidate"]["tokensPerSecond"]) == (100, 120)


def test_the_comparison_is_over_tokens_and_paired_by_row(figures):
    metrics = metrics_of(figures, {})
    assert metrics["perplexityIncrease"]["value"] == pytest.approx((0.5 / 0.4) ** 0.5 - 1)
    kl = 0.5 * math.log(0.5 / 0.4) + 0.4 * math.log(0.4 / 0.5)
    assert metrics["klDivergence"]["value"] == pytest.approx(kl / 2)
    assert metrics["flippedTokens"]["value"] == pytest.approx(0.5)
    assert metrics["speedup"]["value"] == pytest.approx(1.2)
    assert (metrics["rows"], metrics["distinctRows"], metrics["tokens"]) == (10, 10, 20)
    assert metrics["excludedRows"] == {"no assistant token within context": 3}


def test_the_gate_reads_what_the_stage_writes(figures):
    metrics = json.loads(json.dumps(metrics_of(figures, {})))
    wide = Gate.model_validate({"perplexityIncrease": "20%", "flippedTokens": "60%", "speedup": 1.1})
    assert decide(metrics, wide).outcome == "pass"
    assert decide(metrics, Gate()).outcome == "fail"


def test_endless_answers_count_where_the_parent_ends(figures):
    figures.free = {
        "parent": {index: ENDED if index < 8 else ENDLESS for index in range(10)},
        "candidate": {index: ENDLESS if index < 2 else ENDED for index in range(8)},
    }
    metrics = metrics_of(figures, {})
    assert metrics["endlessAnswers"]["value"] == pytest.approx(0.25)
    assert metrics["endedAnswers"] == 8
    assert [line.get("endless") for line in row_lines(figures)] == [True] * 2 + [False] * 6 + [None] * 2


def test_a_candidate_that_is_its_own_parent_is_compared_with_nothing(figures):
    figures.digests = dict.fromkeys(("parent", "candidate", "source"), "c" * 64)
    figures.folders = {"candidate": figures.folders["candidate"]}
    figures.scores = {"candidate": figures.scores["candidate"]}
    figures.speeds, figures.candidate_speed = None, 77.0
    metrics = metrics_of(figures, {})
    assert metrics["models"]["parent"] == metrics["models"]["candidate"]
    assert metrics["models"]["candidate"]["tokensPerSecond"] == 77.0
    assert not metrics.keys() & {"perplexityIncrease", "klDivergence", "flippedTokens", "speedup", "endlessAnswers"}
    assert decide(metrics, Gate()).outcome == "pass"


def test_the_lines_hold_figures_and_no_text(figures, tmp_path):
    write_lines(tmp_path / "rows.jsonl", row_lines(figures))
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(lines) == 10
    assert lines[3]["row"] == "rows.jsonl:3"
    assert lines[3].keys() == {"row", "digest", "tokens", "nll", "klDivergence", "flippedTokens"}
