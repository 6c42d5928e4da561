"""The model without its engine: for a first look at speed, and as what the engine's gradient is held against.

Both need the weights as the model computes with them (cast, on the device) while the model itself stays as it is, since
the engine takes the exact values from it afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from fastserve.stages.train.corpus import Rectangle
from fastserve.stages.train.loop import loss_sum
from fastserve.stages.train.network import Network


class StandIn:
    """A model's loss on weights of its own."""

    def __init__(self, network: Network, dtype: torch.dtype, device: torch.device) -> None:
        """dtype: what trained weights are computed with. Weights that already lie so are shared, not copied."""
        self._model = _Loss(network.model)
        names = {id(parameter): name for name, parameter in network.trained.items()}
        self.trained: dict[str, torch.Tensor] = {}
        """The trained weights by name, as leaves whose `grad` the caller takes."""

        self._tensors: dict[str, torch.Tensor] = {}
        for name, tensor in [*network.model.named_parameters(), *network.model.named_buffers()]:
            if id(tensor) in names:
                leaf = tensor.detach().to(device, dtype).requires_grad_()
                self.trained[names[id(tensor)]] = self._tensors[f"model.{name}"] = leaf
            elif type(tensor) in (nn.Parameter, torch.Tensor):
                self._tensors[f"model.{name}"] = tensor.detach().to(device)

    def loss(self, rectangle: Rectangle) -> torch.Tensor:
        """Sum of the trained tokens' losses, in nats; a scalar."""
        loss: torch.Tensor = functional_call(self._model, self._tensors, (rectangle,))
        return loss


class _Loss(nn.Module):  # type: ignore[misc]
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, rectangle: Rectangle) -> torch.Tensor:
        return loss_sum(self.model, rectangle)


@contextmanager
def shortened(network: Network, blocks: int) -> Iterator[None]:
    """The model with only its first `blocks` blocks, for the body."""
    parent = network.blocks[0].rpartition(".")[0] if network.blocks else ""
    if not parent:
        yield
        return
    modules: dict[str, Any] = network.model.get_submodule(parent)._modules
    whole = dict(modules)
    try:
        for name in list(modules)[blocks:]:
            del modules[name]
        yield
    finally:
        modules.clear()
        modules.update(whole)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, for the body."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def sums(stand_in: StandIn, rectangles: list[Rectangle], factor: float = 1.0) -> Mapping[str, torch.Tensor]:
    """Gradients of the summed losses of `rectangles` times `factor`, added up in fp32, by name."""
    total: dict[str, torch.Tensor] = {}
    for rectangle in rectangles:
        (stand_in.loss(rectangle) * factor).backward()
        for name, leaf in stand_in.trained.items():
            if leaf.grad is not None:
                gradient = leaf.grad.float()
                total[name] = total[name].add_(gradient) if name in total else gradient
                leaf.grad = None
    return total
