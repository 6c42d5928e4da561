"""What is trained, gathered once a step and summed once a step: for one worker, and for adapters."""

from __future__ import annotations

from functools import partial

import torch

from fastserve.stages.train.parts import Part, Place
from fastserve.stages.train.slices import Slices
from fastserve.stages.train.wire import Wire


class Together:
    """One part that stays gathered; its gradient is added up in fp32 on each rank and exchanged at a step's end."""

    def __init__(self, part: Part, slices: Slices, wire: Wire) -> None:
        """Where nothing is sent or rounded, the model computes on the masters, and autograd adds to the slices."""
        self._part, self._wire = part, wire
        self._slice = slices.gradient_of(part)
        self._slices = slices
        alone = wire.group.size == 1
        self._shares_masters = alone and part.dtype == torch.float32
        whole = part.mine if self._shares_masters else torch.empty(part.numel, dtype=part.dtype, device=wire.device)
        self._sums = self._slice if alone else torch.zeros(part.numel, dtype=torch.float32, device=wire.device)
        self._expecting = False
        part.bind(whole)
        for place in part.places:
            if part.dtype == torch.float32:
                place.parameter.grad = part.view(self._sums, place)
            else:
                place.parameter.register_post_accumulate_grad_hook(partial(self._add, place))
        self.publish()

    def _add(self, place: Place, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self._part.view(self._sums, place).add_(parameter.grad)
            parameter.grad = None

    @property
    def kept_bytes(self) -> int:
        """Beside the slices: the copy to compute with, and the gradient of all numbers."""
        own = 0 if self._shares_masters else self._part.numel * self._part.whole.itemsize
        return own + (0 if self._sums is self._slice else self._part.numel * 4)

    def clear(self) -> None:
        """Gradients to zero."""
        self._expecting = False
        if self._sums is not self._slice:
            self._sums.zero_()

    def expect(self) -> None:
        """A micro-batch adds to the gradient, on this rank or another."""
        self._expecting = True

    def settle(self) -> None:
        """Bring the gradients of all ranks to their slices, if there are new ones."""
        if self._expecting and self._sums is not self._slice:
            self._wire.reduce(self._sums, self._part.bounds).add_to(self._slice)
            self._sums.zero_()
            self._slices.changed()
        self._expecting = False

    def publish(self) -> None:
        """Give the model what the masters hold, on all ranks."""
        if self._wire.group.size > 1:
            self._wire.gather(self._part.whole, self._part.bounds, self._part.mine).wait()
        elif not self._shares_masters:
            self._part.whole.copy_(self._part.mine)
