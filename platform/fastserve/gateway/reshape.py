"""Engines' whole answers, made into what clients expect of the route."""

from __future__ import annotations

import json
from typing import Any

from fastserve.gateway.answers import Refusal


def ranked(body: bytes, top_n: int | None) -> tuple[bytes, str]:
    """A rerank answer: best first, `top_n` of them (None: all), each with its place in the request.

    Clients read the first as the best, and pair others by `index`. Of equal scores the earlier document comes first.
    """
    answer = _object(body)
    results = answer.get("results")
    if not isinstance(results, list):
        raise _unknown()
    try:
        results = sorted(results, key=lambda result: (-float(result["relevance_score"]), int(result["index"])))
    except (KeyError, TypeError, ValueError):
        raise _unknown() from None
    return json.dumps({**answer, "results": results[:top_n]}, ensure_ascii=False).encode(), "application/json"


def plain_text(body: bytes) -> tuple[bytes, str]:
    """A transcript as text alone; engines write it as JSON."""
    text = _object(body).get("text")
    if not isinstance(text, str):
        raise _unknown()
    return text.encode(), "text/plain"


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise _unknown() from None
    if not isinstance(value, dict):
        raise _unknown()
    return value


def _unknown() -> Refusal:
    return Refusal(502, "The engine's answer was not understood.", code="upstream_failed")
