"""The train stage: fine-tune a model, or make one from scratch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fastserve.spec.section import Flag, Name, Number, Plain, Positive, Section, Whole, wrong_at
from fastserve.spec.source import SourceRef

MOST_GROUPS = 256
"""Groups of workers. An API server takes a rule only over a list that ends somewhere."""


class Lora(Section):
    """Low-rank adapters (Hu et al., 2021, arXiv 2106.09685): only two small matrices a layer are trained."""

    rank: Positive = 16
    """Rank of the two matrices."""

    alpha: Annotated[Number, Field(gt=0)] = 32
    """The update is scaled by alpha / rank."""

    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's input that is dropped in training."""

    targets: list[str] = Field(default_factory=list)
    """Names of the linear layers that get adapters; empty: all linear layers of the blocks."""


class Workers(Section):
    """A group of equal training workers."""

    profile: Name
    """Hardware profile of these workers; `local` on a laptop."""

    count: Positive
    """Workers of this profile."""

    speed: Annotated[Number, Field(gt=0)] | None = None
    """Speed of one of these workers against the others, to begin with: 2 is twice a 1. Measured when left out; beside
    groups that give theirs it begins as 1."""


class Elastic(Section):
    """How far a run may shrink when machines are lost."""

    min_workers: Positive
    """Fewest workers to go on with; one that comes back is taken in again, up to what workers lists. Machines that go
    to a model that serves (`priority`) leave at least so many."""


class Checkpoint(Section):
    """How often training state is saved, and how much of it is kept."""

    every_steps: Positive = 50
    """Optimizer steps between checkpoints."""

    keep: Positive = 2
    """Newest checkpoints kept; the one of the lowest validation loss is kept besides."""


class Validation(Section):
    """Rows whose loss is measured while it trains; what is kept in the end are the weights of the lowest loss."""

    data: SourceRef
    """Held-out rows, in any form that `dataset` takes; none of them may be in `dataset`."""

    every_steps: Positive = 50
    """Optimizer steps between two measurements; the last step is always measured."""

    patience: Positive | None = None
    """Stop after so many measurements in a row without a new lowest loss. Absent: train to the end."""


class Scratch(Section):
    """A model with random weights, in the source's architecture."""

    vocabulary: Annotated[Whole, Field(gt=256)] | None = None
    """Tokens of a byte-level BPE tokenizer that is trained on `dataset` (Sennrich et al., 2016, arXiv 1508.07909); 256
    of them are the bytes. Absent: the source's tokenizer is kept."""

    config: dict[str, Plain] = Field(default_factory=dict)
    """Keys of the source's config.json with other values, such as `{num_hidden_layers: 4, hidden_size: 256}`."""

    @model_validator(mode="after")
    def _the_vocabulary_has_one_place(self) -> Self:
        if "vocab_size" in self.config:
            raise wrong_at("config.vocab_size", "follows from the tokenizer; write scratch.vocabulary, or remove it")
        return self


