"""Training state cut over unequal workers: any share each, none included, and gradients that equal one process's.

This is ZeRO's third stage (Rajbhandari et al., 2020, arXiv 1910.02054) with cuts where the plan says, not in equal
chunks as FSDP makes them (Zhao et al., 2023, arXiv 2304.11277): parameters, gradients and AdamW's moments lie where
there is memory for them (as Poplar and Cephalo do: arXiv 2408.12596, 2411.01075), while the batch is shared by speed.

Two ways to move what is cut:

- **streamed**: a block is gathered when it computes and its gradient summed when it is done (`stream.Stream`). Where
  all ranks live on one machine and compute in fp32, gathering is looking (`neighbours`).
- **together**: all that is trained is gathered once a step and its gradient summed once a step, however many
  micro-batches there are. For one worker, where nothing is sent and nothing copied; and for adapters, of which a step
  would else spend more time on dozens of small collectives than on computing. It costs the computing copy and an fp32
  gradient of what is trained, on every worker; above `TOGETHER_BYTES` trained parameters are therefore streamed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastserve.stages.train.chunk import Chunk
from fastserve.stages.train.group import Group
from fastserve.stages.train.neighbours import Neighbours, meet, numbers_bytes, padded
from fastserve.stages.train.network import DTYPES, Network
from fastserve.stages.train.parts import Layout, lay_out
from fastserve.stages.train.slices import BYTES_PER_NUMBER, Slices
from fastserve.stages.train.stream import BLOCK_SLOTS, Stream, slot_sizes
from fastserve.stages.train.together import Together
from fastserve.stages.train.wire import Wire

PRECISIONS = DTYPES
"""What is gathered, computed with and sent."""

TOGETHER_BYTES = 256 * 2**20
"""Most bytes, in fp32, of trained parameters beside frozen ones that are gathered and summed together."""


class Sharded:
    """Parameters, gradients and AdamW's moments of a model, cut over the ranks by `shares`.

    A step is, on every rank alike: `clear`; then for each micro-batch the model, a loss that is a sum, and `backward`,
    or `idle` where there is no sample; then `scale` by one over the trained tokens of all ranks, and `step`.
    """

    def __init__(
        self,
        network: Network,
        shares: Sequence[float],
        group: Group,
        *,
        precision: str = "fp32",
        weight_decay: float = 0.0,
        frozen_whole: bool = True,
        activation_checkpointing: bool = False,
        reshard: bool = True,
        neighbours: bool = True,
    ) -> None:
        """network: the same on every rank; its parameters now belong to this object.

        shares: part of the state that each rank keeps, shape [ranks]; only their proportions count, zero is allowed.
        precision: one of `PRECISIONS`. frozen_whole: whether every rank keeps all frozen parameters, or slices of them
        too. activation_checkpointing: keep only what enters a block, and compute the rest again in backward.
        reshard: whether blocks are given back between forward and backward. neighbours: whether ranks that all live on
        one machine may share memory instead of sending, in fp32.

        Raises ValueError when the shares do not fit the group.
        """
        if len(shares) != group.size:
            raise ValueError(f"{group.size} ranks need as many shares, not {len(shares)}")
        self.model: nn.Module = network.model
        self._group = group
        self._wire = Wire(group)
        device = self._wire.device
        few = 4 * sum(parameter.numel() for parameter in network.trained.values()) <= TOGETHER_BYTES
        adapters = any(not parameter.requires_grad for parameter in self.model.parameters())
        together = group.size == 1 or (adapters and few)
        dtype = PRECISIONS[precision]
        layout = lay_out(
            network, shares, group.rank, dtype, together=together, frozen_whole=frozen_whole or group.size == 1
        )
        self._parts = layout.trained
        # In fp32 the model computes with the masters themselves; in bf16 a copy for all would be more memory.
        if neighbours and not together and dtype == torch.float32:
            self._wire.neighbours = _share(layout, group)
        self._slices = Slices(layout.trained, weight_decay, device)
        self._together = Together(layout.trained[0], self._slices, self._wire) if together else None
        for part in [] if together else layout.trained:
            part.bind_without_memory(device)
        self._frozen_bytes = _place_frozen(layout, device)
        self._stream = Stream(layout, self._wire, self._slices, reshard)
        self._wire.publish()
        if activation_checkpointing:
            for name in network.blocks:
                block = self.model.get_submodule(name)
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    @property
    def kept_bytes(self) -> int:
        """Bytes that this rank keeps between steps: state of its slices, frozen parameters, what stays gathered.

        Gradients in flight are not among them: they belong to a step's peak, also where neighbours keep their memory.
        """
        own = sum(part.own_numel for part in self._parts)
        return own * BYTES_PER_NUMBER + self._frozen_bytes + (self._together.kept_bytes if self._together else 0)

    @property
    def collective_seconds(self) -> float:
        """Wall seconds since `clear` in which this rank stood still for a collective."""
        return self._wire.seconds

    @property
    def collectives(self) -> list[tuple[str, int]]:
        """Kind and numbers of each collective since `clear`, in order; the same list on every rank."""
        return list(self._wire.log)

    def clear(self) -> None:
        """Gradients, timers and the log of collectives to zero."""
        self._slices.clear()
        if self._together:
            self._together.clear()
        self._wire.clear()

    def backward(self, loss: torch.Tensor) -> None:
        """Add this micro-batch's gradient, summed over all ranks, to the slices. Collective.

        loss: a sum of token losses, never a mean; a scalar.
        """
        if self._together:
            self._together.expect()
        self._stream.backward(loss.backward)
        self._slices.changed()

    def idle(self, backward: bool = True) -> None:
        """Take part in a micro-batch without samples: the same collectives, adding exactly nothing.

        backward: False for one that is only evaluated, without gradients.
        """
        if self._together and backward:
            self._together.expect()
        if backward and not self._stream.order_is_known:
            device = self._wire.device
            token = torch.zeros((1, 1), dtype=torch.int64, device=device)
            self.backward(self.model(input_ids=token, use_cache=False).logits.float().sum() * 0.0)
        else:
            self._stream.idle(backward)

    def scale(self, factor: float) -> None:
        """Multiply the gradients, as by one over the batch's trained tokens, or over the scale of the loss."""
        self._settle()
        self._slices.scale(factor)

    def finite(self) -> bool:
        """Whether this rank's gradient slices are all finite numbers. Call it on every rank."""
        self._settle()
        return self._slices.finite()

    def norm(self) -> float:
        """Euclidean norm of the whole gradient, the same on every rank. Collective."""
        self._settle()
        return float(self._wire.add_up(self._slices.sum_of_squares()) ** 0.5)

    def step(self, learning_rate: float, clip_norm: float | None, norm: float | None = None) -> float:
        """One step of AdamW; returns the gradient's norm before clipping. Collective.

        clip_norm: largest norm that is let through, as torch's clip_grad_norm_ does it; None for no limit.
        norm: what `norm()` said, to save asking again.
        """
        norm = self.norm() if norm is None else norm
        self._settle()
        factor = 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + 1e-6))
        self._slices.step(learning_rate, factor)
        self._renew()
        return norm

    def state(self) -> dict[str, Chunk]:
        """This rank's slices as views: `parameters.<name>`, `exp_avg.<name>`, `exp_avg_sq.<name>`.

        Load into them in place, then call `resume`. A parameter of which this rank keeps nothing is absent.
        """
        return self._slices.state()

    def resume(self, steps_done: int) -> None:
        """Go on from what was loaded into `state()`. Collective."""
        self._slices.resume(steps_done)
        self._renew()

    def gathered(self, kind: Literal["parameters", "gradients"]) -> dict[str, torch.Tensor]:
        """All trained parameters (masters) or their gradients by name, whole, fp32, on every rank. Collective."""
        self._settle()
        self._slices.apply_scale()
        found: dict[str, torch.Tensor] = {}
        for part in self._parts:
            mine = part.mine if kind == "parameters" else self._slices.gradient_of(part)
            whole = torch.empty(part.numel, dtype=torch.float32, device=self._wire.device)
            if self._group.size == 1:
                whole.copy_(mine)
            else:
                self._wire.gather(whole, part.bounds, mine).wait()
            found.update({place.name: part.view(whole, place) for place in part.places})
        return found

    def gradients(self) -> dict[str, Chunk]:
        """This rank's gradient slices as views, by parameter name."""
        self._settle()
        return self._slices.gradient_views()

    def _settle(self) -> None:
        if self._together:
            self._together.settle()

    def _renew(self) -> None:
        self._stream.drop()
        self._wire.publish()
        if self._together:
            self._together.publish()


