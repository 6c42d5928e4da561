"""Products in eight bits: near those in fp32, in the engine as in one process, and good enough to learn with.

Torch multiplies fp8 on the CPU as well, only slowly, so what runs on an accelerator is what is tested here.
"""

from __future__ import annotations

from typing import Any

import engine_models as tiny
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks

from fastserve.errors import NotExecutable
from fastserve.stages.train import fp8
from fastserve.stages.train.fp8 import BACKWARD, FORWARD, Scaled, product
from fastserve.stages.train.group import Group
from fastserve.stages.train.network import Network
from fastserve.stages.train.shard import Sharded

BATCH = tiny.samples(10)
TOKENS = tiny.trained_tokens(BATCH)


def converted(network: Network) -> Network:
    fp8.convert(network.model, network.blocks)
    return network


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((found.float() - wanted).norm() / wanted.norm()).detach())


@given(scale=st.floats(1e-20, 1e20), seed=st.integers(0, 1000))
def test_a_tensor_comes_back_whatever_its_size(scale: float, seed: int) -> None:
    tensor = torch.randn(16, 32, generator=torch.Generator().manual_seed(seed)) * scale
    for kind, bits in ((FORWARD, 3), (BACKWARD, 2)):
        scaled = Scaled.of(tensor, kind)
        back = scaled.numbers_MK.float() * scaled.scale
        large = tensor.abs() > tensor.abs().max() * 2**-7  # smaller ones lose bits of their own
        assert ((back - tensor)[large].abs() <= tensor[large].abs() * 2.0 ** -(bits + 1) * 1.001).all()
        assert back.abs().max() == pytest.approx(float(tensor.abs().max()), rel=1e-5)


def test_zeros_stay_zeros() -> None:
    assert not Scaled.of(torch.zeros(16, 16), FORWARD).numbers_MK.float().any()


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_hidden(broken: float) -> None:
    tensor = torch.ones(16, 16)
    tensor[3, 5] = broken
    ones = Scaled.of(torch.ones(16, 16), FORWARD)
    for kind in (FORWARD, BACKWARD):
        assert not torch.isfinite(product(Scaled.of(tensor, kind), ones)).all()


def test_a_layer_is_near_the_exact_one_forward_and_backward() -> None:
    layer = torch.nn.Linear(64, 48)
    block = torch.nn.Sequential(layer)
    inputs = torch.randn(3, 7, 64)  # 21 rows: not a multiple of what the hardware takes
    exact_inputs = inputs.clone().requires_grad_()
    exact = layer(exact_inputs)
    towards = torch.randn_like(exact)
    exact.backward(towards)
    wanted = {"weight": layer.weight.grad, "bias": layer.bias.grad, "input": exact_inputs.grad}
    layer.zero_grad()
    assert fp8.convert(torch.nn.ModuleDict({"block": block}), ["block"]) == 1
    eight_inputs = inputs.clone().requires_grad_()
    eight = layer(eight_inputs)
    eight.backward(towards)
    assert eight.shape == exact.shape
    assert eight.dtype == inputs.dtype
    assert apart(eight, exact) < 0.06
    found = {"weight": layer.weight.grad, "bias": layer.bias.grad, "input": eight_inputs.grad}
    for name, gradient in wanted.items():
        assert apart(found[name], gradient) < 0.08, name


def test_adapters_and_odd_layers_go_on_as_they_are() -> None:
    adapted = tiny.lora()
    before = {name: module.forward for name, module in adapted.model.named_modules() if "lora_" in name}
    assert fp8.convert(adapted.model, adapted.blocks) > 0
    assert {name: module.forward for name, module in adapted.model.named_modules() if "lora_" in name} == before
    odd = torch.nn.ModuleDict({"block": torch.nn.Sequential(torch.nn.Linear(10, 32), torch.nn.Linear(32, 10))})
    with pytest.raises(NotExecutable, match=r"spec.train.precision: fp8: the model has no linear layers .*write bf16"):
        fp8.convert(odd, ["block"])


def test_hardware_that_cannot_is_refused_by_name() -> None:
    with pytest.raises(NotExecutable, match=r"a worker without an accelerator does not multiply fp8 .*write bf16"):
        fp8.require_hardware(torch.device("cpu"))


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}, {"frozen_whole": False}])
@pytest.mark.parametrize("build", [tiny.full, tiny.lora])
def test_the_engine_has_the_gradient_of_one_process(build: Any, options: dict[str, Any]) -> None:
    counts = [(3, 7)]

    def rank() -> dict[str, torch.Tensor]:
        engine = Sharded(
            converted(build()), (1, 3)[: dist.get_world_size()], Group.current(), precision="fp8", **options
        )
        engine.clear()
        tiny.accumulate(engine, tiny.micro_batches(BATCH, counts, dist.get_rank()))
        engine.scale(1 / TOKENS)
        return engine.gathered("gradients")

    found = run_ranks(rank, 2)
    alone = Sharded(converted(build()), (1,), Group(), precision="fp8")
    alone.clear()
    for samples in (BATCH[:3], BATCH[3:]):  # each rank's tensors have scales of their own
        tiny.accumulate(alone, [samples])
    alone.scale(1 / TOKENS)
    wanted = alone.gathered("gradients")
    for gradients in found:
        assert tiny.difference(gradients, wanted) <= 1e-2  # one rank's sum is rounded to bf16 on its way
    exact = build()
    (tiny.loss_of(exact.model, BATCH) / TOKENS).backward()
    assert tiny.difference(wanted, {name: p.grad for name, p in exact.trained.items()}) < 0.4


def test_it_learns_as_bf16_does() -> None:
    losses = {}
    for precision in ("bf16", "fp8"):
        network = tiny.full() if precision == "bf16" else converted(tiny.full())
        engine = Sharded(network, (1,), Group(), precision=precision)
        curve = []
        for _ in range(30):
            engine.clear()
            curve.append(tiny.accumulate(engine, [BATCH]) / TOKENS)
            engine.scale(1 / TOKENS)
            engine.step(3e-3, 1.0)
        losses[precision] = curve
    fallen = {precision: curve[0] - curve[-1] for precision, curve in losses.items()}
    assert losses["bf16"][-1] < 0.3 * losses["bf16"][0]
    assert fallen["fp8"] > 0.95 * fallen["bf16"]
