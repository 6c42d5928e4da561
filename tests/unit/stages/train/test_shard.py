"""The engine against one process: any shares, any micro-batches, any model give the same gradient and the same run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import engine_models as tiny
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks

from fastserve.errors import StageFailed
from fastserve.stages.train import shard
from fastserve.stages.train.group import Group
from fastserve.stages.train.network import Network
from fastserve.stages.train.shard import Sharded
from fastserve.stages.train.wire import ALIGN, cut

SPLITS = {
    "one micro-batch": [(2, 3, 5)],
    "three micro-batches": [(1, 2, 3), (1, 0, 1), (0, 1, 1)],
    "a rank without samples": [(0, 4, 6)],
}
BATCH = tiny.samples(10)
TOKENS = tiny.trained_tokens(BATCH)


def reference(network: Network, batch: torch.Tensor = BATCH) -> dict[str, torch.Tensor]:
    """The gradient of one process, without any of ours."""
    (tiny.loss_of(network.model, batch) / tiny.trained_tokens(batch)).backward()
    return {name: parameter.grad.clone() for name, parameter in network.trained.items()}


def gradient(
    build: Callable[[], Network], shares: Sequence[float], counts: Sequence[Sequence[int]], **options: Any
) -> list[tuple[dict[str, torch.Tensor], list[tuple[str, int]]]]:
    """On every rank: the engine's gradient and its collectives."""

    def rank() -> tuple[dict[str, torch.Tensor], list[tuple[str, int]]]:
        engine = Sharded(build(), shares, Group.current(), **options)
        engine.clear()
        tiny.accumulate(engine, tiny.micro_batches(BATCH, counts, dist.get_rank()))
        engine.scale(1 / TOKENS)
        assert engine.finite()
        return engine.gathered("gradients"), engine.collectives

    return run_ranks(rank, len(shares))


@pytest.mark.parametrize("neighbours", [True, False])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("shares", [(1, 1, 1), (1, 3, 6), (0, 1, 3)])
def test_any_split_has_the_gradient_of_one_process(shares: Sequence[float], split: str, neighbours: bool) -> None:
    wanted = reference(tiny.full())
    found = gradient(tiny.full, shares, SPLITS[split], neighbours=neighbours)
    for whole, collectives in found:
        assert tiny.difference(whole, wanted) <= 1e-6
        assert collectives == found[0][1]
    assert {kind for kind, _ in found[0][1]} == {"gather", "reduce"}


@pytest.mark.parametrize("kind", [kind for kind in tiny.CONFIGS if kind != "llama"])
def test_architectures(kind: str) -> None:
    def build() -> Network:
        return tiny.full(kind)

    found = gradient(build, (1, 3), [(3, 7)])
    assert tiny.difference(found[0][0], reference(build())) <= 1e-6
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("options", [{"reshard": False}, {"activation_checkpointing": True}])
def test_options_that_change_memory_do_not_change_the_gradient(options: dict[str, Any]) -> None:
    found = gradient(lambda: tiny.full("llama-tied"), (1, 3, 6), SPLITS["three micro-batches"], **options)
    wanted = reference(tiny.full("llama-tied"))
    assert max(tiny.difference(whole, wanted) for whole, _ in found) <= 1e-6
    assert found[0][1] == found[1][1] == found[2][1]


