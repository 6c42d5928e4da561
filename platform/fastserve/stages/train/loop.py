"""The loss of a micro-batch, as a sum.

The loss of a step is the sum of its token losses over all workers, divided once by the number of trained tokens over
all workers. A mean of the workers' or micro-batches' means would weigh a token by how few others it happened to sit
with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import nn

from fastserve.stages.train.corpus import Rectangle


def loss_sum(model: nn.Module, rectangle: Rectangle) -> torch.Tensor:
    """Sum of the trained tokens' losses, in nats; a scalar. The rectangle lies where the model does.

    Only the places that are trained go through the output head, which is the widest layer of a small model: a hook
    picks them out in front of it, so that whatever a model does to its logits afterwards still happens. Packed samples
    come with positions that begin anew in each; transformers then keeps them from seeing each other.
    """
    more = {"position_ids": rectangle.positions_BL, "attention_mask": rectangle.mask}

    def pick(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden_BLH = inputs[0]  # noqa: N806 - shape-suffixed
        return (hidden_BLH.flatten(0, 1)[rectangle.predicts_K].unsqueeze(0), *inputs[1:])

    head: nn.Module = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(pick)
    try:
        logits_1KV = model(  # noqa: N806 - shape-suffixed
            input_ids=rectangle.ids_BL,
            use_cache=False,
            **{name: tensor for name, tensor in more.items() if tensor is not None},
        ).logits
    finally:
        hook.remove()
    return F.cross_entropy(logits_1KV[0].float(), rectangle.targets_K, reduction="sum")
