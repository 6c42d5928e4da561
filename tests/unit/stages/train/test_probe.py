"""How fast a worker is: measured on a shorter run of the model, which stays as it was."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny_llama import write_tiny_llama

from fastserve.spec.train import Train
from fastserve.stages.train.corpus import Corpus
from fastserve.stages.train.group import CPU, Group
from fastserve.stages.train.loading import load_network
from fastserve.stages.train.loop import loss_sum
from fastserve.stages.train.network import Network
from fastserve.stages.train.probe import link_seconds, probe
from fastserve.stages.train.standin import StandIn, shortened


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("deep") / "model", layers=12, hidden=64)


def network(folder: Path, **section: object) -> Network:
    train = Train.model_validate({"dataset": "x", "precision": "fp32", "method": "full", **section})
    return load_network(folder, train, longest=100)


def test_it_measures_about_what_the_whole_model_takes(deep_model: Path, corpus: Corpus) -> None:
    net = network(deep_model)
    samples = list(range(16))
    rectangle = corpus.rectangle(samples)
    tokens = corpus.tokens(samples)

    def about_right() -> bool:
        found = probe(net, [(tokens, rectangle)], torch.float32, CPU)
        seconds = []
        for _ in range(5):
            began_at = time.perf_counter()
            loss_sum(net.model, rectangle).backward()
            seconds.append(time.perf_counter() - began_at)
        assert found.most_tokens == tokens
        return min(seconds) / 3 < tokens / found.tokens_per_s < max(seconds) * 3

    # Other work on the machine may come between any two measurements; a block left out or counted twice would show in
    # all of them.
    assert any(about_right() for _ in range(5))


@pytest.mark.parametrize("section", [{"method": "full", "precision": "bf16"}, {"method": "lora"}])
def test_the_model_is_as_it_was(deep_model: Path, corpus: Corpus, section: dict[str, str]) -> None:
    net = network(deep_model, **section)
    before = {name: tensor.clone() for name, tensor in net.model.state_dict().items()}
    names = [name for name, _ in net.model.named_modules()]
    candidates = [(corpus.tokens(part), corpus.rectangle(part)) for part in ([0], [0, 1, 2], list(range(12)))]
    found = probe(net, candidates, torch.bfloat16 if "precision" in section else torch.float32, CPU)
    assert found.tokens_per_s > 0
    assert found.most_tokens in [tokens for tokens, _ in candidates]
    assert [name for name, _ in net.model.named_modules()] == names
    assert all(torch.equal(before[name], tensor) for name, tensor in net.model.state_dict().items())
    assert all(parameter.grad is None for parameter in net.model.parameters())


def test_a_stand_in_computes_what_the_model_computes(deep_model: Path, corpus: Corpus) -> None:
    net = network(deep_model)
    rectangle = corpus.rectangle([0, 4])
    stand_in = StandIn(net, torch.float32, CPU)
    assert stand_in.loss(rectangle).item() == loss_sum(net.model, rectangle).item()
    assert stand_in.trained.keys() == net.trained.keys()
    whole = loss_sum(net.model, rectangle).item()
    with shortened(net, 2):
        assert len(net.model.model.layers) == 2
        assert StandIn(net, torch.float32, CPU).loss(rectangle).item() != whole
    assert len(net.model.model.layers) == 12


@dataclass(frozen=True)
class FarAway(Group):
    """A group in which one rank's messages take long, in and out."""

    def from_rank(self, rank: int, tensor: torch.Tensor) -> None:
        if self.rank == 1:
            time.sleep(0.05)
        super().from_rank(rank, tensor)


def test_a_slow_link_is_slow_as_sender_and_as_receiver() -> None:
    def rank() -> list[float]:
        here = Group.current()
        return link_seconds(FarAway(here.rank, here.size))

    def seen() -> bool:
        found = run_ranks(rank, 3)
        assert found[0] == found[1] == found[2]
        return max(range(3), key=found[0].__getitem__) == 1 and found[0][1] > 1.2 * sorted(found[0])[1]

    assert any(seen() for _ in range(5)), "once nobody else is held up as long"
    assert link_seconds(Group()) == [0.0]
