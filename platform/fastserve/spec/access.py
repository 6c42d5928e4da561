"""Who may ask which model, and how much."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fastserve.spec.section import Day, Duration, Name, Positive, Section


class TokenBudget(Section):
    """Tokens that may be used in a window of time."""

    tokens: Positive
    """Prompt and answer tokens together."""

    window: Annotated[Duration, Field(gt=0)]
    """Length of the window, such as 30d."""


class AccessKeySpec(Section):
    """A key for one consumer. The key itself is never in a manifest."""

    models: Annotated[list[Name], Field(min_length=1)]
    """Models that the key may ask for; one opens its adapters too, and an adapter may stand here alone."""

    requests_per_minute: Positive | None = None
    """Most requests a minute. Nothing keeps it yet, so it is refused by name."""

    tokens_per_minute: Positive | None = None
    """Most tokens a minute. Nothing keeps it yet, so it is refused by name."""

    max_parallel: Positive | None = None
    """Most requests at the same time. Nothing keeps it yet, so it is refused by name."""

    token_budget: TokenBudget | None = None
    """Most tokens in a long window. Nothing keeps it yet, so it is refused by name."""

    expires: Day | None = None
    """Last day on which the key works, in UTC, as YYYY-MM-DD."""
