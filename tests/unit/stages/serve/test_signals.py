"""What scaling and health see of the engine's steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fastserve.stages.serve.signals import WINDOW_SECONDS, Signals


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _scheduler(running: int = 1, waiting: int = 0, kv: float = 0.0) -> Any:
    return SimpleNamespace(
        num_running_reqs=running, num_waiting_reqs=waiting, num_skipped_waiting_reqs=1, kv_cache_usage=kv
    )


def _iteration(tokens: int = 0, first: tuple[float, ...] = ()) -> Any:
    return SimpleNamespace(num_generation_tokens=tokens, time_to_first_tokens_iter=list(first), finished_requests=[])


def _signals() -> tuple[Signals, Clock]:
    clock = Clock()
    return Signals(4, clock), clock


def test_the_last_state_and_the_pace_of_the_window() -> None:
    signals, clock = _signals()
    clock.now += 20
    signals.record(_scheduler(3, 5, 0.25), _iteration(30, (0.1, 0.3, 0.2)))
    clock.now += 1
    signals.record(None, _iteration(70))
    assert signals.values() == {
        "running": 3,
        "waiting": 6,
        "kv_use": 0.25,
        "ttft_ms": 200,
        "tokens_per_s": 10,
        "slots": 4,
    }
    assert all(isinstance(value, float) for value in signals.values().values())


def test_what_is_older_than_the_window_is_forgotten() -> None:
    signals, clock = _signals()
    signals.record(_scheduler(), _iteration(30, (0.1,)))
    clock.now += WINDOW_SECONDS + 1
    assert signals.values()["tokens_per_s"] == signals.values()["ttft_ms"] == 0


def test_tokens_and_a_cache_that_fills_are_progress_and_empty_steps_are_not() -> None:
    signals, clock = _signals()
    moves = []
    for scheduler, iteration in (
        (_scheduler(), _iteration(1)),
        (_scheduler(), _iteration()),
        (_scheduler(kv=0.1), _iteration()),
        (_scheduler(kv=0.1), _iteration()),
        (_scheduler(kv=0.2), None),
        (None, None),
    ):
        clock.now += 1
        signals.record(scheduler, iteration)
        moves.append(signals.moved_at == clock.now)
    assert moves == [True, False, True, False, True, False]
