"""Which models do which task."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastserve.plan.engine import engine_args
from fastserve.plan.memory import plan_cache, serving_memory
from fastserve.plan.revision import Revision, deciding
from fastserve.plan.stages import Stage
from fastserve.plan.tasks import is_encoder, task_problem
from fastserve.spec.serve import Serve


@pytest.mark.parametrize(
    ("architecture", "task", "write"),
    [
        ("LlamaForCausalLM", "generate", None),
        ("LlamaForCausalLM", "embed", None),
        ("Qwen3ForCausalLM", "score", None),
        ("BertModel", "embed", None),
        ("BertModel", "score", None),
        ("BertModel", "generate", "embed"),
        ("XLMRobertaForSequenceClassification", "score", None),
        ("XLMRobertaForSequenceClassification", "generate", "score"),
        ("XLMRobertaForSequenceClassification", "embed", "score"),
        ("WhisperForConditionalGeneration", "transcribe", None),
        ("WhisperForConditionalGeneration", "generate", "transcribe"),
        ("LlamaForCausalLM", "transcribe", "generate"),
    ],
)
def test_a_task_that_the_model_cannot_do_is_refused_with_the_one_it_can(smol, architecture, task, write):
    problem = task_problem(task, replace(smol, architecture=architecture))
    assert (problem.suggestion if problem else None) == write
    if problem:
        assert architecture in problem.message


@pytest.mark.parametrize(
    ("architecture", "encoder"),
    [("BertModel", True), ("ModernBertForSequenceClassification", True), ("MPNetModel", True), ("LlamaModel", False),
     ("BertForCausalLM", False), ("Qwen3ForCausalLM", False)],
)  # fmt: skip
def test_encoders_are_known_by_their_name(architecture, encoder):
    assert is_encoder(architecture) is encoder


def test_an_encoder_has_no_cache_and_computes_as_it_is_stored(smol, laptop):
    bert = replace(smol, architecture="BertModel", dtype="float32", max_context=256)
    serve = Serve.model_validate({"task": "embed"})
    assert plan_cache(bert, serve, laptop).kv_cache_bytes == 0
    assert "KV cache" not in [line.what for line in serving_memory(bert, serve, 1, laptop).lines]
    found = engine_args(Revision("words", Stage.SOURCE, "k" * 64, "d" * 64, deciding(serve)), bert, laptop)
    for item in ("--runner=pooling", "--dtype=float32", "--max-model-len=256", "--no-enable-prefix-caching"):
        assert item in found


def test_a_decoder_that_makes_vectors_keeps_its_cache(smol, laptop):
    serve = Serve.model_validate({"task": "embed"})
    assert plan_cache(smol, serve, laptop).kv_cache_bytes > 0
    found = engine_args(Revision("words", Stage.SOURCE, "k" * 64, "d" * 64, deciding(serve)), smol, laptop)
    assert {"--runner=pooling", "--dtype=auto", "--enable-prefix-caching"} <= set(found)
