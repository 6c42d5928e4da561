"""Parameters laid out one after the other, so that one collective gathers them and a cut anywhere is allowed.

The model keeps its own parameters, under their names and shapes; only the memory under them comes and goes. What
autograd has saved for the backward pass (a weight, or a transposed view of it) therefore finds the numbers again once
they are gathered again, and tied weights stay one parameter (the way of FSDP's flat parameters: Zhao et al., 2023,
arXiv 2304.11277).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from fastserve.stages.train.network import Network
from fastserve.stages.train.wire import cut


@dataclass(frozen=True, slots=True)
class Place:
    """Where a parameter lies in its part."""

    name: str
    parameter: nn.Parameter
    begin: int
    end: int
    shape: torch.Size


class Part:
    """Some parameters of a model, of which every rank keeps a slice."""

    def __init__(
        self, named: Mapping[str, nn.Parameter], shares: Sequence[float], rank: int, dtype: torch.dtype
    ) -> None:
        """named: parameters by name in the model. dtype: what the model computes with."""
        self.dtype = dtype
        self.places: list[Place] = []
        begin = 0
        # Matrices first, so that what decays is one run of numbers.
        for name, parameter in sorted(named.items(), key=lambda item: (item[1].ndim < 2, item[0])):
            end = begin + parameter.numel()
            self.places.append(Place(name, parameter, begin, end, parameter.shape))
            begin = end
        self.numel = begin
        self.decayed = sum(place.end - place.begin for place in self.places if place.parameter.ndim >= 2)
        """Numbers of the matrices."""
        self.bounds = cut(begin, shares)
        self.own = slice(self.bounds[rank], self.bounds[rank + 1])
        """This rank's slice of the part."""
        self.mine: torch.Tensor
        """This rank's numbers: fp32 masters of trained parameters, frozen ones as they are. Shape [own numbers]."""
        self.whole: torch.Tensor
        """All numbers in `dtype`, shape [numel]; without memory while they are not gathered."""
        self.common: torch.Tensor | None = None
        """Memory for the whole that this machine's ranks share, each keeping its slice in it: nothing is gathered."""

    @property
    def own_numel(self) -> int:
        """Numbers that this rank keeps."""
        return self.own.stop - self.own.start

    def cut_out(self, into: torch.Tensor) -> None:
        """Copy this rank's slice out of the parameters, as they are, to `into`, shape [own numbers]."""
        for place in self.places:
            begin, end = max(place.begin, self.own.start), min(place.end, self.own.stop)
            if begin < end:
                flat = place.parameter.detach().reshape(-1)
                into[begin - self.own.start : end - self.own.start].copy_(flat[begin - place.begin : end - place.begin])

    def bind(self, whole: torch.Tensor) -> None:
        """From now on the parameters are views of `whole`, shape [numel]; what they held is given back."""
        self.whole = whole
        for place in self.places:
            place.parameter.grad = None
            place.parameter.data = self.view(whole, place)

    def bind_without_memory(self, device: torch.device) -> None:
        """The parameters are views of a whole on `device` that is not gathered yet, or of the common one."""
        if self.common is not None:
            self.bind(self.common)
            return
        self.bind(torch.empty(self.numel, dtype=self.dtype, device=device))
        self.take_memory()

    def view(self, flat: torch.Tensor, place: Place) -> torch.Tensor:
        """The parameter's numbers in `flat`, shape [numel], in the parameter's shape."""
        return flat[place.begin : place.end].view(place.shape)

    def give_memory(self) -> None:
        """Memory for the whole, its numbers undefined. Views of it are valid again."""
        if self.common is not None:
            return
        self.whole.untyped_storage().resize_(self.numel * self.whole.itemsize)

    def take_memory(self) -> None:
        """Give the whole's memory back; its views stay, without numbers."""
        if self.common is not None:
            return
        self.whole.untyped_storage().resize_(0)

    def memory_for_mine(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Where this rank's numbers are to be kept: in the common whole, or in memory of its own."""
        if self.common is not None:
            return self.common[self.own]
        return torch.empty(self.own_numel, dtype=dtype, device=device)


@dataclass(frozen=True, slots=True)
class Unit:
    """What is gathered together: a block, or all that is in no block."""

    module: nn.Module
    parts: list[Part] = field(default_factory=list)
    """One of what is trained, one of what is frozen in each dtype; either may be missing."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Which parameter belongs to which part."""

    root: Unit
    """Embedding, norm, head, and what several blocks use together."""

    blocks: list[Unit]
    trained: list[Part]
    """All parts with something to train, in the order of their gathering."""

    frozen: list[Part]
    """All parts of frozen parameters that are cut."""

    whole: list[nn.Parameter]
    """Frozen parameters that every rank keeps."""


def lay_out(
    network: Network, shares: Sequence[float], rank: int, dtype: torch.dtype, *, together: bool, frozen_whole: bool
) -> Layout:
    """The parts of `network`, the same on every rank.

    together: everything trained is one part of the root, gathered and summed at once.
    frozen_whole: frozen parameters are not cut. Others than plain floating-point ones never are.
    """
    model = network.model
    modules = [model.get_submodule(name) for name in network.blocks]
    owners: dict[int, set[int]] = {}
    for number, module in enumerate(modules):
        for parameter in module.parameters():
            owners.setdefault(id(parameter), set()).add(number)
    names = {id(parameter): name for name, parameter in network.trained.items()}
    sorted_in: dict[tuple[int, bool, torch.dtype], dict[str, nn.Parameter]] = {}
    whole: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        trained = id(parameter) in names
        if not trained and (frozen_whole or not _can_be_cut(parameter)):
            whole.append(parameter)
            continue
        held_by = owners.get(id(parameter), set())
        unit = next(iter(held_by)) if len(held_by) == 1 and not (trained and together) else -1
        key = (unit, trained, dtype if trained else parameter.dtype)
        sorted_in.setdefault(key, {})[names.get(id(parameter), name)] = parameter
    units = [Unit(module) for module in modules]
    layout = Layout(Unit(model), units, [], [], whole)
    for (number, trained, kind), named in sorted(sorted_in.items(), key=lambda item: (item[0][:2], str(item[0][2]))):
        part = Part(named, shares, rank, kind)
        (layout.trained if trained else layout.frozen).append(part)
        if not (trained and together):
            (units[number] if number >= 0 else layout.root).parts.append(part)
    return layout


def _can_be_cut(parameter: nn.Parameter) -> bool:
    return type(parameter) is nn.Parameter and parameter.is_floating_point()