@pytest.mark.parametrize("together_bytes", [shard.TOGETHER_BYTES, 0])
@pytest.mark.parametrize("frozen_whole", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_with_the_frozen_rest_whole_or_cut(
    frozen_whole: bool, together_bytes: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "TOGETHER_BYTES", together_bytes)
    found = gradient(
        tiny.lora,
        (1, 3, 6),
        SPLITS["three micro-batches"],
        frozen_whole=frozen_whole,
        activation_checkpointing=checkpointing,
    )
    wanted = reference(tiny.lora())
    assert max(tiny.difference(whole, wanted) for whole, _ in found) <= 1e-6
    assert found[0][1] == found[1][1] == found[2][1]
    if frozen_whole and together_bytes:
        assert [kind for kind, _ in found[0][1]] == ["reduce", "gather"]  # the second by gathered()


def test_only_adapters_change() -> None:
    def rank() -> None:
        network = tiny.lora()
        engine = Sharded(network, (1, 2), Group.current())
        before = {name: p.detach().clone() for name, p in network.model.named_parameters()}
        engine.clear()
        tiny.accumulate(engine, [BATCH])
        engine.step(1e-2, None)
        changed = {name for name, p in network.model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == set(network.trained)

    run_ranks(rank, 2)


def steps_of(engine: Any, split: Sequence[Sequence[int]], rank: int, steps: int, clip: float | None) -> list[float]:
    """Mean loss by step of this rank's part, over all trained tokens."""
    losses = []
    for step in range(steps):
        batch = tiny.samples(10, seed=step)
        engine.clear()
        loss = tiny.accumulate(engine, tiny.micro_batches(batch, split, rank))
        engine.scale(1 / TOKENS)
        engine.step(1e-3, clip)
        losses.append(loss / TOKENS)
    return losses


def plain_steps(network: Network, steps: int, clip: float | None) -> tuple[list[float], list[float]]:
    """Losses and norms of torch's own AdamW in one process."""
    named = list(network.trained.items())
    matrices, vectors = ([p for _, p in named if (p.ndim >= 2) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-3)
    losses, norms = [], []
    for step in range(steps):
        optimizer.zero_grad()
        loss = tiny.loss_of(network.model, tiny.samples(10, seed=step)) / TOKENS
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_([p for _, p in named], clip or float("inf"))))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


@pytest.mark.parametrize(
    ("shares", "build", "options"),
    [
        ((1, 3, 6), tiny.full, {}),
        ((0, 1, 3), lambda: tiny.full("llama-tied"), {"activation_checkpointing": True}),
        ((1, 3, 6), tiny.lora, {"frozen_whole": False}),
        ((1, 2), tiny.lora, {}),
        ((1,), tiny.full, {}),
    ],
)
def test_twenty_steps_have_the_losses_of_one_process(
    shares: Sequence[float], build: Callable[[], Network], options: dict[str, Any]
) -> None:
    counts = {1: [(10,)], 2: [(3, 7)], 3: SPLITS["one micro-batch"]}[len(shares)]

    def rank() -> list[float]:
        engine = Sharded(build(), shares, Group.current(), weight_decay=0.1, **options)
        return steps_of(engine, counts, dist.get_rank(), 20, 0.5)

    found = [sum(parts) for parts in zip(*run_ranks(rank, len(shares)), strict=True)]
    wanted, norms = plain_steps(build(), 20, 0.5)
    assert found == pytest.approx(wanted, rel=2e-6)
    assert max(norms) > 0.5
    assert wanted[-1] != wanted[0]


def test_the_norm_and_the_clipping_are_torchs() -> None:
    wanted = reference(tiny.full())
    for parameter in (network := tiny.full()).trained.values():
        parameter.grad = None
    (tiny.loss_of(network.model, BATCH) / TOKENS).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(network.trained.values(), 0.3))

    def rank() -> tuple[float, float, bool, dict[str, torch.Tensor]]:
        engine = Sharded(tiny.full(), (0, 1, 3), Group.current())
        engine.clear()
        tiny.accumulate(engine, tiny.micro_batches(BATCH, SPLITS["one micro-batch"], dist.get_rank()))
        engine.scale(1 / TOKENS)
        before = engine.norm()
        after = engine.step(0.0, 0.3, before)
        return before, after, engine.finite(), engine.gathered("gradients")

    for before, after, finite, clipped in run_ranks(rank, 3):
        assert before == after == pytest.approx(norm, rel=1e-6)
        assert finite
        assert tiny.difference(clipped, {name: p.grad for name, p in network.trained.items()}) <= 1e-6
    assert norm > 0.3
    assert max(float(g.abs().max()) for g in wanted.values()) > 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_on_the_wire_stays_close_and_keeps_fp32_masters(precision: str) -> None:
    def rank() -> tuple[list[float], set[torch.dtype]]:
        network = tiny.full()
        engine = Sharded(network, (1, 3, 6), Group.current(), precision=precision, weight_decay=0.1)
        losses = steps_of(engine, SPLITS["one micro-batch"], dist.get_rank(), 5, None)
        dtypes = {chunk.dtype for chunk in engine.state().values()} | {p.dtype for p in network.trained.values()}
        return losses, dtypes

    found = run_ranks(rank, 3)
    wanted, _ = plain_steps(tiny.full(), 5, None)
    got = [sum(parts) for parts in zip(*(losses for losses, _ in found), strict=True)]
    assert got == pytest.approx(wanted, abs=5e-3 * wanted[0])
    assert found[0][1] == {torch.float32, shard.PRECISIONS[precision]}