def _share(layout: Layout, group: Group) -> Neighbours | None:
    """Memory that the ranks share, if they all live on this machine, given to all parts that are cut."""
    parts = [*layout.trained, *layout.frozen]
    trained = {id(part) for part in layout.trained}
    root, block = slot_sizes(
        [part for part in layout.root.parts if id(part) in trained],
        [part for unit in layout.blocks for part in unit.parts if id(part) in trained],
    )
    whole = sum(padded(part.numel * part.dtype.itemsize) for part in parts)
    neighbours = meet(group, whole + numbers_bytes(group.size), root + BLOCK_SLOTS * block)
    if neighbours is not None:
        for part in parts:
            part.common = neighbours.whole(part.numel, part.dtype)
    return neighbours


def _place_frozen(layout: Layout, device: torch.device) -> int:
    """Cut the frozen parts, move the rest to the device; returns the bytes of both that this rank keeps."""
    for part in layout.frozen:
        mine = part.memory_for_mine(part.dtype, device)
        part.cut_out(mine)
        part.mine = mine
        part.bind_without_memory(device)
    for parameter in layout.whole:
        if parameter.device != device:
            parameter.data = parameter.data.to(device)
    for module in layout.root.module.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.device != device:
                module._buffers[name] = buffer.to(device)
    kept: list[Any] = [*(part.mine for part in layout.frozen), *layout.whole]
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)
