"""The serve stage: how a model answers requests."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fastserve.spec.section import Bytes, Duration, Flag, Name, Number, Positive, Section, Share, Whole, wrong_at
from fastserve.spec.source import SourceRef

Percent = Annotated[Whole, Field(ge=1, le=100)]


class Replicas(Section):
    """How many replicas there may be: promises, not hints."""

    min: Annotated[Whole, Field(ge=0)] = 1
    """Replicas kept when nobody is asking; with 0 the first request waits for a cold start."""

    max: Positive = 1
    """Replicas allowed when everybody is."""

    idle: Annotated[Duration, Field(gt=0)] = 300.0
    """With `min: 0`, how long nobody must have asked before the last replica goes."""

    @model_validator(mode="before")
    @classmethod
    def _min_alone_raises_max(cls, value: object) -> object:
        """`{min: 3}` means exactly 3: max follows min when it is left out."""
        if not isinstance(value, dict) or value.get("max") is not None:
            return value
        least = value.get("min")
        whole = isinstance(least, int) or (isinstance(least, float) and least.is_integer())
        return {**value, "max": least} if least is not None and whole and least > 1 else value

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise wrong_at("min", f"is {self.min}, above max, which is {self.max}; lower min or raise max")
        return self


class Target(Section):
    """What autoscaling keeps."""

    ttft: Annotated[Duration, Field(gt=0)] | None = None
    """Time to first token, such as 500ms."""

    queue: Annotated[Number, Field(gt=0)] = 4
    """Requests waiting or running for each replica."""


class SchedulerOptions(Section):
    """Settings of `scheduler: mlfq`."""

    levels: Annotated[Whole, Field(ge=2, le=8)] = 3
    """Levels of the queue. Few are better: with many, long requests take turns and all of them end late."""

    quantum: Positive | None = None
    """Tokens that an answer may have before it sinks from the first level; four times as many at each next one.
    Absent: every replica learns it from its own answers."""

    starvation: Annotated[Duration, Field(gt=0)] = 30.0
    """Longest time without a token before a waiting request goes back to the first level."""


class Engine(Section):
    """Settings of the vLLM engine. What is left out is derived from the model, the memory plan and the profile."""

    max_sequences: Positive | None = None
    """Most requests in one batch."""

    kv_cache: Annotated[Bytes, Field(gt=0)] | None = None
    """Memory of the KV cache of one replica, such as 1GiB."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of weights that are not quantised."""

    tensor_parallel: Positive | None = None
    """Accelerators that share one replica."""

    prefix_caching: Flag = True
    """Whether the KV cache of common prefixes is kept."""

    enforce_eager: Flag | None = None
    """Whether graph capture and compilation are left out; on CPU they are."""

    extra_args: list[str] = Field(default_factory=list)
    """Further command-line arguments of vLLM, as they are: `["--max-num-batched-tokens=16384"]`."""


class Rollout(Section):
    """How a new revision takes over."""

    steps: Annotated[list[Percent], Field(min_length=1, max_length=100)] = Field(default_factory=lambda: [100])
    """Percent of traffic, step by step; the last is 100."""

    hold: Duration = 60.0
    """How long each step is watched."""

    max_error_rate: Annotated[Share, Field(le=1)] = 0.01
    """Largest share of failed requests."""

    max_ttft_increase: Share = 0.2
    """Most that time to first token may rise against the old revision."""

    @model_validator(mode="after")
    def _rising_to_all(self) -> Self:
        if list(self.steps) != sorted(set(self.steps)) or self.steps[-1] != 100:
            raise wrong_at(
                "steps", f"is {self.steps}; write rising percentages that end with 100, such as [5, 25, 100]"
            )
        return self


class Adapter(Section):
    """A LoRA adapter served beside the model under a name of its own."""

    name: Name
    """Name of the adapter; clients ask for it as the model."""

    source: SourceRef
    """Folder with adapter_config.json and adapter_model.safetensors."""


class Serve(Section):
    """How a model answers requests."""

    task: Literal["generate", "embed", "score", "transcribe"] = "generate"
    """generate (chat and completions), embed (vectors), score (ranking), transcribe (speech to text)."""

    profiles: Annotated[list[Name], Field(min_length=1)] = Field(default_factory=lambda: ["local"])
    """Hardware profiles in order of preference; one endpoint over all."""

    replicas: Replicas = Field(default_factory=Replicas)
    """Bounds of autoscaling."""

    priority: Whole = 0
    """Who gives way on shared machines: for a replica that finds no machine, training runs with a smaller
    train.priority and with elastic give up a worker. Between requests, `scheduler` decides."""

    target: Target = Field(default_factory=Target)
    """What autoscaling keeps, as far as `replicas` allows."""

    scheduler: Literal["fcfs", "priority", "mlfq"] = "fcfs"
    """Order of requests in a replica: first come first served, by priority, or skip-join multi-level feedback queue."""

    scheduler_options: SchedulerOptions | None = None
    """Settings of `scheduler: mlfq`; absent: its defaults."""

    context: Positive | None = None
    """Longest prompt and answer together, in tokens; absent: what the model was made for, as far as memory allows."""

    engine: Engine = Field(default_factory=Engine)
    """Typed vLLM settings."""

    rollout: Rollout | None = None
    """Absent: a new revision takes all traffic when it is ready."""

    adapters: list[Adapter] = Field(default_factory=list)
    """LoRA adapters served beside the model."""

    stream_limit: Annotated[Duration, Field(gt=0)] = 600.0
    """Longest answer in time; replicas that are taken away wait this long for their streams."""

    @model_validator(mode="after")
    def _options_belong_to_mlfq(self) -> Self:
        if self.scheduler != "mlfq" and self.scheduler_options is not None:
            message = f"belongs to mlfq, and scheduler is {self.scheduler}; remove schedulerOptions"
            raise wrong_at("schedulerOptions", message)
        return self

    @model_validator(mode="after")
    def _mlfq_has_a_cache_to_resume_from(self) -> Self:
        if self.scheduler == "mlfq" and not self.engine.prefix_caching:
            raise wrong_at(
                "scheduler",
                "is mlfq, which resumes requests from the prefix cache; remove engine.prefixCaching: false, "
                "or write fcfs",
            )
        return self

    @model_validator(mode="after")
    def _adapters_have_names_of_their_own(self) -> Self:
        names = [adapter.name for adapter in self.adapters]
        if len(set(names)) != len(names):
            raise wrong_at("adapters", "has two adapters of one name; rename one")
        return self