class Train(Section):
    """How the source is trained. Loss is the sum of token losses over the global number of trained tokens."""

    method: Literal["full", "lora", "qlora", "scratch"] = "lora"
    """full (all weights), lora (adapters), qlora (adapters on a 4-bit base), scratch (random weights)."""

    dataset: SourceRef
    """Rows to learn from: chat (`messages`), instruction (`instruction`/`prompt` and
    `output`/`response`/`completion`) or plain text (`text`); .jsonl, .parquet or .txt."""

    precision: Literal["fp32", "bf16", "fp16", "fp8"] = "bf16"
    """Precision of the computation; the optimizer keeps fp32."""

    epochs: Annotated[Number, Field(gt=0)] | None = None
    """Passes over the data set; 1 when neither epochs nor steps is given."""

    steps: Positive | None = None
    """Optimizer steps, instead of epochs."""

    batch_tokens: Positive = 4096
    """Tokens in one optimizer step, over all workers."""

    max_length: Positive = 2048
    """Longest sample in tokens. A row without a trained token left is left out and counted."""

    over_length: Literal["truncate", "drop"] = "truncate"
    """A sample longer than maxLength: truncate cuts what is beyond, drop leaves it out; both are counted."""

    packing: Flag = False
    """Whether samples stand behind each other in one row instead of being filled up; each attends to itself alone."""

    learning_rate: Annotated[Number, Field(gt=0)] = 2e-4
    """Peak learning rate."""

    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the learning rate after warm-up."""

    warmup_steps: Annotated[Whole, Field(ge=0)] = 0
    """Steps over which the learning rate rises from 0."""

    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    """Decoupled weight decay (Loshchilov and Hutter, 2019, arXiv 1711.05101)."""

    clip_norm: Annotated[Number, Field(gt=0)] | None = 1.0
    """Largest global gradient norm; longer gradients are scaled down."""

    seed: Annotated[Whole, Field(ge=0)] = 0
    """Seed of the data order and of new weights."""

    lora: Lora | None = None
    """Adapter settings for lora and qlora."""

    scratch: Scratch | None = None
    """Shape and tokenizer for scratch."""

    validation: Validation | None = None
    """Absent: no loss is measured while it trains, and the last weights are kept."""

    workers: Annotated[list[Workers], Field(min_length=1, max_length=MOST_GROUPS)] = Field(
        default_factory=lambda: [Workers(profile="local", count=1)]
    )
    """Training workers, unequal if need be."""

    elastic: Elastic | None = None
    """Absent: the run keeps the size it was given, whatever the priorities say."""

    priority: Whole = 0
    """Who gives way on shared machines: a run with elastic gives workers, down to minWorkers, to replicas whose
    serve.priority is larger, and takes them back when those are gone."""

    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    """When training state is saved."""

    activation_checkpointing: Flag = False
    """Whether each block's activations are computed again in the backward pass instead of kept: less memory, about a
    fifth more time (Chen et al., 2016, arXiv 1604.06174)."""

    engine: Literal["sharded", "fsdp2"] = "sharded"
    """sharded (state and batch cut in any shares), fsdp2 (PyTorch's own, for equal workers)."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise wrong_at("epochs", "stands beside steps; keep one of the two")
        return self

    @model_validator(mode="after")
    def _lora_settings_fit_the_method(self) -> Self:
        if self.lora is not None and self.method not in ("lora", "qlora"):
            raise wrong_at("lora", f"does not go with method: {self.method}; write method: lora, or remove lora")
        return self

    @model_validator(mode="after")
    def _scratch_settings_fit_the_method(self) -> Self:
        if self.scratch is not None and self.method != "scratch":
            raise wrong_at(
                "scratch", f"does not go with method: {self.method}; write method: scratch, or remove scratch"
            )
        return self

    @model_validator(mode="after")
    def _fsdp2_has_equal_workers(self) -> Self:
        if self.engine == "fsdp2":
            profiles = {group.profile for group in self.workers}
            speeds = {group.speed for group in self.workers}
            if len(profiles) > 1 or len(speeds) > 1:
                differ = "profiles" if len(profiles) > 1 else "speeds"
                raise wrong_at(
                    "engine",
                    f"fsdp2 shares evenly, and the workers have unequal {differ}; write engine: sharded, or one group "
                    f"of {self.worker_count} equal workers",
                )
        return self

    @model_validator(mode="after")
    def _a_token_for_each_worker(self) -> Self:
        if self.batch_tokens < self.worker_count:
            raise wrong_at(
                "batchTokens",
                f"is {self.batch_tokens}, fewer than the {self.worker_count} workers listed, so some would have "
                "nothing to do; raise batchTokens or list fewer workers",
            )
        return self

    @model_validator(mode="after")
    def _elastic_within_workers(self) -> Self:
        count = self.worker_count
        if self.elastic is not None and self.elastic.min_workers > count:
            raise wrong_at(
                "elastic.minWorkers",
                f"is {self.elastic.min_workers}, above the {count} workers listed; lower it or add workers",
            )
        return self

    @property
    def worker_count(self) -> int:
        """Workers over all groups."""
        return sum(group.count for group in self.workers)
