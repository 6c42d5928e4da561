"""What a run asks of an engine, whichever holds the state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

import torch
from torch import nn

from fastserve.errors import NotExecutable, Problem
from fastserve.plan.shares import SharePlan
from fastserve.spec.train import Train
from fastserve.stages.train.chunk import Chunk
from fastserve.stages.train.group import Group
from fastserve.stages.train.network import Network


class Engine(Protocol):
    """`shard.Sharded`, or `fsdp2.Fsdp2`."""

    model: nn.Module

    @property
    def kept_bytes(self) -> int:
        """Bytes that this rank keeps between steps."""

    @property
    def collective_seconds(self) -> float:
        """Seconds since `clear` in which this rank stood still for a collective."""

    @property
    def collectives(self) -> list[tuple[str, int]]:
        """Kind and numbers of each collective since `clear`."""

    def clear(self) -> None:
        """Gradients, timers and the log of collectives to zero."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's gradient, summed over all ranks."""

    def idle(self, backward: bool = True) -> None:
        """Take part in a micro-batch without samples."""

    def scale(self, factor: float) -> None:
        """Multiply the gradients."""

    def finite(self) -> bool:
        """Whether this rank's gradient slices are finite."""

    def norm(self) -> float:
        """Norm of the whole gradient."""

    def step(self, learning_rate: float, clip_norm: float | None, norm: float | None = None) -> float:
        """One step of AdamW."""

    def state(self) -> dict[str, Chunk]:
        """This rank's slices as views."""

    def gradients(self) -> dict[str, Chunk]:
        """This rank's gradient slices as views, by parameter."""

    def resume(self, steps_done: int) -> None:
        """Go on from what was loaded into `state`."""

    def gathered(self, kind: Literal["parameters", "gradients"]) -> Mapping[str, torch.Tensor]:
        """Whole tensors by name."""


def make_engine(network: Network, train: Train, plan: SharePlan, group: Group) -> Engine:
    """The engine that `train.engine` names, with the state shares of `plan`. It takes the model over.

    Raises NotExecutable for fsdp2 with one worker.
    """
    if train.engine == "fsdp2":
        if group.size == 1:
            message = "fsdp2 shares a model over several workers, and there is one; write engine: sharded"
            raise NotExecutable([Problem("spec.train.engine", message)])
        from fastserve.stages.train.fsdp2 import Fsdp2

        return Fsdp2(
            network,
            plan.state,
            group,
            precision=train.precision,
            weight_decay=train.weight_decay,
            activation_checkpointing=train.activation_checkpointing,
        )
    from fastserve.stages.train.shard import Sharded

    return Sharded(
        network,
        plan.state,
        group,
        precision=train.precision,
        weight_decay=train.weight_decay,
        frozen_whole=plan.frozen_whole,
        activation_checkpointing=train.activation_checkpointing,
    )
