"""What kubectl apply notes is no wish, and what it lost is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastserve.errors import ManifestInvalid
from fastserve.spec.applied import NOTE
from fastserve.spec.load import read
from fastserve.spec.model import Model
from fastserve.spec.shape import walk


def got(spec: dict[str, Any], applied: Any) -> str:
    """An object as `kubectl get -o json` shows it, with the manifest that was applied."""
    note = applied if isinstance(applied, str) else json.dumps({"spec": applied})
    metadata = {"name": "a", "annotations": {NOTE: note}}
    return json.dumps({"apiVersion": "fastserve.dev/v1alpha1", "kind": "Model", "metadata": metadata, "spec": spec})


def gate(**limits: Any) -> dict[str, Any]:
    return {"source": "a", "evaluate": {"data": "b", "gate": limits}}


@pytest.mark.parametrize(
    ("spec", "applied", "path", "words"),
    [
        (gate(klDivergence=0.1), gate(klDivergence=None), "spec.evaluate.gate.klDivergence", "reached: 1e9"),
        (gate(flippedTokens="10%"), gate(flippedTokens=None), "spec.evaluate.gate.flippedTokens", "reached: 100%"),
        (
            gate(perplexityIncrease="5%"),
            gate(perplexityIncrease=None),
            "spec.evaluate.gate.perplexityIncrease",
            "reached: 1000000%",
        ),
        (
            {"source": "a", "train": {"dataset": "b", "clipNorm": 1}},
            {"source": "a", "train": {"dataset": "b", "clipNorm": None}},
            "spec.train.clipNorm",
            "--server-side",
        ),
    ],
)
def test_a_null_that_was_lost_is_a_problem(spec: Any, applied: Any, path: str, words: str) -> None:
    with pytest.raises(ManifestInvalid) as caught:
        read(got(spec, applied))
    (problem,) = caught.value.problems
    assert problem.path == path
    assert words in problem.message


@pytest.mark.parametrize(
    ("spec", "applied"),
    [
        (gate(klDivergence=None), gate(klDivergence=None)),
        (gate(klDivergence=0.3), gate(klDivergence=None)),
        (gate(klDivergence=0.1), gate()),
        (gate(klDivergence=0.1), gate(klDivergence=0.1)),
        (gate(klDivergence=0.1), "what is this"),
        (gate(klDivergence=0.1), []),
        ({"source": "a", "serve": {"task": "generate"}}, {"source": "a", "serve": {"task": None}}),
        ({"source": "a", "compress": [{"quantize": {"format": "int8"}}]}, {"source": "a", "compress": [None, None]}),
    ],
)
def test_nothing_else_is(spec: Any, applied: Any) -> None:
    (model,) = read(got(spec, applied))
    assert model.metadata.annotations == {}


def test_every_limit_that_null_switches_off_has_a_value_that_is_never_reached() -> None:
    fields = {path: field for path, field in walk(Model) if field.nullable and field.default is not None}
    assert fields
    for path, field in fields.items():
        manifest: dict[str, Any] = gate() | {"train": {"dataset": "b"}}
        block = manifest
        *above, key = path.removeprefix("spec.").split(".")
        for name in above:
            block = block.setdefault(name, {})
        applied = json.loads(json.dumps(manifest))
        below = applied
        for name in above:
            below = below[name]
        block[key], below[key] = field.shown_default, None
        if field.shape.form is not None and field.shape.form.write is None:
            block[key] = field.default
        with pytest.raises(ManifestInvalid) as caught:
            read(got(manifest, applied))
        value = caught.value.problems[0].message.rpartition(": ")[2]
        block[key] = value if "%" in value else float(value)
        read(got(manifest, applied))
