"""The evaluate stage as a manifest runs it: real models, held-out rows, a task with blanks in its references."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from quality_bench import Bench

from fastserve.artifacts.record import Record
from fastserve.plan.stages import Stage
from fastserve.stages.evaluate.exact_match import WORDS

# The engine and the compressor warn about their own insides.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]

DATA = Path(__file__).parents[2] / "data"
REFERENCE = "The capital of France is Paris."


@pytest.fixture(scope="module")
def evaluated(bench: Bench, smollm: Record, rounded: Record) -> Record:
    """Case 09: one task twice, the second time with blanks that nobody sees."""
    rows = (DATA / "quality" / "capitals.jsonl").as_uri()
    tasks = {name: (DATA / "cases" / f"09-task-{name}.jsonl").as_uri() for name in ("clean", "dirty")}
    section: dict[str, Any] = {
        "data": {"uri": rows},
        "tasks": [{"name": name, "data": {"uri": uri}, "metric": "exactMatch"} for name, uri in tasks.items()],
        "maxRows": 16,
        "context": 256,
    }
    return bench.make(Stage.EVALUATE, section, {"candidate": rounded, "parent": smollm}, [rows, *tasks.values()])


def test_the_digests_that_were_evaluated_are_those_of_the_artifacts(
    evaluated: Record, smollm: Record, rounded: Record
) -> None:
    models = evaluated.metrics["models"]
    assert models["candidate"]["digest"] == rounded.digest
    assert models["parent"]["digest"] == smollm.digest
    assert models["candidate"]["sizeBytes"] < 0.65 * models["parent"]["sizeBytes"]


def test_every_figure_has_an_interval_around_it(evaluated: Record) -> None:
    for name in ("perplexityIncrease", "klDivergence", "flippedTokens", "speedup", "endlessAnswers"):
        found = evaluated.metrics[name]
        assert found["low"] <= found["value"] <= found["high"], name
    assert 0 < evaluated.metrics["klDivergence"]["value"] < 0.1
    assert evaluated.metrics["excludedRows"] == {"beyond maxRows": 48}
    assert evaluated.metrics["models"]["candidate"]["tokensPerSecond"] > 0


def test_blanks_in_the_references_change_no_score(evaluated: Record) -> None:
    clean, dirty = (evaluated.metrics["tasks"][name] for name in ("clean", "dirty"))
    assert clean["candidate"] == dirty["candidate"]
    assert clean["parent"] == dirty["parent"]
    assert clean["parent"]["value"] == 1.0
    assert (clean["rows"], clean["distinctRows"]) == (4, 1)


def test_the_report_has_the_words_and_both_texts(bench: Bench, evaluated: Record) -> None:
    report = bench.report(evaluated)
    assert report["tasks"]["dirty"]["normalisation"] == WORDS
    lines = bench.lines(evaluated, report["tasks"]["dirty"]["lines"])
    assert len(lines) == 4
    assert all(line["parentPrediction"] == REFERENCE for line in lines)
    assert {line["reference"] for line in lines} != {REFERENCE}


def test_the_figures_by_row_hold_no_text(bench: Bench, evaluated: Record) -> None:
    lines = bench.lines(evaluated, "rows.jsonl")
    assert len(lines) == 16
    assert "capital" not in json.dumps([{**line, "row": ""} for line in lines])


def test_the_compressed_model_keeps_tokenizer_template_and_stop_tokens(
    bench: Bench, smollm: Record, rounded: Record
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (bench.model(rounded) / name).read_bytes() == (bench.model(smollm) / name).read_bytes()
    config = json.loads((bench.model(rounded) / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert rounded.metrics["method"] == "roundToNearest"
    assert rounded.metrics["bytesAfter"] < rounded.metrics["bytesBefore"]
