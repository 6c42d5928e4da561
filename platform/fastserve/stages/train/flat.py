"""Everything that is trained, in one fp32 buffer: one exchange, one norm, one optimizer step.

The model computes in its own precision; the buffer keeps the fp32 masters (Micikevicius et al., 2018, arXiv
1710.03740). Gradients of all micro-batches are added up in fp32 as they arise, so that bf16 rounds each of them but
never their sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class FlatParameters:
    """The trained parameters of a model, their gradients and AdamW's moments, each as one flat fp32 tensor."""

    def __init__(self, trained: Mapping[str, nn.Parameter], weight_decay: float = 0.0) -> None:
        """trained: parameters by name. Decay holds for matrices only; vectors (norms, biases) are left out of it."""
        # Matrices first, so that what decays is one slice.
        self._named = dict(sorted(trained.items(), key=lambda item: (item[1].ndim < 2, item[0])))
        total = sum(parameter.numel() for parameter in self._named.values())
        decayed = sum(parameter.numel() for parameter in self._named.values() if parameter.ndim >= 2)
        self.masters = torch.empty(total, dtype=torch.float32)
        self.gradients = torch.zeros(total, dtype=torch.float32)
        self._moments = {name: torch.zeros(total, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
        self._spans: dict[str, slice] = {}
        begin = 0
        for name, parameter in self._named.items():
            self._spans[name] = slice(begin, begin + parameter.numel())
            begin += parameter.numel()
            self._adopt(name, parameter)
        groups = [
            self._group(slice(0, decayed), weight_decay),
            self._group(slice(decayed, total), 0.0),
        ]
        self._optimizer = torch.optim.AdamW([group for group in groups if group["params"][0].numel()], fused=True)
        for group in self._optimizer.param_groups:
            span = slice(group["begin"], group["begin"] + group["params"][0].numel())
            moments = {name: moment[span] for name, moment in self._moments.items()}
            self._optimizer.state[group["params"][0]] = {"step": torch.zeros(()), **moments}

    def _adopt(self, name: str, parameter: nn.Parameter) -> None:
        master = self._view(self.masters, name)
        master.copy_(parameter.detach())
        if parameter.dtype == torch.float32:
            parameter.data = master  # no second copy where the model itself computes in fp32
        gradient = self._view(self.gradients, name)

        def add(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                gradient.add_(parameter.grad)
                parameter.grad = None

        parameter.register_post_accumulate_grad_hook(add)

    def _group(self, span: slice, weight_decay: float) -> dict[str, Any]:
        master = nn.Parameter(self.masters[span])
        master.grad = self.gradients[span]
        return {"params": [master], "weight_decay": weight_decay, "begin": span.start}

    def _view(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        return flat[self._spans[name]].view(self._named[name].shape)

    def step(self, learning_rate: float, clip_norm: float | None) -> float:
        """Apply the gradients, which the caller has summed and divided; returns their norm before clipping."""
        norm = float(torch.linalg.vector_norm(self.gradients))
        if clip_norm is not None and norm > clip_norm:
            self.gradients.mul_(clip_norm / norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self.publish()
        return norm

    def publish(self) -> None:
        """Give the model what the masters hold."""
        for name, parameter in self._named.items():
            if parameter.dtype != torch.float32:
                parameter.data.copy_(self._view(self.masters, name))

    def resume(self, steps_done: int) -> None:
        """Go on from what was loaded into `state`; AdamW corrects its bias by the number of steps done."""
        for state in self._optimizer.state.values():
            state["step"].fill_(steps_done)
        self.publish()

    def clear(self) -> None:
        """Forget the gradients of the step before."""
        self.gradients.zero_()

    def state(self) -> dict[str, torch.Tensor]:
        """Views of all state, for a checkpoint to save or to load into.

        Names are `parameters.<name>`, `exp_avg.<name>` and `exp_avg_sq.<name>`.
        """
        flats = {"parameters": self.masters, **self._moments}
        return {f"{kind}.{name}": self._view(flat, name) for kind, flat in flats.items() for name in self._named}
