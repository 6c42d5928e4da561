"""What a LoRA adapter is to the engine (Hu et al., 2021, arXiv 2106.09685): low-rank matrices of a known rank, and
nothing else.

All of it stands in adapter_config.json and in the header of the weights, so it is known before anything runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastserve.errors import SourceInvalid
from fastserve.plan.facts import ModelFacts

LIMITS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks that vLLM 0.32 can be started with (`--max-lora-rank`)."""

_PREFIX = "base_model.model."
_MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_LAYER = re.compile(r"\.(\d+)\.")
_MERGE = "merge it into the model (peft: merge_and_unload) and serve the result as a model of its own"
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "biases of the low-rank matrices",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "target_parameters": "parameters outside modules",
    "trainable_token_indices": "trained tokens",
}
"""Keys of adapter_config.json that change what an adapter computes, and that vLLM 0.32 does not know."""

_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Of init_lora_weights: what leaves the base model's weights alone."""


_READERS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj")
_WRITERS = ("o_proj", "down_proj")
"""Matrices that read or write the residual stream in every architecture that has them."""

# fmt: off
WITHOUT_LORA = frozenset([
    "BailingMoeV2_5ForCausalLM", "BailingMoeV3ForCausalLM", "BloomForCausalLM", "Cohere2MoeForCausalLM",
    "DbrxForCausalLM", "DeepseekV32ForCausalLM", "DeepseekV4ForCausalLM", "FalconForCausalLM",
    "FalconMambaForCausalLM", "GPT2LMHeadModel", "GPTJForCausalLM", "Gemma3nForCausalLM", "Glm5NextForCausalLM",
    "HCXVisionV2ForCausalLM", "HYV4ForCausalLM", "HrmTextForCausalLM", "IQuestLoopCoderForCausalLM",
    "InklingForCausalLM", "InklingForConditionalGeneration", "KimiLinearForCausalLM", "Mamba2ForCausalLM",
    "MambaForCausalLM", "MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM", "MiniMaxM3SparseForCausalLM",
    "OrionForCausalLM", "Qwen4ExpForCausalLM", "StableLmForCausalLM", "Step1ForCausalLM", "Step3TextForCausalLM",
    "Step3p5ForCausalLM", "Zamba2ForCausalLM",
])
# fmt: on
"""Architectures that vLLM 0.32 generates text with and applies no adapters to."""


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """One adapter, from its configuration and its header; no weight is read."""

    rank: int
    """Largest rank of its matrices."""

    modules: tuple[str, ...]
    """Last parts of the names of what it changes, such as `q_proj`, sorted."""

    size_bytes: int
    """Bytes of its weights."""


def adapter_facts(config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], size_bytes: int) -> AdapterFacts:
    """Facts of an adapter that the engine can apply.

    config: of adapter_config.json. tensors: shape of each tensor by name.
    Raises SourceInvalid, with what to do, for anything else than low-rank matrices of the rank that is said.
    """
    _check_config(config)
    matrices, others = _split(tensors)
    if others:
        raise SourceInvalid(_not_low_rank(others, config))
    if config.get("modules_to_save"):
        raise SourceInvalid(
            f"adapter_config.json has modules_to_save: {_listed(config['modules_to_save'])}, whole matrices that the "
            f"engine cannot apply beside the model's own; {_MERGE}"
        )
    if not matrices:
        raise SourceInvalid("holds no low-rank matrices (lora_A, lora_B); save it again with peft's save_pretrained")
    found = 0
    for module, sides in sorted(matrices.items()):
        found = max(found, _rank_of(module, sides, config))
    largest = max([int(config["r"]), *config.get("rank_pattern", {}).values(), found])
    if largest > LIMITS[-1]:
        raise SourceInvalid(f"has rank {largest}; the engine applies ranks up to {LIMITS[-1]}: {_MERGE}")
    return AdapterFacts(largest, tuple(sorted({module.rpartition(".")[2] for module in matrices})), size_bytes)


def check_fit(tensors: Mapping[str, tuple[int, ...]], facts: ModelFacts) -> None:
    """Raise SourceInvalid that names the tensor, unless every matrix has its place in the model.

    The engine does not look: matrices that are too small would be taken as the corner of larger ones, and spoil every
    answer. Where the model's own shapes are not known, the side that reads or writes the residual stream is compared.
    """
    if facts.architecture in WITHOUT_LORA:
        raise SourceInvalid(f"the engine applies no adapters to {facts.architecture}; {_MERGE}")
    shapes = {layer: (inputs, outputs) for layer, inputs, outputs in facts.layer_shapes}
    for module, sides in sorted(_split(tensors)[0].items()):
        name, kind = f"{_PREFIX}{module}.lora_A.weight", module.rpartition(".")[2]
        if facts.layer_names and kind not in facts.layer_names:
            known = ", ".join(facts.layer_names)
            raise SourceInvalid(f"tensor {name} is for '{kind}', and the model's blocks have only {known}; {_MERGE}")
        layer = _LAYER.search(f".{module}.")
        if layer is not None and int(layer[1]) >= facts.layers:
            raise SourceInvalid(
                f"tensor {name} is for layer {layer[1]}, and the model has {facts.layers}: it was trained on another "
                "model; serve it beside that one"
            )
        reads, writes = sides["A"][1], sides["B"][0]
        wanted = shapes.get(kind)
        if wanted is None and kind in (*_READERS, *_WRITERS):
            wanted = (facts.hidden, writes) if kind in _READERS else (reads, facts.hidden)
        if wanted is not None and (reads, writes) != wanted:
            raise SourceInvalid(
                f"tensor {name} and its lora_B make {writes} numbers of {reads}, and the model's {kind} makes "
                f"{wanted[1]} of {wanted[0]}: they were trained on another model; serve them beside that one"
            )


