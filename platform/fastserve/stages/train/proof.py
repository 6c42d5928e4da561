"""Before the first step: the engine's gradient is the gradient, and all ranks issue the same collectives.

One small micro-batch goes through the engine, and once more through the model without any engine. Where the whole model
fits one worker, that worker computes all of it. Where it does not, some blocks are computed alone, on what the engine
handed into them. What may differ is the order in which numbers are added, and in halved precisions what that rounds.
"""

from __future__ import annotations

import copy
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from fastserve.errors import StageFailed
from fastserve.stages.train.corpus import Rectangle
from fastserve.stages.train.engine import Engine
from fastserve.stages.train.group import Group
from fastserve.stages.train.loop import loss_sum
from fastserve.stages.train.network import Network
from fastserve.stages.train.standin import StandIn, sums, without_dropout

TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 2e-2, "fp8": 2.5e-1}
"""Largest relative error by precision. Measured on unequal shares: 3e-7 in fp32. Halved precisions allow for kernels
that differ between the machines of a run."""

FP16_FACTOR = 1024.0
"""Scale of the proof's loss in fp16, whose small gradients would vanish."""

_LEAST_PART = 1e-3
"""A parameter whose gradient is a smaller part of the whole one is judged as if it were this part: where a gradient is
0 but for rounding, the rounding alone would be the error."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What was found."""

    gradient_error: float
    """Largest relative error of a parameter's gradient."""

    tolerance: float
    scope: Literal["model", "blocks"]
    collectives: int
    """Collectives of the micro-batch, the same on all ranks."""

    def to_json(self) -> dict[str, Any]:
        """As it stands in the status."""
        return {
            "gradientError": self.gradient_error,
            "tolerance": self.tolerance,
            "scope": self.scope,
            "collectives": self.collectives,
        }


class Reference(ABC):
    """What the engine is held against; made before the engine takes the model over."""

    def __init__(
        self, network: Network, rectangles: Sequence[Rectangle | None], group: Group, precision: str, dtype: torch.dtype
    ) -> None:
        """rectangles: what each rank will compute, by rank; None: nothing."""
        self.mine = rectangles[group.rank]
        self.precision, self.group, self.network = precision, group, network
        self.factor = FP16_FACTOR if precision == "fp16" else 1.0
        self.dtype = dtype

    scope: Literal["model", "blocks"]

    @abstractmethod
    def watch(self, model: nn.Module, stack: ExitStack) -> None:
        """Note what is needed of the engine's pass, while `stack` is open."""

    @abstractmethod
    def error(self, engine: Engine) -> float:
        """Largest relative error of a parameter's gradient, the same on all ranks. Collective."""


class WholeModel(Reference):
    """The whole model, computed by one rank alone."""

    scope = "model"

    def __init__(
        self,
        network: Network,
        rectangles: Sequence[Rectangle | None],
        group: Group,
        precision: str,
        dtype: torch.dtype,
        alone: Sequence[Rectangle | None],
        judge: int,
    ) -> None:
        """alone: the samples of all ranks, as they go through the model alone. judge: the rank that computes them."""
        super().__init__(network, rectangles, group, precision, dtype)
        self._judge = judge
        self._gradients: Mapping[str, torch.Tensor] = {}
        if group.rank == judge:
            with without_dropout(network.model):
                stand_in = StandIn(network, dtype, group.device)
                self._gradients = sums(stand_in, [one for one in alone if one is not None], self.factor)

    def watch(self, model: nn.Module, stack: ExitStack) -> None:
        """See Reference; the gradient is all that is needed."""

    def error(self, engine: Engine) -> float:
        """See Reference."""
        found = engine.gathered("gradients")
        squares: dict[str, tuple[float, float]] = {}
        if self.group.rank == self._judge:
            for name, gradient in found.items():
                expected = self._gradients.get(name)
                expected = torch.zeros_like(gradient) if expected is None else expected
                squares[name] = (_square(gradient - expected), _square(expected))
        return self.group.gather_numbers([relative_error(list(squares.values()))])[self._judge][0]


