"""The arithmetic of one optimizer step.

The loss of a step is the sum of its token losses over all workers, divided once by the number of trained tokens over
all workers. A mean of the workers' or micro-batches' means would weigh a token by how few others it happened to sit
with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import nn

from fastserve.errors import StageFailed
from fastserve.stages.train.corpus import Corpus, Rectangle
from fastserve.stages.train.flat import FlatParameters
from fastserve.stages.train.group import Group


def loss_sum(model: nn.Module, rectangle: Rectangle) -> torch.Tensor:
    """Sum of the trained tokens' losses, in nats; a scalar.

    Only the places that are trained go through the output head, which is the widest layer of a small model: a hook
    picks them out in front of it, so that whatever a model does to its logits afterwards still happens.
    """

    def pick(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden_BLH = inputs[0]  # noqa: N806 - shape-suffixed
        return (hidden_BLH.flatten(0, 1)[rectangle.predicts_K].unsqueeze(0), *inputs[1:])

    head: nn.Module = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(pick)
    try:
        logits_1KV = model(input_ids=rectangle.ids_BL, use_cache=False).logits  # noqa: N806 - shape-suffixed
    finally:
        hook.remove()
    return F.cross_entropy(logits_1KV[0].float(), rectangle.targets_K, reduction="sum")


def accumulate(model: nn.Module, flat: FlatParameters, corpus: Corpus, micros: Sequence[Sequence[int]]) -> float:
    """Add the gradients of this worker's micro-batches to `flat`; returns their summed loss in nats."""
    total = 0.0
    for samples in micros:
        loss = loss_sum(model, corpus.rectangle(samples))
        loss.backward()
        total += loss.item()
    return total


def exchange(flat: FlatParameters, group: Group, loss: float, trained_tokens: int, step: int) -> float:
    """Turn every worker's sums into the gradient of the whole batch; returns its mean loss in nats a token.

    loss: this worker's summed loss. trained_tokens: of the whole batch, over all workers.

    Raises StageFailed on every worker, naming step and ranks, when a loss or gradient is not finite; the optimizer has
    then not seen it.
    """
    finite = bool(torch.isfinite(flat.gradients.sum())) and loss == loss and abs(loss) != float("inf")
    told = torch.zeros(1 + group.size, dtype=torch.float64)
    told[0] = loss if finite else 0.0
    told[1 + group.rank] = not finite
    group.add_up(told)
    broken = [rank for rank in range(group.size) if told[1 + rank]]
    if broken:
        ranks = ", ".join(str(rank) for rank in broken)
        raise StageFailed(
            f"the loss or gradient is not a finite number at step {step + 1} on rank {ranks}; "
            "lower learningRate, add warmupSteps, or use precision: fp32"
        )
    group.add_up(flat.gradients)
    flat.gradients.div_(trained_tokens)
    return float(told[0]) / trained_tokens
