"""What the planner knows of a model, a data set and a machine: plain numbers that others measure.

The planner opens no file. `artifacts.describe` reads a model's headers, `data.samples` counts rows and tokens, and the
command line looks at the machine; the planner computes with what they found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LOCAL = "local"
"""The profile that is discovered on a laptop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Shape and size of a model, from its configuration and its headers; no weight is read."""

    architecture: str
    """Class that computes it, such as `LlamaForCausalLM`."""

    parameters: int
    """Numbers in all tensors; a tied head counts once."""

    weight_bytes: int
    """Bytes of the weights in Hugging Face layout, as the source stage writes them."""

    layers: int
    hidden: int
    """Width of the residual stream."""

    intermediate: int
    """Inner width of a feed-forward block."""

    heads: int
    kv_heads: int
    """Key and value heads; fewer than `heads` with grouped-query attention."""

    head_dim: int
    vocab: int
    """Rows of the embedding."""

    max_context: int
    """Longest sequence that the model was made for, in tokens."""

    tied_embeddings: bool
    """Whether the output head is the embedding."""

    dtype: str
    """Type of most weights, in the words of serve.engine.dtype: bfloat16, float16 or float32."""

    layer_names: tuple[str, ...] = ()
    """Last parts of the names of the matrices in the blocks, such as `q_proj`, sorted; empty: they are not known."""

    layer_shapes: tuple[tuple[str, int, int], ...] = ()
    """Name, inputs and outputs of those that have one shape in all blocks; what is left out is not known."""

    stop_tokens: tuple[int, ...] = ()
    """Ids that end an answer."""

    heard_positions: int = 0
    """Positions of one piece of sound (30 s of Whisper's); 0: the model reads text."""

    tool_parser: str = ""
    """How the model writes a call of a tool, as vLLM names it; empty: it does not, or nobody knows."""

    reasoning_parser: str = ""
    """How it writes its thinking, as vLLM names it; empty: it does not, or nobody knows."""

    most_context: int = 0
    """Longest sequence that an engine computes with it: `max_context`, or more where its positions are stretched (RoPE
    scaling). 0: its config does not say."""

    warnings: tuple[str, ...] = ()
    """What a reader of the plan should know: a wrong end token that was put right, a template that is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFacts:
    """What training would see of a data set."""

    rows: int
    used: int
    """Rows that train."""

    left_out: Mapping[str, int] = field(default_factory=dict)
    """Rows that do not train, by cause."""

    truncated: int = 0
    """Rows cut at train.maxLength."""

    tokens: int
    """Tokens in all used rows, after the cut."""

    trained_tokens: int
    """Tokens whose loss counts: assistant turns of chat rows, everything of text rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One machine."""

    cpus: int
    memory_bytes: int
    """Main memory that may be used."""

    accelerators: int = 0
    accelerator_memory_bytes: int = 0
    """Memory of one accelerator."""

    accelerator_type: str = ""
    """Its name, such as L4; empty where nobody knows."""


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """One worker as the planner sees it."""

    name: str
    profile: str
    """Hardware profile, as in train.workers."""

    tokens_per_s: float
    """Speed in forward and backward, above 0: measured, or assumed before anything has run."""

    memory_bytes: int
    """Memory that training may use, its process included."""

    most_tokens: int = 0
    """Tokens beyond which a larger micro-batch is no faster; 0: memory alone decides."""


@dataclass(frozen=True, slots=True)
class TrainingFacts:
    """What a model needs in training, whoever holds it. Bytes of gathered things are in the computing precision."""

    state_bytes: int
    """Trained numbers x 16: fp32 master, gradient and AdamW's two moments. Cut by the state shares."""

    frozen_bytes: int
    """Weights that do not train; whole on every worker where all have the room, else cut like the state."""

    unit_bytes: int
    """The largest block's trained weights, gathered."""

    root_bytes: int
    """Trained weights outside the blocks (embedding, head, last norm), gathered."""

    activation_bytes_per_token: float
    process_bytes: int
    """One worker's process without any of this."""

    longest_tokens: int
    """Longest sample: no micro-batch is smaller than it."""

    copy_bytes: int = 0
    """What the writer of checkpoints keeps beside it all: 12 bytes a trained number where workers compute in main
    memory. Cut by the state shares."""

    loaded_bytes: int = 0
    """The whole model as a worker loads it before its state is cut; 0 where that is not in the memory that is planned,
    as with accelerators."""

    working_bytes: int = 0
    """All trained weights in the computing precision: kept gathered where there is one worker, or few of them beside
    frozen ones."""

    frozen_unit_bytes: int = 0
    """The largest block's frozen weights; gathered only where the frozen weights are cut."""

    frozen_root_bytes: int = 0
    """The same of what is outside the blocks."""

    ways: tuple[str, ...] = ("lower train.maxLength", "write train.activationCheckpointing: true")
    """What makes it smaller when it does not fit, in the manifest's words."""
