"""Which models do which task, known from the name of their architecture before an engine is started."""

from __future__ import annotations

import re

from fastserve.errors import Problem
from fastserve.plan.facts import ModelFacts

_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_ENCODER = re.compile(r"Bert|Roberta|MPNet|Electra|Deberta")
_SCORES = "ForSequenceClassification"
_SPEECH = "WhisperForConditionalGeneration"


def is_encoder(architecture: str) -> bool:
    """Whether it reads a whole text at once and keeps no KV cache."""
    return _ENCODER.search(architecture) is not None and not architecture.endswith(_GENERATES)


def is_speech(architecture: str) -> bool:
    """Whether it turns sound into text."""
    return architecture == _SPEECH


def task_problem(task: str, facts: ModelFacts) -> Problem | None:
    """Why a model cannot do `serve.task`; None when it can."""
    kind = facts.architecture
    if is_speech(kind) and task != "transcribe":
        return _problem(kind, "turns speech into text", "transcribe")
    if task == "transcribe" and not is_speech(kind):
        return _problem(kind, "does not hear", "generate" if kind.endswith(_GENERATES) else "embed")
    if task == "generate" and not kind.endswith(_GENERATES):
        known = "scores texts" if kind.endswith(_SCORES) else "makes vectors of texts"
        return _problem(kind, known, "score" if kind.endswith(_SCORES) else "embed")
    if task == "embed" and kind.endswith(_SCORES):
        return _problem(kind, "scores pairs of texts and makes no vectors", "score")
    return None


def _problem(kind: str, does: str, task: str) -> Problem:
    return Problem("spec.serve.task", f"the model is a {kind}, which {does}; write task: {task}", suggestion=task)
