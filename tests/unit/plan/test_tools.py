"""Parsers of tool calls and thinking: known families, and never a guess."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

from fastserve.plan import tools
from fastserve.plan.tools import reasoning_parser, tool_parser

LLAMA3 = '<|start_header_id|>... {"name": function name, "parameters": dictionary} ... {{ tool | tojson }}'
HERMES = "{% if tools %}<tools>{{ tool | tojson }}</tools> <tool_call>{% endif %}"


@pytest.mark.parametrize(
    ("architecture", "template", "parser"),
    [
        ("Qwen2ForCausalLM", HERMES, "hermes"),
        ("Qwen3ForCausalLM", HERMES, "hermes"),
        ("LlamaForCausalLM", HERMES, "hermes"),
        ("LlamaForCausalLM", LLAMA3, "llama3_json"),
        ("MistralForCausalLM", "[AVAILABLE_TOOLS]{{ tools }} [TOOL_CALLS]", "mistral"),
        ("Qwen3MoeForCausalLM", "tools <tool_call><function=name><parameter=x>", "qwen3_xml"),
        ("Glm4MoeForCausalLM", "tools <tool_call>{name}<arg_key>", "glm45"),
        ("DeepseekV3ForCausalLM", "tools <｜tool▁calls▁begin｜>", "deepseek_v3"),
        ("Phi3ForCausalLM", "<|tool|>{{ tools }}<|/tool|>", "phi4_mini_json"),
        ("GptOssForCausalLM", "tools", "openai"),
        ("GraniteForCausalLM", "tools <|tool_call|>", "granite"),
        ("LlamaForCausalLM", "{{ messages }}", ""),
        ("LlamaForCausalLM", "{{ tools }} in some way", ""),
        ("LlamaForCausalLM", None, ""),
        ("GptOssForCausalLM", "plain", ""),
    ],
)
def test_the_family_is_told_by_its_template(architecture, template, parser):
    assert tool_parser(architecture, template) == parser


@pytest.mark.parametrize(
    ("architecture", "template", "parser"),
    [
        ("Qwen3ForCausalLM", "{% if enable_thinking is false %}<think>\n\n</think>{% endif %}", "qwen3"),
        ("Qwen3ForCausalLM", "{% if '</think>' in content %}", ""),
        ("Qwen2ForCausalLM", "{{'<｜Assistant｜><think>\\n'}}", "deepseek_r1"),
        ("GptOssForCausalLM", None, "openai_gptoss"),
        ("LlamaForCausalLM", "{{ messages }}", ""),
        ("LlamaForCausalLM", None, ""),
    ],
)
def test_thinking_is_parsed_only_where_it_is_known(architecture, template, parser):
    assert reasoning_parser(architecture, template) == parser


def _registered(package, table):
    source = Path(str(find_spec("vllm").submodule_search_locations[0])) / package / "__init__.py"
    (known,) = [
        node.value
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == table
    ]
    return {ast.literal_eval(key) for key in known.keys}


def test_every_parser_is_one_of_vllm():
    named = {*tools._BY_ARCHITECTURE.values(), *(name for _, name in tools._BY_MARK), "phi4_mini_json"}
    assert named <= _registered("tool_parsers", "_TOOL_PARSERS_TO_REGISTER")
    thinking = {"openai_gptoss", "glm45", "qwen3", "granite", "seed_oss", "deepseek_r1"}
    assert thinking <= _registered("reasoning", "_REASONING_PARSERS_TO_REGISTER")
