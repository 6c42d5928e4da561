"""What of an adapter is known before anything runs, and what is refused by name."""

from __future__ import annotations

import ast
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.errors import SourceInvalid
from fastserve.plan.lora import LIMITS, WITHOUT_LORA, adapter_facts, check_fit, rank_limit

Q = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}


def matrices(rank=8, module=Q, reads=576, writes=576):
    return {f"{module}.lora_A.weight": (rank, reads), f"{module}.lora_B.weight": (writes, rank)}


def refusal(config=None, tensors=None):
    with pytest.raises(SourceInvalid) as caught:
        adapter_facts(CONFIG | (config or {}), matrices() if tensors is None else tensors, 1)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_an_adapter_is_its_rank_and_what_it_changes():
    found = adapter_facts(CONFIG, matrices() | matrices(module=Q.replace("q_proj", "v_proj")), 512)
    assert (found.rank, found.modules, found.size_bytes) == (8, ("q_proj", "v_proj"), 512)


@given(st.lists(st.integers(1, 512), max_size=20))
def test_the_limit_is_the_smallest_that_holds_all(ranks):
    limit = rank_limit(ranks)
    if not ranks:
        assert limit == 0
    else:
        assert limit in LIMITS
        assert max(ranks) <= limit
        assert all(smaller < max(ranks) for smaller in LIMITS if smaller < limit)


@given(st.lists(st.integers(1, 512), min_size=1, max_size=5), st.integers(1, 512))
def test_one_more_within_the_limit_changes_nothing(ranks, one):
    limit = rank_limit(ranks)
    assert rank_limit([*ranks, one]) == (limit if one <= limit else rank_limit([one]))


def test_the_limits_are_those_of_vllm():
    config = Path(str(find_spec("vllm").submodule_search_locations[0])) / "config" / "lora.py"
    (line,) = [line for line in config.read_text().splitlines() if line.startswith("MaxLoRARanks = Literal")]
    assert tuple(ast.literal_eval(line.partition("Literal")[2])) == LIMITS


def test_architectures_without_adapters_are_those_of_vllm():
    models = Path(str(find_spec("vllm").submodule_search_locations[0])) / "model_executor" / "models"
    bases: dict[str, list[str]] = {}
    for file in models.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]

    def applies(name, seen=()):
        return name == "SupportsLoRA" or any(
            applies(base, (*seen, name)) for base in bases.get(name, ()) if base not in seen
        )

    registry = ast.parse((models / "registry.py").read_text())
    (known,) = [
        node.value
        for node in registry.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_TEXT_GENERATION_MODELS"
    ]
    classes = {
        ast.literal_eval(key): ast.literal_eval(value)[1] for key, value in zip(known.keys, known.values, strict=True)
    }
    assert {name for name, made in classes.items() if not applies(made)} == WITHOUT_LORA


def test_a_whole_matrix_is_refused_by_its_name():
    message = refusal({"modules_to_save": ["lm_head"]}, matrices() | {"base_model.model.lm_head.weight": (4, 576)})
    for part in ("tensor base_model.model.lm_head.weight", "modules_to_save: lm_head", "merge it into the model"):
        assert part in message


def test_a_rank_that_is_not_the_one_that_is_said_names_both():
    message = refusal({"r": 48})
    assert "r: 48" in message
    assert "has rank 8" in message


def test_a_pattern_says_another_rank_for_some():
    tensors = matrices() | matrices(rank=32, module=Q.replace("q_proj", "v_proj"))
    assert adapter_facts(CONFIG | {"rank_pattern": {"v_proj": 32}}, tensors, 1).rank == 32
    assert "rank_pattern[v_proj]: 16" in refusal({"rank_pattern": {"v_proj": 16}}, tensors)


@pytest.mark.parametrize(
    ("config", "tensors", "word"),
    [
        ({"modules_to_save": ["lm_head"]}, None, "modules_to_save: lm_head"),
        ({"peft_type": "IA3"}, None, "peft_type: IA3"),
        ({"r": 0}, None, "r: 0"),
        ({"r": True}, None, "r: True"),
        ({"r": "8"}, None, "r: '8'"),
        ({"lora_alpha": None}, None, "lora_alpha: None"),
        ({"lora_alpha": float("nan")}, None, "lora_alpha: nan"),
        ({"target_modules": None}, None, "target_modules"),
        ({"bias": "all"}, None, "bias: all"),
        ({"use_dora": True}, None, "use_dora"),
        ({"init_lora_weights": "pissa"}, None, "init_lora_weights: pissa"),
        ({"rank_pattern": {"(": 4}}, None, "rank_pattern"),
        ({"rank_pattern": {"q": "4"}}, None, "rank_pattern"),
        ({}, {}, "no low-rank matrices"),
        ({}, {f"{Q}.lora_A.weight": (8, 576)}, "lora_B.weight is missing"),
        ({}, {f"{Q}.lora_A.weight": (8, 576), f"{Q}.lora_B.weight": (576, 4)}, "its lora_B has rank 4"),
        ({}, {f"{Q}.lora_A.weight": (8, 576, 1), f"{Q}.lora_B.weight": (576, 8)}, "lora_A.weight"),
        ({}, matrices() | {"base_model.model.model.embed_tokens.lora_embedding_A": (8, 9)}, "lora_embedding_A"),
        ({"r": 513}, matrices(rank=513), "rank 513"),
    ],
)
def test_what_the_engine_cannot_apply_is_refused(config, tensors, word):
    assert word in refusal(config, tensors)


def test_an_adapter_of_another_model_is_refused(smol):
    check_fit(matrices(), smol)
    for tensors, word in (
        (matrices(reads=960), "makes 576 of 576"),
        (matrices(module=Q.replace("q_proj", "o_proj"), writes=960), "makes 576 of 576"),
        (matrices(module=Q.replace("layers.0", "layers.30")), "layer 30"),
    ):
        with pytest.raises(SourceInvalid, match=word):
            check_fit(tensors, smol)


def test_with_the_models_own_shapes_both_sides_are_compared(smol):
    known = replace(smol, layer_shapes=(("q_proj", 576, 512),))
    check_fit(matrices(writes=512), known)
    with pytest.raises(SourceInvalid, match="makes 512 of 576"):
        check_fit(matrices(writes=576), known)


def test_an_adapter_of_a_layer_that_is_not_there_is_refused(smol):
    named = replace(smol, layer_names=("k_proj", "q_proj"))
    check_fit(matrices(), named)
    with pytest.raises(SourceInvalid, match="'w_pack'"):
        check_fit(matrices(module=Q.replace("q_proj", "w_pack")), named)
    with pytest.raises(SourceInvalid, match="GPT2LMHeadModel"):
        check_fit(matrices(), replace(smol, architecture="GPT2LMHeadModel"))
