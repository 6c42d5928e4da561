"""The arithmetic of a step: split or whole, the same loss and gradient."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fastserve.errors import StageFailed
from fastserve.spec.train import Train
from fastserve.stages.train.corpus import Corpus
from fastserve.stages.train.flat import FlatParameters
from fastserve.stages.train.group import Group
from fastserve.stages.train.loop import accumulate, exchange, loss_sum
from fastserve.stages.train.network import Network, load_network
from fastserve.stages.train.order import Batch, micro_batches, share


def network(tiny_model: Path, **section: object) -> Network:
    return load_network(tiny_model, Train.model_validate({"dataset": "x", "precision": "fp32", **section}), longest=100)


def test_a_rectangle_gives_each_sample_the_loss_it_has_alone(tiny_model: Path, corpus: Corpus) -> None:
    model = network(tiny_model, method="full").model
    with torch.no_grad():
        together = loss_sum(model, corpus.rectangle([0, 5, 11, 3])).item()
        alone = sum(loss_sum(model, corpus.rectangle([sample])).item() for sample in (0, 5, 11, 3))
    assert together == pytest.approx(alone, rel=1e-6)


def test_the_loss_is_that_of_the_trained_tokens_alone(tiny_model: Path, corpus: Corpus) -> None:
    model = network(tiny_model, method="full").model
    begin, end = int(corpus.starts[2]), int(corpus.starts[3])
    ids = torch.from_numpy(corpus.ids[begin:end].astype("int64"))
    with torch.no_grad():
        logs = torch.log_softmax(model(input_ids=ids[None]).logits[0], dim=-1)
        expected = -sum(logs[i - 1, ids[i]].item() for i in range(1, len(ids)) if corpus.trained[begin + i])
        assert loss_sum(model, corpus.rectangle([2])).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("workers", [2, 3, 30])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_batch_split_over_workers_has_the_loss_and_gradient_of_one_process(
    tiny_model: Path, corpus: Corpus, workers: int, method: str
) -> None:
    batch = Batch(0, tuple(range(16)))
    tokens = corpus.trained_tokens(batch.samples)

    def sums(parts: int) -> tuple[float, torch.Tensor]:
        loss, gradient = 0.0, torch.zeros(())
        for rank in range(parts):
            net = network(tiny_model, method=method)
            flat = FlatParameters(net.trained)
            mine = share(batch, corpus.lengths, parts, rank)
            loss += accumulate(net.model, flat, corpus, micro_batches(mine, corpus.lengths, limit=300))
            gradient = gradient + flat.gradients
        return loss / tokens, gradient / tokens

    one_loss, one_gradient = sums(1)
    loss, gradient = sums(workers)
    assert loss == pytest.approx(one_loss, abs=1e-6)
    assert torch.allclose(gradient, one_gradient, atol=1e-6, rtol=0)
    assert one_gradient.abs().max() > 1e-3


def test_a_mean_of_means_would_be_another_loss(tiny_model: Path, corpus: Corpus) -> None:
    model = network(tiny_model, method="full").model
    samples = sorted(range(8), key=corpus.lengths.__getitem__)
    with torch.no_grad():
        sums = [loss_sum(model, corpus.rectangle(part)).item() for part in (samples[:2], samples[2:])]
    counts = [corpus.trained_tokens(part) for part in (samples[:2], samples[2:])]
    right = sum(sums) / sum(counts)
    wrong = sum(total / count for total, count in zip(sums, counts, strict=True)) / 2
    assert abs(right - wrong) > 1e-3


def test_adamw_on_the_flat_buffer_is_adamw_on_the_model(tiny_model: Path, corpus: Corpus) -> None:
    net, plain = network(tiny_model, method="full"), network(tiny_model, method="full")
    flat = FlatParameters(net.trained, weight_decay=0.1)
    named = list(plain.trained.items())
    matrices, vectors = ([p for _, p in named if (p.ndim >= 2) == is_matrix] for is_matrix in (True, False))
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}])
    for step in range(3):
        samples = [step, step + 1]
        tokens = corpus.trained_tokens(samples)
        flat.clear()
        loss = accumulate(net.model, flat, corpus, [samples])
        exchange(flat, Group(), loss, tokens, step)
        norm = flat.step(1e-3, clip_norm=0.5)
        optimizer.zero_grad()
        (loss_sum(plain.model, corpus.rectangle(samples)) / tokens).backward()
        plain_norm = torch.nn.utils.clip_grad_norm_(matrices + vectors, 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.step()
        assert norm == pytest.approx(float(plain_norm), rel=1e-5)
    for name, parameter in plain.trained.items():
        assert torch.allclose(parameter, net.trained[name], atol=2e-5), name


def test_fp32_masters_keep_what_bf16_would_round_away() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    flat = FlatParameters({"weight": weight})
    for _ in range(20):
        flat.clear()
        flat.gradients.fill_(1.0)
        flat.step(1e-4, clip_norm=None)
    assert weight.dtype == torch.bfloat16
    assert flat.masters[0].item() == pytest.approx(1 - 20e-4, abs=1e-5)
    assert weight[0, 0].item() == pytest.approx(1 - 20e-4, abs=5e-3)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_never_reaches_the_optimizer(broken: float) -> None:
    flat = FlatParameters({"weight": torch.nn.Parameter(torch.ones(4))})
    flat.gradients[2] = broken
    with pytest.raises(StageFailed, match=r"at step 8 on rank 0; lower learningRate"):
        exchange(flat, Group(), 1.0, 10, step=7)
    assert torch.equal(flat.masters, torch.ones(4))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_named_too(broken: float) -> None:
    flat = FlatParameters({"weight": torch.nn.Parameter(torch.ones(4))})
    with pytest.raises(StageFailed, match="rank 0"):
        exchange(flat, Group(), broken, 10, step=0)
