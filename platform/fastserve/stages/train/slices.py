"""What a rank keeps of a model in training: fp32 masters, gradients and AdamW's moments of its slices.

The model computes in its own precision; the masters keep what that would round away (Micikevicius et al., 2018, arXiv
1710.03740), and gradients are added up in fp32. Each of the four is one buffer, so that a norm, a scaling or a clearing
is one operation however many blocks there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastserve.stages.train.chunk import Chunk
from fastserve.stages.train.parts import Part

BYTES_PER_NUMBER = 16
"""Master, gradient and two moments, fp32 each."""


class Slices:
    """This rank's slices of all trained parts, and the optimizer over them."""

    def __init__(self, parts: Sequence[Part], weight_decay: float, device: torch.device) -> None:
        """Takes the masters from the parameters as they are. Decay holds for matrices only, not norms and biases."""
        self._parts = parts
        total = sum(part.own_numel for part in parts)
        self.gradients, self._first, self._second = (
            torch.zeros(total, dtype=torch.float32, device=device) for _ in range(3)
        )
        self._spans: list[slice] = []
        begin = 0
        for part in parts:
            self._spans.append(slice(begin, begin + part.own_numel))
            part.mine = part.memory_for_mine(torch.float32, device)
            part.cut_out(part.mine)
            begin += part.own_numel
        self._factor = 1.0
        self._sum_of_squares: float | None = None
        self._optimizer = self._adamw(weight_decay)

    def _adamw(self, weight_decay: float) -> torch.optim.AdamW | None:
        decaying: list[nn.Parameter] = []
        staying: list[nn.Parameter] = []
        state: dict[nn.Parameter, dict[str, Any]] = {}
        for part, span in zip(self._parts, self._spans, strict=True):
            border = span.start + min(max(part.decayed - part.own.start, 0), part.own_numel)
            for run, into in ((slice(span.start, border), decaying), (slice(border, span.stop), staying)):
                if run.start < run.stop:
                    master = nn.Parameter(part.mine[run.start - span.start : run.stop - span.start])
                    master.grad = self.gradients[run]
                    state[master] = {
                        "step": torch.zeros((), device=self.gradients.device),
                        "exp_avg": self._first[run],
                        "exp_avg_sq": self._second[run],
                    }
                    into.append(master)
        groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": staying, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        if not groups:
            return None  # a share of zero: nothing to optimise
        optimizer = torch.optim.AdamW(groups, fused=True)
        optimizer.state.update(state)
        return optimizer

    def gradient_of(self, part: Part) -> torch.Tensor:
        """This rank's gradient slice of `part`, fp32, shape [own numbers]."""
        return self.gradients[self._spans[self._parts.index(part)]]

    def changed(self) -> None:
        """Gradients were added: what was measured on them holds no more."""
        self._sum_of_squares = None

    def clear(self) -> None:
        """Gradients to zero."""
        self.gradients.zero_()
        self._factor, self._sum_of_squares = 1.0, None

    def scale(self, factor: float) -> None:
        """Multiply the gradients; done when they are next used, together with clipping."""
        self._factor *= factor

    def apply_scale(self) -> None:
        """Multiply now."""
        if self._factor != 1.0:
            self.gradients.mul_(self._factor)
            self._factor, self._sum_of_squares = 1.0, None

    def sum_of_squares(self) -> float:
        """Of this rank's scaled gradients; inf or nan when one of them is."""
        if self._sum_of_squares is None:
            self._sum_of_squares = float(torch.linalg.vector_norm(self.gradients)) ** 2
        return self._sum_of_squares * self._factor**2

    def finite(self) -> bool:
        """Whether each of this rank's gradients is a finite number."""
        found = self.sum_of_squares()
        # Finite numbers above 1e19 have squares that are not.
        return found - found == 0 or bool(torch.isfinite(self.gradients).all())

    def step(self, learning_rate: float, factor: float) -> None:
        """One step of AdamW (Loshchilov and Hutter, 2019) with the gradients times `factor`."""
        self.scale(factor)
        self.apply_scale()
        # Masters may lie where neighbours read them: the norm, which all ranks add up before, says that they are done.
        if self._optimizer is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()

    def resume(self, steps_done: int) -> None:
        """AdamW corrects its bias by the number of steps done."""
        for state in self._optimizer.state.values() if self._optimizer is not None else ():
            state["step"].fill_(steps_done)

    def state(self) -> dict[str, Chunk]:
        """Views by `parameters.<name>`, `exp_avg.<name>`, `exp_avg_sq.<name>`; of what this rank keeps only."""
        return {
            **self._views("parameters.", [part.mine for part in self._parts]),
            **self._views("exp_avg.", [self._first[span] for span in self._spans]),
            **self._views("exp_avg_sq.", [self._second[span] for span in self._spans]),
        }

    def gradient_views(self) -> dict[str, Chunk]:
        """Views of the gradients by name, of what this rank keeps only; multiplied with all that was asked for."""
        self.apply_scale()
        return self._views("", [self.gradients[span] for span in self._spans])

    def _views(self, prefix: str, flats: Sequence[torch.Tensor]) -> dict[str, Chunk]:
        """Chunks by name of `flats`, one a part, shape [own numbers] each."""
        found: dict[str, Chunk] = {}
        for part, flat in zip(self._parts, flats, strict=True):
            for place in part.places:
                begin, end = max(place.begin, part.own.start), min(place.end, part.own.stop)
                if begin < end:
                    run = slice(begin - part.own.start, end - part.own.start)
                    found[prefix + place.name] = Chunk.make(flat[run], begin - place.begin, place.end - place.begin)
        return found
