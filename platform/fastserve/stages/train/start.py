"""From a loaded model to the first step: what is this worker worth, who does how much, does the engine compute right.

Every rank measures itself, tells all the others, and makes the plan from the same numbers, so nobody has to be asked
and all have the same plan.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from fastserve.artifacts.store import Store
from fastserve.plan.shares import SharePlan, TrainingFacts, WorkerFacts, plan_shares
from fastserve.spec.train import Train
from fastserve.stages.train import fp8, state
from fastserve.stages.train.corpus import Corpus, Rectangle
from fastserve.stages.train.division import divide
from fastserve.stages.train.engine import Engine, make_engine
from fastserve.stages.train.group import Group
from fastserve.stages.train.loading import EAGER_BELOW_TOKENS, load_network
from fastserve.stages.train.meter import Pace
from fastserve.stages.train.network import DTYPES, Network
from fastserve.stages.train.order import Batch, Order
from fastserve.stages.train.place import Place, memory_bytes
from fastserve.stages.train.probe import ACCELERATOR_SIZES, SIZES, probe
from fastserve.stages.train.proof import Proof, Reference, SomeBlocks, WholeModel, prove
from fastserve.stages.train.scaler import FIRST
from fastserve.stages.train.task import Task

_LOG = logging.getLogger(__name__)

_FEWEST = 1e6
"""Cost of a micro-batch that lets `divide` make the largest ones."""

_PROOF_TOKENS = 64
"""Tokens that each rank has in the proof, or its shortest sample."""


@dataclass(frozen=True, slots=True)
class Started:
    """A run that can take its next step."""

    engine: Engine
    plan: SharePlan
    run: state.RunState
    proof: Proof | None
    """None when the run was taken up again: it was proved at its first start."""

    paces: list[Pace]
    """What each rank took in the probe."""

    measured: bool
    """Whether the plan's speeds were measured; else they are the manifest's, and only relative."""


def start(store: Store, task: Task, corpus: Corpus, folder: Path, group: Group, place: Place) -> Started:
    """Load, probe, plan, cut the state, go to the newest checkpoint, prove. Collective.

    Raises InsufficientMemory, NotExecutable or StageFailed, on all ranks alike.
    """
    train = task.train
    began_at = time.monotonic()
    if train.precision == "fp8":
        fp8.require_hardware(place.device)
    # A packed row is wider than its samples.
    longest = max(task.longest, EAGER_BELOW_TOKENS) if train.packing else task.longest
    network = load_network(folder, train, longest, task.config)
    mine = state.fingerprint(task.tokenizer, network.trained)
    # The first rank says it for all, who then also begin the probe together.
    step = group.number_from_first(state.newest(store, task.request) if group.rank == 0 else 0)
    loaded_at = time.monotonic()
    batch = Order(corpus.lengths, train.batch_tokens, train.seed).at(0)
    workers, paces, measured = _workers(network, train, corpus, batch, group, place)
    probed_at = time.monotonic()
    facts = training_facts(network, task.facts, train)
    plan = plan_shares(workers, facts, train.batch_tokens, even=train.engine == "fsdp2")
    reference = None if step else _reference(network, plan, train, corpus, batch, group)
    engine = make_engine(network, train, plan, group)
    run = state.RunState(
        export=network.export, fingerprint=mine, loss_scale=FIRST if train.precision == "fp16" else 1.0
    )
    if step:
        run = state.load(store, task.request, step, engine.state(), fingerprint=mine)
    engine.resume(run.step)
    proof = None if reference is None else prove(reference, engine)
    if measured:
        exchange, costs = _empty_micro_batch(engine, group)
        paces = [
            replace(pace, micro_batch_seconds=pace.micro_batch_seconds + cost)
            for pace, cost in zip(paces, costs, strict=True)
        ]
        plan = plan_shares(workers, facts, train.batch_tokens, exchange_seconds=exchange, even=plan.even)
    _LOG.info(
        "loaded in %.1f s, probed in %.1f s, planned, cut and proved in %.1f s: %s",
        loaded_at - began_at,
        probed_at - loaded_at,
        time.monotonic() - probed_at,
        [f"{worker.profile} {worker.tokens_per_s:.0f} tokens/s" for worker in workers],
    )
    return Started(engine, plan, run, proof, paces, measured)


def training_facts(network: Network, assumed: TrainingFacts, train: Train) -> TrainingFacts:
    """What the loaded model needs, where the plan before it was loaded could only count by its shape."""
    size = DTYPES[train.precision].itemsize
    known = {id(parameter) for parameter in network.trained.values()}

    def of(module: nn.Module) -> tuple[int, int]:
        """Trained numbers, and bytes of the frozen ones."""
        parameters = list(module.parameters())
        trained = sum(parameter.numel() for parameter in parameters if id(parameter) in known)
        return trained, sum(p.numel() * p.element_size() for p in parameters if id(p) not in known)

    trained, frozen = of(network.model)
    blocks = [of(network.model.get_submodule(name)) for name in network.blocks]
    loaded = sum(parameter.numel() * parameter.element_size() for parameter in network.model.parameters())
    return replace(
        assumed,
        state_bytes=16 * trained,
        frozen_bytes=frozen,
        unit_bytes=size * max((numbers for numbers, _ in blocks), default=0),
        root_bytes=size * (trained - sum(numbers for numbers, _ in blocks)),
        working_bytes=size * trained,
        frozen_unit_bytes=max((size_bytes for _, size_bytes in blocks), default=0),
        frozen_root_bytes=frozen - sum(size_bytes for _, size_bytes in blocks),
        copy_bytes=12 * trained if assumed.copy_bytes else 0,
        loaded_bytes=loaded if assumed.loaded_bytes else 0,
    )


def given_speeds(train: Train, profiles: Sequence[str]) -> list[float] | None:
    """Relative speeds by rank that the manifest gives; None when it gives none.

    profiles: of each rank. The ranks of a profile take the manifest's workers of that profile in their order.
    """
    if all(group.speed is None for group in train.workers):
        return None
    left: dict[str, list[float]] = {}
    for group in train.workers:
        left.setdefault(group.profile, []).extend([float(group.speed or 1.0)] * group.count)
    found = []
    for profile in profiles:
        speeds = left.get(profile) or [1.0]
        found.append(speeds.pop(0) if len(speeds) > 1 else speeds[0])
    return found


def _workers(
    network: Network, train: Train, corpus: Corpus, batch: Batch, group: Group, place: Place
) -> tuple[list[WorkerFacts], list[Pace], bool]:
    """All workers and their paces by rank, and whether these were measured."""
    names = sorted({workers.profile for workers in train.workers} | {"local"})
    code = float(names.index(place.profile)) if place.profile in names else -1.0
    given = any(workers.speed is not None for workers in train.workers)
    accelerated = place.device.type == "cuda"
    sizes = ACCELERATOR_SIZES if accelerated else SIZES
    speed, most, pace = 1.0, sizes[-2], Pace(1.0)
    if not given:
        largest = max(sizes[1], 2 * train.batch_tokens // group.size)
        candidates = _candidates(
            corpus, batch, [size for size in sizes if size <= largest], train.packing, place.device
        )
        found = probe(network, candidates, DTYPES[train.precision], place.device)
        speed, most, pace = found.tokens_per_s, max(sizes[1], found.most_tokens), found.pace
    memory = memory_bytes(place, group)
    told = group.gather_numbers([code, speed, memory, most, pace.seconds_per_token, pace.micro_batch_seconds])
    profiles = [names[int(row[0])] if row[0] >= 0 else place.profile for row in told]
    speeds = given_speeds(train, profiles) or [row[1] for row in told]
    workers = [
        WorkerFacts(f"rank-{rank}", profiles[rank], speeds[rank], int(row[2]), int(row[3]))
        for rank, row in enumerate(told)
    ]
    paces = [Pace(1 / speeds[rank]) if given else Pace(row[4], row[5]) for rank, row in enumerate(told)]
    return workers, paces, not given


def _candidates(
    corpus: Corpus, batch: Batch, sizes: Sequence[int], packed: bool, device: torch.device
) -> list[tuple[int, Rectangle]]:
    """(tokens, samples) of micro-batches of about each size, out of the first batch."""
    found: list[tuple[int, Rectangle]] = []
    for size in sizes:
        rounds = divide(batch, corpus.lengths, (1.0,), (size,), packed=packed, round_cost=_FEWEST)[0]
        samples = max((one for one in rounds if one), key=lambda one: corpus.tokens(one))
        tokens = corpus.tokens(samples)
        if not found or tokens > found[-1][0]:
            found.append((tokens, rectangle(corpus, samples, packed, device)))
    return found


def rectangle(corpus: Corpus, samples: Sequence[int], packed: bool, device: torch.device) -> Rectangle:
    """`samples` as the model takes them, on the device that it computes on."""
    made = corpus.packed(samples) if packed else corpus.rectangle(samples)
    if device.type == "cpu":
        return made
    tensors = {name: getattr(made, name) for name in ("ids_BL", "predicts_K", "targets_K", "positions_BL", "mask")}
    return replace(made, **{name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None})


def _reference(
    network: Network, plan: SharePlan, train: Train, corpus: Corpus, batch: Batch, group: Group
) -> Reference:
    """What the proof holds the engine against."""
    few = _few_samples(corpus, batch, group.size)

    def made(samples: Sequence[int]) -> Rectangle:
        return rectangle(corpus, samples, train.packing, group.device)

    rectangles = [made(samples) if samples else None for samples in few]
    dtype = DTYPES[train.precision]
    memory = [worker.memory_bytes for worker in plan.workers]
    trained = plan.facts.state_bytes // 16
    # The gradient comes back whole to every rank; the one that judges has the model and a second gradient besides.
    room = [most - plan.facts.process_bytes - 4 * trained for most in memory]
    judge = max(range(group.size), key=room.__getitem__)
    whole = plan.facts.frozen_bytes + trained * (8 + dtype.itemsize)
    if (min(room) > 0 and room[judge] > whole) or not network.blocks:
        # In fp32 as one process would: all samples at once. Halved precisions round other shapes in other ways.
        alone = [made([sample for samples in few for sample in samples])] if dtype is torch.float32 else rectangles
        return WholeModel(network, rectangles, group, train.precision, dtype, alone, judge)
    return SomeBlocks(network, rectangles, group, train.precision, dtype)


def _few_samples(corpus: Corpus, batch: Batch, size: int) -> list[list[int]]:
    """The shortest samples of a batch, each to the rank with the fewest tokens; unequal numbers of them on purpose."""
    few: list[list[int]] = [[] for _ in range(size)]
    tokens = [0] * size
    for sample in sorted(batch.samples, key=lambda sample: (int(corpus.lengths[sample]), sample)):
        rank = min(range(size), key=tokens.__getitem__)
        length = int(corpus.lengths[sample])
        if few[rank] and tokens[rank] + length > _PROOF_TOKENS:
            break
        few[rank].append(sample)
        tokens[rank] += length
    return few


def _empty_micro_batch(engine: Engine, group: Group) -> tuple[float, list[float]]:
    """What a micro-batch without samples takes: seconds of communication for the rank that waits least, and seconds of
    everything else for each rank, such as copies of gradients. Collective."""
    if group.size == 1:
        return 0.0, [0.0]
    for _ in range(2):  # the first one opens connections
        engine.clear()
        group.number_from_first(0)
        began_at = time.perf_counter()
        engine.idle()
        engine.finite()
        wall = time.perf_counter() - began_at
        waiting = min(engine.collective_seconds, wall)
    engine.clear()
    told = group.gather_numbers([waiting, wall - waiting])
    return min(row[0] for row in told), [row[1] for row in told]