def rank_limit(ranks: Iterable[int]) -> int:
    """The smallest rank that the engine can be started with and that holds all; 0: no adapters."""
    largest = max(ranks, default=0)
    return 0 if largest == 0 else next(limit for limit in LIMITS if limit >= largest)


def _check_config(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise SourceInvalid(f"adapter_config.json has peft_type: {kind}; the engine applies LORA only: {_MERGE}")
    rank = config.get("r")
    if type(rank) is not int or rank < 1:
        raise SourceInvalid(f"adapter_config.json has r: {rank!r:.40}; it must be a whole number above zero")
    pattern = config.get("rank_pattern") or {}
    if not isinstance(pattern, Mapping) or any(type(value) is not int or value < 1 for value in pattern.values()):
        raise SourceInvalid("adapter_config.json has a rank_pattern that is no mapping to whole numbers above zero")
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise SourceInvalid(f"adapter_config.json has lora_alpha: {alpha!r:.40}; it must be a number")
    if config.get("target_modules") is None:
        raise SourceInvalid("adapter_config.json has no target_modules; save it again with peft's save_pretrained")
    if config.get("bias", "none") != "none":
        raise SourceInvalid(f"adapter_config.json has bias: {config['bias']}, which the engine cannot apply; {_MERGE}")
    for key, what in _UNSUPPORTED.items():
        if config.get(key):
            raise SourceInvalid(f"adapter_config.json has {key}: the engine cannot apply {what}; {_MERGE}")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
        raise SourceInvalid(
            f"adapter_config.json has init_lora_weights: {start}, which changes the base model's own weights; {_MERGE}"
        )


def _split(tensors: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, dict[str, tuple[int, ...]]], list[str]]:
    """Shapes of the low-rank matrices by module and side (A, B), and the names of all other tensors."""
    matrices: dict[str, dict[str, tuple[int, ...]]] = {}
    others = []
    for name, shape in tensors.items():
        match = _MATRIX.fullmatch(name.removeprefix(_PREFIX))
        if match is None or len(shape) != 2:
            others.append(name)
        else:
            matrices.setdefault(match["module"], {})[match["side"]] = shape
    return matrices, sorted(others)


def _not_low_rank(others: list[str], config: Mapping[str, Any]) -> str:
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    saved = config.get("modules_to_save")
    why = f" (modules_to_save: {_listed(saved)})" if saved else ""
    return (
        f"tensor {others[0]}{more} is no low-rank matrix of a linear layer{why}, and the engine cannot apply it beside "
        f"the model's own; {_MERGE}"
    )


def _rank_of(module: str, sides: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> int:
    """Rank of the matrices of one module, which must be what the configuration says."""
    if sides.keys() != {"A", "B"}:
        missing = "A" if "A" not in sides else "B"
        raise SourceInvalid(f"tensor {_PREFIX}{module}.lora_{missing}.weight is missing; save the adapter again")
    (rank, _), (_, columns) = sides["A"], sides["B"]
    name = f"tensor {_PREFIX}{module}.lora_A.weight"
    if rank != columns:
        raise SourceInvalid(f"{name} has rank {rank} and its lora_B has rank {columns}; save the adapter again")
    said, where = _said_rank(module, config)
    if rank != said:
        raise SourceInvalid(
            f"adapter_config.json says {where}: {said}, but {name} has rank {rank}; write {where}: {rank} if the "
            "matrices are right (then lora_alpha must fit them too), or fetch the adapter again"
        )
    return rank


def _said_rank(module: str, config: Mapping[str, Any]) -> tuple[int, str]:
    """The rank that adapter_config.json gives a module, and the key that says so; peft takes the first match."""
    for pattern, rank in (config.get("rank_pattern") or {}).items():
        try:
            matched = re.fullmatch(rf"(.*\.)?({pattern})", module)
        except re.error:
            raise SourceInvalid(f"adapter_config.json has the rank_pattern {pattern!r}, which is no pattern") from None
        if matched:
            return int(rank), f"rank_pattern[{pattern}]"
    return int(config["r"]), "r"


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