def test_sums_are_in_fp32_though_the_wire_is_bf16() -> None:
    """256 + 1 rounds to 256 in bf16; four ranks' sum must not."""

    def rank() -> list[float]:
        weight = torch.nn.Parameter(torch.ones(2, 2))
        model = torch.nn.Module()
        model.register_parameter("weight", weight)
        engine = Sharded(Network(model, {"weight": weight}), (1, 1, 1, 1), Group.current(), precision="bf16")
        engine.clear()
        value = 256.0 if dist.get_rank() == 0 else 1.0
        model.forward = lambda: (model.weight * value).sum()  # type: ignore[method-assign]
        engine.backward(model())
        return [float(number) for number in engine.gathered("gradients")["weight"].flatten()]

    assert run_ranks(rank, 4)[0] == [259.0] * 4


@pytest.mark.parametrize("neighbours", [True, False])
def test_idle_ranks_add_exactly_nothing(neighbours: bool) -> None:
    def rank() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[Any]]:
        engine = Sharded(tiny.full(), (1, 2), Group.current(), neighbours=neighbours)
        engine.clear()
        if dist.get_rank():
            engine.idle()  # before any forward has shown the order: through the model
        else:
            engine.backward(tiny.loss_of(engine.model, BATCH))
        once = engine.gathered("gradients")
        for _ in range(2):
            engine.idle()
        return once, engine.gathered("gradients"), engine.collectives

    found = run_ranks(rank, 2)
    assert found[0][2] == found[1][2]
    wanted = reference(tiny.full())
    for once, thrice, _ in found:
        assert all(torch.equal(once[name], thrice[name]) for name in once)
        assert tiny.difference({name: g / TOKENS for name, g in once.items()}, wanted) <= 1e-6


@pytest.mark.parametrize("build", [tiny.full, tiny.lora])
def test_evaluation_gathers_without_a_backward(build: Callable[[], Network]) -> None:
    def rank() -> tuple[float, list[Any]]:
        engine = Sharded(build(), (1, 2), Group.current(), frozen_whole=False)
        engine.clear()
        loss = 0.0
        with torch.no_grad():
            for part in tiny.micro_batches(BATCH, [(4, 4), (2, 0)], dist.get_rank()):
                if len(part):
                    loss += tiny.loss_of(engine.model, part).item()
                else:
                    engine.idle(backward=False)
        return loss, engine.collectives

    found = run_ranks(rank, 2)
    assert found[0][0] + found[1][0] == pytest.approx(tiny.loss_of(build().model, BATCH).item(), rel=1e-6)
    assert found[0][1] == found[1][1] != []


