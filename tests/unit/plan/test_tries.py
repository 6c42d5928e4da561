"""The next attempt, whoever asks for it: `test_pipeline` puts whole stages through it."""

from __future__ import annotations

from fastserve.plan.moves import Refuse, RunStage, Wait
from fastserve.plan.observed import Attempt, AttemptState, Observed
from fastserve.plan.stages import Stage, StageRequest
from fastserve.plan.tries import BACKOFF_SECONDS, MAX_ATTEMPTS, next_try

KEY = "a" * 64


def move(attempt=None, now=100.0, **seen):
    def run(number, because):
        return RunStage(because=because, request=StageRequest("chat", Stage.SOURCE, KEY, number, {}))

    observed = Observed(attempts={} if attempt is None else {KEY: attempt}, **seen)
    (found,) = next_try("Adapter de", observed, KEY, run, now, ("chat", "source"))
    return found


def test_the_first_try_is_number_one():
    assert isinstance(move(), RunStage)
    assert move().request.attempt == 1
    assert move().because.startswith("Adapter de has no artifact yet")


def test_a_failure_waits_longer_each_time_and_ends():
    for number, seconds in enumerate(BACKOFF_SECONDS, start=1):
        failed = Attempt(number, AttemptState.FAILED, "StageFailed", "broken", ended_at=100.0)
        if seconds:
            assert isinstance(move(failed, 100.0 + seconds / 2), Wait)
        assert move(failed, 100.0 + seconds).request.attempt == number + 1
    last = Attempt(MAX_ATTEMPTS, AttemptState.FAILED, "StageFailed", "broken", ended_at=0.0)
    assert isinstance(move(last), Refuse)
    assert move(last, forgiven={KEY: MAX_ATTEMPTS}).request.attempt == MAX_ATTEMPTS + 1


def test_what_is_refused_is_not_tried_again():
    found = move(Attempt(1, AttemptState.FAILED, "SourceInvalid", "modules_to_save", final=True))
    assert (found.reason, found.stage) == ("SourceInvalid", "source")
    assert "modules_to_save" in found.because
