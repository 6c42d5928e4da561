"""Blocks are gathered just before they compute and given back right after, forward and backward.

The next block's gather is under way while this one computes. Every rank issues the same collectives in the same order:
the order follows from the blocks alone, never from a micro-batch, so a rank with more, fewer or no samples keeps step.

    forward    gather 0 | gather 1, compute 0 | gather 2, compute 1 | ... | compute n     (n stays for what comes next)
    backward   gather n-1, compute n | sum n, gather n-2, compute n-1 | ... | sum 0 | sum of the rest
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from fastserve.errors import StageFailed
from fastserve.stages.train.neighbours import padded
from fastserve.stages.train.parts import Layout, Part, Place, Unit
from fastserve.stages.train.slices import Slices
from fastserve.stages.train.wire import Gather, Reduction, SharedSum, Wire

BLOCK_SLOTS = 2
"""Blocks whose gradients are shared at a time: one is summed while the next arises."""


def slot_sizes(root: Sequence[Part], blocks: Sequence[Part]) -> tuple[int, int]:
    """Bytes of the shared buffers of a rank: for the root's trained parts, and for one block's."""
    whole = sum(padded(part.numel * part.dtype.itemsize) for part in root)
    return whole, max((padded(part.numel * part.dtype.itemsize) for part in blocks), default=0)


class _Flow:
    """A part on its way: gathered or not, its gradient so far."""

    def __init__(self, part: Part, gradient: torch.Tensor | None) -> None:
        self.part, self.gradient = part, gradient
        self.there = False
        self.asked: Gather | None = None
        self.slot: int | None = None
        """Where `sums` lie among this rank's shared buffers, in bytes; None in memory of its own."""
        self.new_sums: Callable[[_Flow], torch.Tensor]
        self.sums: torch.Tensor | None = None
        """This micro-batch's gradient on this rank, in the part's precision, shape [numel]."""

        self.seen: set[str] = set()
        """Parameters whose gradient has arrived in `sums`."""

    def take(self, place: Place, parameter: torch.Tensor) -> None:
        """Move a parameter's gradient into `sums`; called by autograd as soon as it is whole."""
        if parameter.grad is None:
            return
        if self.sums is None:
            self.sums = self.new_sums(self)
        self.part.view(self.sums, place).copy_(parameter.grad)
        parameter.grad = None
        self.seen.add(place.name)

    def all_sums(self) -> torch.Tensor:
        """The gradient with zeros where no token came by; hands it over."""
        sums, seen = self.sums, self.seen
        self.sums, self.seen = None, set()
        if sums is None:
            return self.new_sums(self).zero_()
        for place in self.part.places:
            if place.name not in seen:
                sums[place.begin : place.end].zero_()
        return sums


