"""The loss of a micro-batch: of its trained tokens alone, however samples are laid out beside one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastserve.spec.train import Train
from fastserve.stages.train.corpus import Corpus
from fastserve.stages.train.group import Group
from fastserve.stages.train.loading import load_network
from fastserve.stages.train.loop import loss_sum
from fastserve.stages.train.network import Network
from fastserve.stages.train.shard import Sharded


def network(tiny_model: Path, longest: int = 100, **section: Any) -> Network:
    train = Train.model_validate({"dataset": "x", "precision": "fp32", "method": "full", **section})
    return load_network(tiny_model, train, longest=longest)


def test_a_rectangle_gives_each_sample_the_loss_it_has_alone(tiny_model: Path, corpus: Corpus) -> None:
    model = network(tiny_model).model
    with torch.no_grad():
        together = loss_sum(model, corpus.rectangle([0, 5, 11, 3])).item()
        alone = sum(loss_sum(model, corpus.rectangle([sample])).item() for sample in (0, 5, 11, 3))
    assert together == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("longest", [100, 1000])
def test_packed_samples_do_not_see_each_other(tiny_model: Path, corpus: Corpus, longest: int) -> None:
    """With attention computed plainly, and with the fused kernel that long samples take."""
    samples = [0, 5, 11, 3, 7]
    found = {}
    for name in ("packed", "rectangle"):
        net = network(tiny_model, longest)
        loss = loss_sum(net.model, getattr(corpus, name)(samples))
        loss.backward()
        found[name] = loss.item(), [p.grad for p in net.trained.values()]
    assert found["packed"][0] == pytest.approx(found["rectangle"][0], rel=1e-6)
    for packed, apart in zip(found["packed"][1], found["rectangle"][1], strict=True):
        assert torch.allclose(packed, apart, atol=1e-6 * float(apart.abs().max()) + 1e-6, rtol=1e-5)


def test_the_loss_is_that_of_the_trained_tokens_alone(tiny_model: Path, corpus: Corpus) -> None:
    model = network(tiny_model).model
    begin, end = int(corpus.starts[2]), int(corpus.starts[3])
    ids = torch.from_numpy(corpus.ids[begin:end].astype("int64"))
    with torch.no_grad():
        logs = torch.log_softmax(model(input_ids=ids[None]).logits[0], dim=-1)
        expected = -sum(logs[i - 1, ids[i]].item() for i in range(1, len(ids)) if corpus.trained[begin + i])
        assert loss_sum(model, corpus.rectangle([2])).item() == pytest.approx(expected, rel=1e-5)


def test_a_mean_of_means_would_be_another_loss(tiny_model: Path, corpus: Corpus) -> None:
    model = network(tiny_model).model
    samples = sorted(range(8), key=lambda sample: int(corpus.lengths[sample]))
    with torch.no_grad():
        sums = [loss_sum(model, corpus.rectangle(part)).item() for part in (samples[:2], samples[2:])]
    counts = [corpus.trained_tokens(part) for part in (samples[:2], samples[2:])]
    right = sum(sums) / sum(counts)
    wrong = sum(total / count for total, count in zip(sums, counts, strict=True)) / 2
    assert abs(right - wrong) > 1e-3


@pytest.mark.parametrize("method", ["full", "lora"])
def test_micro_batches_add_up_to_the_gradient_of_the_batch(tiny_model: Path, corpus: Corpus, method: str) -> None:
    def gradient(micros: list[list[int]]) -> dict[str, torch.Tensor]:
        engine = Sharded(network(tiny_model, method=method), [1.0], Group())
        engine.clear()
        for samples in micros:
            engine.backward(loss_sum(engine.model, corpus.rectangle(samples)))
        return engine.gathered("gradients")

    whole, parts = gradient([list(range(12))]), gradient([[0, 4], [1, 2, 3], list(range(5, 12))])
    largest = max(float(tensor.abs().max()) for tensor in whole.values())
    assert largest > 1e-3
    for name, tensor in whole.items():
        assert torch.allclose(parts[name], tensor, atol=1e-6 * largest, rtol=0), name


def test_the_head_sees_only_the_places_that_are_trained(tiny_model: Path, corpus: Corpus) -> None:
    model = network(tiny_model).model
    seen: list[torch.Size] = []
    model.get_output_embeddings().register_forward_hook(lambda _, __, output: seen.append(output.shape))
    rectangle = corpus.rectangle([0, 1, 2])
    loss_sum(model, rectangle)
    assert seen[0][:2] == (1, len(rectangle.targets_K))
    assert len(rectangle.targets_K) < rectangle.ids_BL.numel()
