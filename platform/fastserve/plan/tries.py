"""What follows from how the last attempt at an artifact ended: the first try, the next one, the wait before it, or the
end.

The same for a stage of the pipeline and for an adapter that is brought in beside it.
"""

from __future__ import annotations

from collections.abc import Callable

from fastserve.plan.moves import Move, Refuse, RunStage, Wait
from fastserve.plan.observed import Attempt, AttemptState, Observed

BACKOFF_SECONDS = (0.0, 2.0, 10.0)
"""Wait after the first, second and third failed attempt."""

MAX_ATTEMPTS = len(BACKOFF_SECONDS) + 1
"""Attempts at one key before it is refused."""


def next_try(
    what: str,
    observed: Observed,
    key: str,
    run: Callable[[int, str], RunStage],
    now: float,
    place: tuple[str, str],
) -> list[Move]:
    """The next attempt at `key`, which is not committed and not running, or the wait for it, or a refusal.

    what: its name as a sentence begins with it, such as `Stage train`. run: makes the move from the attempt's number
    and the reason. now: Unix seconds. place: model and stage, for the command that shows the log.
    """
    attempt = observed.attempts.get(key)
    if attempt is None:
        return [run(1, f"{what} has no artifact yet for what the manifest says now (key {key[:8]}).")]
    model, stage = place
    tries = attempt.number - observed.forgiven.get(key, 0)
    if tries <= 0:
        because = f"{what} was asked for again and is tried anew: attempt {attempt.number} {_ended(attempt)}."
        return [run(attempt.number + 1, because)]
    if attempt.state is AttemptState.FAILED and attempt.final:
        return [Refuse(because=f"{what} {_ended(attempt)}.", reason=attempt.reason or "StageFailed", stage=stage)]
    if tries >= MAX_ATTEMPTS:
        because = (
            f"{what} did not succeed in {tries} attempts; the last one {_ended(attempt)}. "
            f"`fastserve logs {model} {stage}` shows more; `fastserve up` tries again."
        )
        return [Refuse(because=because, reason="StageFailed", stage=stage)]
    return _retry(what, attempt, tries, run, now, stage)


def _retry(
    what: str, attempt: Attempt, tries: int, run: Callable[[int, str], RunStage], now: float, stage: str
) -> list[Move]:
    due = (attempt.ended_at or 0.0) + BACKOFF_SECONDS[tries - 1]
    story = f"attempt {attempt.number} {_ended(attempt)}"
    # A clock that was set back must not make the wait longer than it was meant to be.
    if now < due <= now + BACKOFF_SECONDS[tries - 1]:
        return [Wait(because=f"{what} is tried again in a moment: {story}.", stage=stage, until=due)]
    return [run(attempt.number + 1, f"{what} is tried again (try {tries + 1} of {MAX_ATTEMPTS}): {story}.")]


def _ended(attempt: Attempt) -> str:
    if attempt.state is AttemptState.LOST:
        return "was lost: it ended without a word" + (f" ({attempt.message.rstrip('.')})" if attempt.message else "")
    told = ": ".join(part for part in (attempt.reason, attempt.message.rstrip(".")) if part)
    return f"failed ({told})" if told else "failed"