def test_a_run_goes_on_under_another_plan(tmp_path: Path) -> None:
    def begin() -> None:
        engine = Sharded(tiny.full(), (1, 3, 6), Group.current(), weight_decay=0.1)
        steps_of(engine, SPLITS["one micro-batch"], dist.get_rank(), 5, 0.5)
        dcp.save(engine.state(), checkpoint_id=tmp_path)

    def go_on() -> list[float]:
        engine = Sharded(tiny.full(seed=99), (5, 1, 1), Group.current(), weight_decay=0.1)
        dcp.load(engine.state(), checkpoint_id=tmp_path)
        engine.resume(5)
        return steps_of(engine, [(5, 3, 2)], dist.get_rank(), 4, 0.5)

    def through() -> list[float]:
        engine = Sharded(tiny.full(), (1,), Group(), weight_decay=0.1)
        steps_of(engine, [(10,)], 0, 5, 0.5)
        return steps_of(engine, [(10,)], 0, 4, 0.5)

    run_ranks(begin, 3)
    resumed = [sum(parts) for parts in zip(*run_ranks(go_on, 3), strict=True)]
    assert resumed == pytest.approx(through(), rel=2e-6)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_memory_kept_is_what_the_shares_say() -> None:
    shares = (2, 3, 5)

    def rank() -> tuple[int, int, int]:
        began_at = 0
        for _ in range(2):  # the first leaves behind what a process has once: code, buffers of the network
            trim()
            began_at = resident_bytes()
            network = tiny.full(hidden_size=512, intermediate_size=1024, vocab_size=8192)
            numbers = sum(p.numel() for p in network.trained.values())
            # As on machines of their own: what neighbours share would be counted by each of them.
            engine = Sharded(network, shares, Group.current(), neighbours=False)
            steps_of(engine, SPLITS["one micro-batch"], dist.get_rank(), 2, None)
            trim()
            kept, resident = engine.kept_bytes, resident_bytes() - began_at
            del network, engine
        return numbers, kept, resident

    for share, (numbers, kept, resident) in zip(shares, run_ranks(rank, 3), strict=True):
        assert numbers > 14e6
        planned = 16 * numbers * share / sum(shares)
        assert kept == pytest.approx(planned, rel=0.001)
        assert resident == pytest.approx(planned, rel=0.02)


def trim() -> None:
    """Have the C library give back what is free."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def test_a_model_that_calls_a_block_twice_is_refused_not_hung() -> None:
    def rank() -> None:
        network = tiny.full()
        network.model.model.layers.append(network.model.model.layers[0])
        network.model.config.num_hidden_layers = 4
        engine = Sharded(network, (1, 2), Group.current())
        with pytest.raises(StageFailed, match="out of turn"):
            tiny.loss_of(engine.model, BATCH)

    run_ranks(rank, 2)


def test_one_worker_copies_nothing() -> None:
    network = tiny.full()
    engine = Sharded(network, (1,), Group())
    masters = {name: chunk.plain() for name, chunk in engine.state().items() if name.startswith("parameters.")}
    for name, parameter in network.trained.items():
        assert parameter.data_ptr() == masters[f"parameters.{name}"].data_ptr()
    engine.clear()
    engine.backward(tiny.loss_of(engine.model, BATCH))
    engine.scale(1 / TOKENS)
    assert tiny.difference(engine.gathered("gradients"), reference(tiny.full())) <= 1e-6
    assert engine.kept_bytes == 16 * sum(p.numel() for p in network.trained.values())
    assert engine.collective_seconds == 0


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_is_seen_where_it_lies(broken: float) -> None:
    def rank() -> bool:
        engine = Sharded(tiny.full(), (1, 2), Group.current())
        engine.clear()
        loss = tiny.loss_of(engine.model, BATCH)
        engine.backward(loss * broken if dist.get_rank() == 0 else loss)
        return engine.finite()

    assert not all(run_ranks(rank, 2))


def test_shares_must_be_as_many_as_ranks() -> None:
    with pytest.raises(ValueError, match="as many shares"):
        Sharded(tiny.full(), (1, 2), Group())


@given(
    total=st.integers(0, 10**10),
    shares=st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e6)), min_size=1, max_size=50).filter(any),
)
@settings(max_examples=300, deadline=None)
def test_a_cut_gives_each_its_share_and_all_of_it(total: int, shares: list[float]) -> None:
    bounds = cut(total, shares)
    assert bounds[0] == 0
    assert bounds[-1] == total
    assert len(bounds) == len(shares) + 1
    for begin, end, share in zip(bounds[:-1], bounds[1:], shares, strict=True):
        assert end >= begin
        assert abs((end - begin) - total * share / sum(shares)) <= 2 * ALIGN + total * 1e-9
        if share == 0:
            assert end == begin


@pytest.mark.parametrize("shares", [(), (0, 0), (-1, 2), (float("inf"), 1), (float("nan"), 1)])
def test_shares_that_are_none_are_refused(shares: Sequence[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        cut(100, shares)
