"""Torch's own FSDP2 behind the engine's interface: the reference of the tests, and a choice for equal workers.

It cuts every parameter into equal chunks of rows, whatever a worker's memory or speed. Two settings make it sum where
it would average: the divide factor, and a flag without which torch builds a PREMUL_SUM that gloo refuses.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint

from fastserve.stages.train.chunk import Chunk
from fastserve.stages.train.group import Group
from fastserve.stages.train.network import Network
from fastserve.stages.train.shard import PRECISIONS
from fastserve.stages.train.slices import BYTES_PER_NUMBER


class Fsdp2:
    """As `shard.Sharded`, with equal shares."""

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
    ) -> None:
        """Arguments as `shard.Sharded` takes them.

        Raises ValueError when the shares are not equal, or for a group of one, which has nothing to cut.
        """
        if group.size < 2 or len(shares) != group.size or max(shares) - min(shares) > 1e-6 * max(shares):
            raise ValueError(f"FSDP2 cuts into equal shares for two workers or more, not into {list(shares)}")
        self.model: nn.Module = network.model
        self._group = group
        self._seconds, self._log = 0.0, list[tuple[str, int]]()
        frozen = {p for p in self.model.parameters() if not p.requires_grad}
        whole = frozen if frozen_whole else set()
        for parameter in self.model.parameters():
            if parameter not in whole:
                parameter.data = parameter.data.float()  # one precision in each of FSDP2's groups
        if activation_checkpointing:
            for name in network.blocks:
                block = self.model.get_submodule(name)
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        self._shard(network.blocks, PRECISIONS[precision], whole, reshard)
        self._trained: dict[str, Any] = {name: self.model.get_parameter(name) for name in network.trained}
        self._local = {name: nn.Parameter(_local(p)) for name, p in self._trained.items()}
        kept = [_local(p) for p in self.model.parameters() if not p.requires_grad]
        self._frozen_bytes: int = sum(tensor.numel() * tensor.element_size() for tensor in kept)
        self._optimizer = self._adamw(weight_decay)

    def _shard(self, blocks: Sequence[str], dtype: torch.dtype, whole: set[Any], reshard: bool) -> None:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        options: dict[str, Any] = {"mesh": init_device_mesh(self._group.device.type, (self._group.size,))}
        if dtype != torch.float32:
            options["mp_policy"] = policy
        if whole:
            options["ignored_params"] = whole
        for name in blocks:
            fully_shard(self.model.get_submodule(name), reshard_after_forward=reshard, **options)
        fully_shard(self.model, **options)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
                module.set_custom_all_gather(_Counted(self, "gather", dist.all_gather_single))
                module.set_custom_reduce_scatter(_Counted(self, "reduce", dist.reduce_scatter_single))

    def _adamw(self, weight_decay: float) -> torch.optim.AdamW | None:
        matrices = [p for name, p in self._local.items() if p.numel() and self._trained[name].ndim >= 2]
        vectors = [p for name, p in self._local.items() if p.numel() and self._trained[name].ndim < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        if not groups:
            return None
        optimizer = torch.optim.AdamW(groups, fused=True)
        for parameter in (*matrices, *vectors):
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
        return optimizer

    @property
    def kept_bytes(self) -> int:
        """Bytes of this rank's rows and of frozen parameters; FSDP2's own buffers come on top."""
        return int(sum(p.numel() for p in self._local.values())) * BYTES_PER_NUMBER + self._frozen_bytes

    @property
    def collective_seconds(self) -> float:
        """Wall seconds inside collectives since `clear`; on a GPU only what issuing them took."""
        return self._seconds

    @property
    def collectives(self) -> list[tuple[str, int]]:
        """Kind and numbers of each collective since `clear`."""
        return list(self._log)

    def inside(self, kind: str, numbers: int, seconds: float) -> None:
        """A collective has been run."""
        self._log.append((kind, numbers))
        self._seconds += seconds

    def clear(self) -> None:
        """Gradients, timers and the log to zero."""
        for parameter in self._trained.values():
            parameter.grad = None
        self._seconds, self._log = 0.0, []

    def backward(self, loss: torch.Tensor) -> None:
        """Add this micro-batch's gradient, summed over all ranks. Collective."""
        loss.backward()

    def idle(self, backward: bool = True) -> None:
        """Take part in a micro-batch without samples: one token, times zero. Collective."""
        token = torch.zeros((1, 1), dtype=torch.int64, device=self._group.device)
        with torch.set_grad_enabled(backward):
            loss = self.model(input_ids=token, use_cache=False).logits.float().sum() * 0.0
        if backward:
            self.backward(loss)

    def _gradients(self) -> list[torch.Tensor]:
        for name, parameter in self._trained.items():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self._local[name].grad = _local(parameter.grad)
        return [p.grad for p in self._local.values() if p.grad is not None and p.numel()]

    def scale(self, factor: float) -> None:
        """Multiply the gradients."""
        if gradients := self._gradients():
            torch._foreach_mul_(gradients, factor)

    def finite(self) -> bool:
        """Whether this rank's gradients are all finite numbers."""
        return all(bool(torch.isfinite(gradient).all()) for gradient in self._gradients())

    def norm(self) -> float:
        """Norm of the whole gradient. Collective."""
        squares = sum(float(torch.linalg.vector_norm(gradient)) ** 2 for gradient in self._gradients())
        told = torch.tensor([squares], dtype=torch.float64, device=self._group.device)
        began_at = time.perf_counter()
        dist.all_reduce(told)
        self.inside("sum", 1, time.perf_counter() - began_at)
        return float(told.sqrt())

    def step(self, learning_rate: float, clip_norm: float | None, norm: float | None = None) -> float:
        """One step of AdamW; returns the norm before clipping. Collective."""
        norm = self.norm() if norm is None else norm
        if clip_norm is not None and norm + 1e-6 > clip_norm:
            self.scale(clip_norm / (norm + 1e-6))
        self._gradients()
        if self._optimizer is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
        return norm

    def state(self) -> dict[str, Chunk]:
        """This rank's rows as views, under the names of `shard.Sharded.state`: each reads the other's checkpoints."""
        found: dict[str, Chunk] = {}
        for name, parameter in self._trained.items():
            local = self._local[name]
            if not local.numel() or self._optimizer is None:
                continue
            _, begins = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            offset = begins[0] * (parameter.numel() // parameter.shape[0])
            state = self._optimizer.state[local]
            tensors = {"parameters": local.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            for kind, tensor in tensors.items():
                found[f"{kind}.{name}"] = Chunk.make(tensor.view(-1), offset, parameter.numel())
        return found

    def gradients(self) -> dict[str, Chunk]:
        """This rank's rows of the gradients as views, by parameter name."""
        self._gradients()
        found: dict[str, Chunk] = {}
        for name, chunk in self.state().items():
            kind, _, parameter = name.partition(".")
            gradient = self._local[parameter].grad
            if kind == "parameters" and gradient is not None:
                found[parameter] = Chunk.make(gradient.view(-1), chunk.offset, chunk.total)
        return found

    def resume(self, steps_done: int) -> None:
        """Go on from what was loaded into `state()`."""
        for state in self._optimizer.state.values() if self._optimizer is not None else ():
            state["step"].fill_(steps_done)

    def gathered(self, kind: Literal["parameters", "gradients"]) -> dict[str, torch.Tensor]:
        """All trained parameters or their gradients by name, whole, on every rank. Collective."""
        self._gradients()
        tensors = {name: p if kind == "parameters" else p.grad for name, p in self._trained.items()}
        return {name: tensor.full_tensor().detach() for name, tensor in tensors.items()}


class _Counted:
    """A collective of FSDP2, counted and timed."""

    def __init__(self, engine: Fsdp2, kind: str, run: Any) -> None:
        self._engine, self._kind, self._run = engine, kind, run

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        began_at = time.perf_counter()
        work = self._run(output_tensor, input_tensor, *args, **kwargs)
        numbers = max(output_tensor.numel(), input_tensor.numel())
        self._engine.inside(self._kind, numbers, time.perf_counter() - began_at)
        return work


def _local(tensor: Any) -> torch.Tensor:
    """This rank's rows of a DTensor, or the tensor itself; the same memory."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()