class Stream:
    """Moves the parts of a layout in and out as the model computes."""

    def __init__(self, layout: Layout, wire: Wire, slices: Slices, reshard: bool) -> None:
        """reshard: False keeps gathered blocks until `drop`, which saves the second gather and costs their memory."""
        self._wire, self._reshard = wire, reshard
        self._root = self._flows(layout.root, slices)
        blocks = [unit for unit in layout.blocks if unit.parts]
        self._blocks = [self._flows(unit, slices) for unit in blocks]
        self._names = [type(unit.module).__name__ for unit in blocks]
        self._next = 0
        self._lowest = len(blocks)
        """The lowest block whose backward has begun."""

        self._turns: list[bool | None] = [None] * len(blocks)
        """Which blocks take part in backward; None until a forward has shown it."""

        self._summing: tuple[Reduction | SharedSum, torch.Tensor] | None = None
        self._lay_slots()
        if self._root or blocks:
            layout.root.module.register_forward_pre_hook(self._begin)
        for number, unit in enumerate(blocks):
            unit.module.register_forward_pre_hook(partial(self._enter, number))
            unit.module.register_forward_hook(partial(self._leave, number))

    def _flows(self, unit: Unit, slices: Slices) -> list[_Flow]:
        flows = []
        for part in unit.parts:
            trained = any(place.parameter.requires_grad for place in part.places)
            flow = _Flow(part, slices.gradient_of(part) if trained else None)
            flow.new_sums = self._new_sums
            for place in part.places if trained else ():
                place.parameter.register_post_accumulate_grad_hook(partial(flow.take, place))
            flows.append(flow)
        return flows

    def _lay_slots(self) -> None:
        """Shared buffers: one for the root's gradient, two in turn for the blocks'."""
        sizes = slot_sizes(
            [flow.part for flow in self._root if flow.gradient is not None],
            [flow.part for flows in self._blocks for flow in flows if flow.gradient is not None],
        )
        begin = 0
        for flow in self._root:
            if flow.gradient is not None and flow.part.common is not None:
                flow.slot = begin
                begin += padded(flow.part.numel * flow.part.dtype.itemsize)
        ours = [flow for flows in self._blocks for flow in flows if flow.gradient is not None]
        for number, flow in enumerate(ours):
            if flow.part.common is not None:
                flow.slot = begin + (number % BLOCK_SLOTS) * sizes[1]

    def _new_sums(self, flow: _Flow) -> torch.Tensor:
        neighbours = self._wire.neighbours
        if flow.slot is None or neighbours is None:
            return flow.part.whole.new_empty(flow.part.numel)
        if neighbours.is_in_use(flow.slot):
            self._end_sum()  # ours, or all would wait for each other
        with self._wire.standing_still():
            return neighbours.own_buffer(flow.slot, flow.part.numel, flow.part.dtype)

    @property
    def order_is_known(self) -> bool:
        """Whether a forward with gradients has shown which blocks take part in backward."""
        return None not in self._turns

    def _ask(self, flows: Sequence[_Flow]) -> None:
        for flow in flows:
            if not flow.there and flow.asked is None:
                flow.part.give_memory()
                part = flow.part
                if part.common is not None:
                    flow.asked = self._wire.arrived(part.numel)
                else:
                    flow.asked = self._wire.gather(part.whole, part.bounds, part.mine)

    def _fetch(self, flows: Sequence[_Flow]) -> None:
        self._ask(flows)
        for flow in flows:
            if flow.asked is not None:
                flow.asked.wait()
                flow.asked, flow.there = None, True

    def _give_back(self, flows: Sequence[_Flow]) -> None:
        for flow in flows:
            if flow.asked is not None:
                flow.asked.wait()
            if flow.there or flow.asked is not None:
                flow.part.take_memory()
            flow.asked, flow.there = None, False

    def _begin(self, *_: Any) -> None:
        self._next = 0
        self._fetch(self._root)

    def _enter(self, number: int, *_: Any) -> None:
        if number != self._next:
            raise StageFailed(
                f"the model calls its block {number} ({self._names[number]}) out of turn, so workers could wait for "
                "each other for ever; train it with one worker, or with method: lora"
            )
        self._next = number + 1
        self._fetch(self._blocks[number])
        if number + 1 < len(self._blocks):
            self._ask(self._blocks[number + 1])

    def _leave(self, number: int, _: Any, __: Any, output: Any) -> None:
        turns = False
        if torch.is_grad_enabled():
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(partial(self._turn, number))
                    turns = True
            self._turns[number] = turns
        self._left(number, turns)

    def _left(self, number: int, turns: bool) -> None:
        # The last block computes again at once, backward.
        if self._reshard and not (turns and number == len(self._blocks) - 1):
            self._give_back(self._blocks[number])

    def _turn(self, number: int, *_: Any) -> None:
        """The backward of block `number` begins; that of those above it is over, as autograd goes by creation."""
        if number >= self._lowest:
            return  # a second output of the block
        self._sum_down_to(number + 1)
        self._lowest = number
        self._fetch(self._blocks[number])
        following = next((below for below in range(number - 1, -1, -1) if self._turns[below]), None)
        if following is not None:
            self._ask(self._blocks[following])

    def _sum_down_to(self, lowest: int) -> None:
        for number in range(min(self._lowest, len(self._blocks) - 1), lowest - 1, -1):
            self._sum(self._blocks[number])
            if self._reshard:
                self._give_back(self._blocks[number])

    def _sum(self, flows: Sequence[_Flow]) -> None:
        for flow in flows:
            if flow.gradient is not None:
                reduction = self._wire.reduce(flow.all_sums(), flow.part.bounds, flow.slot)
                self._end_sum()  # one at a time under way, else every unit's gradient would be in memory
                self._summing = (reduction, flow.gradient)

    def _end_sum(self) -> None:
        if self._summing is not None:
            reduction, gradient = self._summing
            reduction.add_to(gradient)
            self._summing = None

    def backward(self, run: Callable[[], None]) -> None:
        """Call `run`, which runs autograd, and add the sums over all ranks to the gradient slices."""
        self._lowest = len(self._blocks)
        run()
        self._sum_down_to(0)
        self._sum(self._root)
        self._end_sum()
        self._lowest = len(self._blocks)

    def idle(self, backward: bool) -> None:
        """The collectives of a micro-batch, without one; `order_is_known` must hold for the backward's."""
        self._begin()
        for number in range(len(self._blocks)):
            self._enter(number)
            self._left(number, backward and bool(self._turns[number]))
        if backward:
            self.backward(self._idle_backward)

    def _idle_backward(self) -> None:
        for number in range(len(self._blocks) - 1, -1, -1):
            if self._turns[number]:
                self._turn(number)

    def drop(self) -> None:
        """Give back all that is gathered: the masters have changed."""
        for flows in (self._root, *self._blocks):
            self._give_back(flows)


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from _tensors(item)
    elif isinstance(output, dict):
        yield from _tensors(tuple(output.values()))
