"""The compress stage: steps in order, each making the model smaller."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fastserve.spec.section import Number, Positive, Section, wrong_at
from fastserve.spec.source import SourceRef

Kept = Annotated[Number, Field(gt=0, le=1)]


class Recover(Section):
    """Training after pruning, with the unpruned model as teacher."""

    tokens: Positive
    """Tokens to train on."""


class Prune(Section):
    """Remove whole layers and inner width, least important first."""

    layers: Kept | None = None
    """Share of the layers that stays."""

    width: Kept | None = None
    """Share of each block's inner width that stays."""

    recover: Recover | None = None
    """Training that wins back what pruning lost."""

    @model_validator(mode="after")
    def _prunes_something(self) -> Self:
        if self.layers is None and self.width is None:
            raise ValueError("prunes nothing; give layers or width, such as layers: 0.75")
        return self


class Calibration(Section):
    """Rows that quantisation measures activations on, in the model's chat template."""

    data: SourceRef | None = None
    """Rows as in train.dataset; absent: the rows of train.dataset."""

    rows: Positive = 64
    """Most rows used."""

    max_length: Positive = 512
    """Longest row in tokens."""


class Quantize(Section):
    """Store weights (and activations) in fewer bits."""

    format: Literal["int8", "int4", "fp8"]
    """int8 (W8A8: weights and activations), int4 (W4A16: weights alone), fp8."""

    method: Literal["auto", "roundToNearest", "gptq", "smoothquantGptq"] = "auto"
    """auto: gptq where there are rows to calibrate on, else roundToNearest. GPTQ: Frantar et al., 2022,
    arXiv 2210.17323; SmoothQuant: Xiao et al., 2022, arXiv 2211.10438."""

    group_size: Positive | None = None
    """Weights that share a scale, int4 only; absent: the largest legal one up to 128."""

    calibration: Calibration = Field(default_factory=Calibration)
    """What gptq calibrates on."""

    @model_validator(mode="after")
    def _groups_are_for_int4(self) -> Self:
        if self.group_size is not None and self.format != "int4":
            raise wrong_at("groupSize", f"is for format: int4, and format is {self.format}; remove groupSize")
        return self


class CompressStep(Section):
    """One step; exactly one of its keys is given."""

    prune: Prune | None = None
    """Remove layers or width."""

    quantize: Quantize | None = None
    """Fewer bits."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.prune is None) == (self.quantize is None):
            raise ValueError("is one step: write either prune or quantize, and another list item for the other")
        return self
