"""What the log of a training run says of its losses."""

from __future__ import annotations

from typing import Any

from fastserve.stages.train.news import SAY_SECONDS, Said
from fastserve.telemetry.progress import Progress


def news(step: int, **metrics: Any) -> Progress:
    return Progress(step, 100, "steps", metrics=metrics)


def test_the_first_the_last_and_one_every_few_seconds_are_said() -> None:
    clock = [50.0]
    said = Said(lambda: clock[0])
    assert said.of(news(0), False) is None  # nothing is known yet
    assert said.of(news(1, loss=4.125), False) == "step 1 of 100: loss 4.125"
    clock[0] += SAY_SECONDS - 1
    assert said.of(news(5, loss=4.0), False) is None
    clock[0] += 1
    assert said.of(news(6, loss=3.5), False) == "step 6 of 100: loss 3.5"
    clock[0] += SAY_SECONDS
    assert said.of(news(6, loss=3.5), False) is None  # no step since
    assert said.of(news(7, loss=3.25), True) == "step 7 of 100: loss 3.25"
    assert said.of(news(7, loss=3.25), True) is None


def test_each_validation_is_said_once() -> None:
    said = Said(lambda: 50.0)
    assert said.of(news(1, loss=4.0, validationLoss=5.0), False) == "step 1 of 100: loss 4, validation loss 5"
    assert said.of(news(2, loss=4.0, validationLoss=5.0), False) is None
    assert said.of(news(9, loss=3.0, validationLoss=4.5), False) == "step 9 of 100: loss 3, validation loss 4.5"
    assert said.of(news(10, loss=3.0, validationLoss=4.5), True) == "step 10 of 100: loss 3"
