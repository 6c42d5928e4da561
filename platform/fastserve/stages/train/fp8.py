"""Products in eight bits: the linear layers of the blocks multiply fp8 numbers, everything else stays bf16.

The recipe of Micikevicius et al., 2022 (arXiv 2209.05433): what goes forward has more precision (e4m3), gradients have
more range (e5m2), and each tensor is scaled so that its largest number is the type's largest. Scales are taken from the
tensor itself, not from the steps before, so a step follows from its batch alone and a restart repeats it. Products are
accumulated by the hardware in fp32. Weights travel and are kept as without fp8: masters in fp32, gathered in bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fastserve.errors import NotExecutable, Problem

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
GRAIN = 16
"""Sides of a product have to be multiples of it: cuBLAS takes no others."""

LEAST_CAPABILITY = (8, 9)
"""CUDA compute capability from which on fp8 is multiplied: Ada; Hopper is 9.0."""


def require_hardware(device: torch.device) -> None:
    """Raise NotExecutable when `device` does not multiply fp8 numbers."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        what = torch.cuda.get_device_name(device) if device.type == "cuda" else "a worker without an accelerator"
        raise _refused(f"{what} does not multiply fp8 numbers; write bf16")


def convert(model: nn.Module, blocks: Sequence[str]) -> int:
    """Let the linear layers in `blocks` of `model` multiply in fp8, in place; returns how many do.

    Adapters and layers whose sides are no multiples of `GRAIN` go on as they are. Parameters stay the same objects.

    Raises NotExecutable when there is none that can.
    """
    converted = 0
    for block in blocks:
        for name, module in model.get_submodule(block).named_modules():
            # Adapters are thin, and kept exact; a layer with adapters calls the frozen one inside.
            fits = type(module) is nn.Linear and module.in_features % GRAIN == 0 and module.out_features % GRAIN == 0
            if fits and "lora_" not in name:
                module.forward = partial(_forward, module)
                converted += 1
    if not converted:
        raise _refused(f"the model has no linear layers whose sides are multiples of {GRAIN}; write bf16")
    return converted


@dataclass(frozen=True, slots=True)
class Scaled:
    """A matrix in fp8, and what to multiply it with to get it back."""

    numbers_MK: torch.Tensor  # noqa: N815 - shape-suffixed
    """fp8, shape [M, K]."""

    scale: torch.Tensor
    """fp32, a scalar."""

    @classmethod
    def of(cls, tensor_MK: torch.Tensor, kind: torch.dtype) -> Scaled:  # noqa: N803
        """`tensor_MK` rounded to `kind`. A number that is not finite makes all of them so, and the step is caught."""
        most = torch.finfo(kind).max
        largest = tensor_MK.detach().abs().amax().float().clamp(min=1e-30)
        scaled = (tensor_MK.float() * (most / largest)).clamp(-most, most)
        return cls(scaled.to(kind), largest / most)

    @property
    def transposed(self) -> Scaled:
        """The same with rows and columns exchanged."""
        return Scaled(self.numbers_MK.t(), self.scale)


def product(left_MK: Scaled, right_NK: Scaled) -> torch.Tensor:  # noqa: N803
    """left @ right.T in bf16, shape [M, N]; K and N are multiples of `GRAIN`."""
    found: torch.Tensor = torch._scaled_mm(
        left_MK.numbers_MK.contiguous(),
        right_NK.numbers_MK.contiguous().t(),
        scale_a=left_MK.scale,
        scale_b=right_NK.scale,
        out_dtype=torch.bfloat16,
    )
    return found


class _Linear(torch.autograd.Function):  # type: ignore[misc]
    """y = x W^T, with the three products of a training step in fp8."""

    @staticmethod
    def forward(ctx: Any, input_MK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:  # noqa: N803
        entered = Scaled.of(input_MK, FORWARD)
        # The weight as it came: its memory is given back between forward and backward, and filled again.
        ctx.save_for_backward(entered.numbers_MK, entered.scale, weight_NK)
        return product(entered, Scaled.of(weight_NK, FORWARD))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        numbers_MK, scale, weight_NK = ctx.saved_tensors  # noqa: N806 - shape-suffixed
        came_back = Scaled.of(gradients[0], BACKWARD)
        to_input = to_weight = None
        if ctx.needs_input_grad[0]:
            to_input = product(came_back, Scaled.of(weight_NK, FORWARD).transposed)
        if ctx.needs_input_grad[1]:
            to_weight = product(came_back.transposed, Scaled(numbers_MK, scale).transposed)
        return to_input, to_weight


def _forward(layer: nn.Linear, input_BLK: torch.Tensor) -> torch.Tensor:  # noqa: N803
    """What takes the place of `layer.forward`. input_BLK: any shape that ends with the layer's inputs."""
    flat = input_BLK.reshape(-1, layer.in_features).to(torch.bfloat16)
    rows = flat.shape[0]
    # The weight's gradient sums over the rows, so they have to be a multiple as well; rows of zeros add nothing.
    filled = nn.functional.pad(flat, (0, 0, 0, -rows % GRAIN))
    found: torch.Tensor = _Linear.apply(filled, layer.weight.to(torch.bfloat16))[:rows]
    if layer.bias is not None:
        found = found + layer.bias.to(found.dtype)
    return found.to(input_BLK.dtype).reshape(*input_BLK.shape[:-1], layer.out_features)


def _refused(message: str) -> NotExecutable:
    return NotExecutable([Problem("spec.train.precision", f"fp8: {message}")])