class SomeBlocks(Reference):
    """The first, the middle and the last block, each computed by every rank on its own samples and summed."""

    scope = "blocks"

    def __init__(
        self,
        network: Network,
        rectangles: Sequence[Rectangle | None],
        group: Group,
        precision: str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(network, rectangles, group, precision, dtype)
        names = network.blocks
        chosen = sorted({0, len(names) // 2, len(names) - 1}) if names else []
        self._blocks: dict[str, nn.Module] = {}
        self._trained: dict[str, list[tuple[str, nn.Parameter]]] = {}
        known = {id(parameter): name for name, parameter in network.trained.items()}
        for number in chosen:
            block = network.model.get_submodule(names[number])
            own = [
                (name, known[id(parameter)]) for name, parameter in block.named_parameters() if id(parameter) in known
            ]
            alone = copy.deepcopy(block).to(group.device)
            parameters = dict(alone.named_parameters())
            for name, _ in own:
                parameters[name].data = parameters[name].data.to(dtype)
            self._blocks[names[number]] = alone.eval()
            self._trained[names[number]] = [(full, parameters[name]) for name, full in own]
        self._entered: dict[str, tuple[Any, Any]] = {}
        self._came_back: dict[str, torch.Tensor] = {}

    def watch(self, model: nn.Module, stack: ExitStack) -> None:
        """See Reference."""
        for name in self._blocks:
            block = model.get_submodule(name)
            handles = (
                block.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True, prepend=True),
                block.register_forward_hook(partial(self._leave, name)),
            )
            for handle in handles:
                stack.callback(handle.remove)

    def _enter(self, name: str, _: nn.Module, inputs: Any, keywords: Any) -> None:
        self._entered[name] = (_detached(inputs), _detached(keywords))

    def _leave(self, name: str, _: nn.Module, __: Any, output: Any) -> None:
        def note(gradient: torch.Tensor) -> None:
            self._came_back[name] = gradient.detach().clone()

        tensor = _first(output)
        if tensor.requires_grad:
            tensor.register_hook(note)

    def error(self, engine: Engine) -> float:
        """See Reference."""
        slices = engine.gradients()
        squares: list[tuple[float, float]] = []
        for name, block in self._blocks.items():
            if name in self._came_back:
                inputs, keywords = self._entered[name]
                _first(block(*inputs, **keywords)).backward(self._came_back[name])
            for full, parameter in self._trained[name]:
                whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=self.group.device)
                if parameter.grad is not None:
                    whole += parameter.grad.reshape(-1).float()
                self.group.add_up(whole)
                chunk = slices.get(full)
                off = 0.0
                if chunk is not None:
                    mine = chunk.plain()
                    off = _square(mine - whole[chunk.offset : chunk.offset + mine.numel()])
                squares.append((off, _square(whole)))
        told = self.group.gather_numbers([off for off, _ in squares])
        return relative_error([(sum(row[at] for row in told), whole) for at, (_, whole) in enumerate(squares)])


def prove(reference: Reference, engine: Engine) -> Proof | None:
    """Run the micro-batch through `engine` and compare. Parameters and optimizer stay as they are. Collective.

    None when the model's own gradient is not a finite number: nothing can be held against it, and the first step says
    so by name. Raises StageFailed, on every rank, when the error is above the tolerance or the ranks' collectives
    differ.
    """
    engine.clear()
    with without_dropout(engine.model), ExitStack() as stack:
        reference.watch(engine.model, stack)
        if reference.mine is None:
            engine.idle()
        else:
            engine.backward(loss_sum(engine.model, reference.mine) * reference.factor)
        engine.finite()  # brings the last sums to their slices
    log = engine.collectives
    digest = int(hashlib.sha256(repr(log).encode()).hexdigest()[:12], 16)
    told = reference.group.gather_numbers([digest, len(log)])
    error = reference.error(engine)
    engine.clear()
    differing = [rank for rank, row in enumerate(told) if row != told[0]]
    if differing:
        raise StageFailed(
            f"rank {differing[0]} issues other collectives than rank 0 ({told[differing[0]][1]:.0f} and "
            f"{told[0][1]:.0f} in one micro-batch), so the run would hang or be wrong; report this model, and train it "
            "with one worker or method: lora"
        )
    if math.isnan(error):
        return None
    tolerance = TOLERANCE[reference.precision]
    if error > tolerance:
        raise StageFailed(
            f"the sharded gradient differs from the unsharded one by {error:.1e}, above {tolerance:.0e} in "
            f"{reference.precision}, so the run was stopped before its first step; report this model, and train it "
            "with one worker or another spec.train.engine"
        )
    return Proof(error, tolerance, reference.scope, int(told[0][1]))


def relative_error(squares: Sequence[tuple[float, float]]) -> float:
    """Largest error of a parameter, relative to its gradient; nan when the right gradient is not finite.

    squares: for each parameter the squared norms of the difference and of the right gradient.
    """
    whole = sum(expected for _, expected in squares)
    if not math.isfinite(whole):
        return math.nan
    if not all(math.isfinite(off) for off, _ in squares):
        return math.inf
    if not whole:
        return math.inf if any(off for off, _ in squares) else 0.0
    least = whole * _LEAST_PART**2
    return max(math.sqrt(off / max(expected, least)) for off, expected in squares)


def _square(tensor: torch.Tensor) -> float:
    norm: float = torch.linalg.vector_norm(tensor.float()).item()
    return norm * norm


def _first(output: Any) -> torch.Tensor:
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, tuple | list):
        return type(value)(_detached(item) for item in value)
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    return value
