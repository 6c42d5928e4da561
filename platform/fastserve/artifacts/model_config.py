"""A model's config.json with other values in it: the shape of a model that is made from scratch.

Both the plan, which must know the size of that model, and the stage that makes it read the same rules here.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastserve.errors import ManifestInvalid, Problem
from fastserve.spec.train import Scratch

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_HEADS = ("num_attention_heads", "n_head")
_KV_HEADS = ("num_key_value_heads",)
_MOST_NAMED = 12


def overridden(config: Mapping[str, Any], scratch: Scratch, vocabulary: int | None = None) -> dict[str, Any]:
    """`config` with the values of `scratch.config`, and with `vocabulary` tokens where that is given.

    A list with one entry a layer follows the number of layers. config: of the source, as in its file; left as it is.

    Raises ManifestInvalid with every key that the file does not have, every value of another kind, and heads that do
    not divide what they share.
    """
    changed: dict[str, Any] = json.loads(json.dumps(config))
    inner = changed.get("text_config")
    places = [inner, changed] if isinstance(inner, dict) else [changed]
    problems = []
    before = whole(changed, _LAYERS)
    for key, value in scratch.config.items():
        place = next((place for place in places if key in place), None)
        if place is None:
            problems.append(_unknown(key, places))
        elif isinstance(place[key], list | dict):
            shape = "list" if isinstance(place[key], list) else "mapping"
            problems.append(_problem(key, f"is a {shape}; change it in the source's config.json itself"))
        elif _kind(place[key]) not in (None, _kind(value)):
            kind = _kind(place[key])
            problems.append(_problem(key, f"is {kind} in config.json, not {value!r}; write {kind}"))
        else:
            place[key] = value
    if problems:
        raise ManifestInvalid(problems)
    after = whole(changed, _LAYERS)
    if before and after and before != after:
        for place in places:
            _follow_layers(place, before, after)
    if vocabulary is not None:
        next((place for place in places if "vocab_size" in place), changed)["vocab_size"] = vocabulary
    _require_whole_heads(changed)
    return changed


def whole(config: Mapping[str, Any], names: Sequence[str]) -> int | None:
    """The first of `names` that `config`, or the part of it about text, holds as a whole number."""
    inner = config.get("text_config")
    for place in (inner, config):
        for name in names:
            value = place.get(name) if isinstance(place, Mapping) else None
            if type(value) is int:
                return value
    return None


def _follow_layers(place: dict[str, Any], before: int, after: int) -> None:
    """Lists such as layer_types: their pattern goes on, or ends earlier."""
    for key, value in place.items():
        if isinstance(value, list) and len(value) == before:
            place[key] = [value[index % before] for index in range(after)]


def _require_whole_heads(config: Mapping[str, Any]) -> None:
    heads, kv_heads, hidden = whole(config, _HEADS), whole(config, _KV_HEADS), whole(config, _HIDDEN)
    if heads and kv_heads and heads % kv_heads:
        message = f"is {kv_heads}, which does not divide the {heads} attention heads; write one that does"
        raise ManifestInvalid([_problem("num_key_value_heads", message)])
    if heads and hidden and hidden % heads and not whole(config, ("head_dim",)):
        message = f"is {hidden}, which the {heads} attention heads cannot share evenly; write a multiple of {heads}"
        raise ManifestInvalid([_problem("hidden_size", message)])


def _kind(value: Any) -> str | None:
    """What a value is, in words; None for null, which may become anything."""
    if value is None:
        return None
    if isinstance(value, bool):
        return "true or false"
    return "a number" if isinstance(value, int | float) else "text"


def _unknown(key: str, places: Sequence[Mapping[str, Any]]) -> Problem:
    known = sorted({name for place in places for name, value in place.items() if not isinstance(value, list | dict)})
    near = difflib.get_close_matches(key, known, 1)
    shown = ", ".join(known[:_MOST_NAMED]) + (", ..." if len(known) > _MOST_NAMED else "")
    advice = f"did you mean {near[0]}?" if near else f"it has {shown}"
    return _problem(key, f"is no key of the source's config.json; {advice}", near[0] if near else None)


def _problem(key: str, message: str, suggestion: str | None = None) -> Problem:
    return Problem(f"spec.train.scratch.config.{key}", message, suggestion=suggestion)
