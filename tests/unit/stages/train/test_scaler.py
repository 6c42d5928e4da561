"""The scale of the loss in fp16."""

from __future__ import annotations

import pytest

from fastserve.stages.train.scaler import FIRST, GROWS_AFTER, LEAST, LossScale


def test_it_is_halved_on_overflow_and_doubled_after_many_good_steps() -> None:
    scale = LossScale("fp16")
    assert scale.factor == FIRST == 65536
    assert scale.overflowed()
    assert scale.factor == FIRST / 2
    for _ in range(GROWS_AFTER - 1):
        scale.stepped()
    assert scale.factor == FIRST / 2
    assert scale.overflowed()  # the count begins anew
    for _ in range(GROWS_AFTER):
        scale.stepped()
    assert scale.factor == FIRST / 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_have_none(precision: str) -> None:
    scale = LossScale(precision)
    assert scale.factor == 1.0
    assert not scale.overflowed()
    for _ in range(GROWS_AFTER):
        scale.stepped()
    assert scale.factor == 1.0


def test_it_ends_where_no_scale_helps() -> None:
    scale = LossScale("fp16", factor=LEAST * 2)
    assert scale.overflowed()
    assert not scale.overflowed()


def test_it_goes_on_as_a_checkpoint_left_it() -> None:
    scale = LossScale.of("fp16", 1024.0, {"goodSteps": GROWS_AFTER - 1})
    scale.stepped()
    assert scale.factor == 2048.0
