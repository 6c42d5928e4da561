"""What the planner knows of a model, a data set and a machine: plain numbers that others measure.

The planner opens no file. `artifacts.describe` reads a model's headers, `data.samples` counts rows and tokens, and the
command line looks at the machine; the planner computes with what they found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


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

    stop_tokens: tuple[int, ...] = ()
    """Ids that end an answer."""

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
