"""How a model writes a call of a tool, and its thinking: told from its architecture and its chat template.

The engine turns such text into the fields of an answer with a parser of its own for each family; without one, calls
arrive as plain text. A family that is not known here gets none, since a wrong parser would spoil plain answers;
`serve.engine.extraArgs` may name one (`--tool-call-parser`, `--reasoning-parser`).
"""

from __future__ import annotations

_BY_ARCHITECTURE = {
    "GptOssForCausalLM": "openai",
    "Llama4ForConditionalGeneration": "llama4_pythonic",
    "GraniteForCausalLM": "granite",
    "GraniteMoeForCausalLM": "granite",
    "GraniteMoeHybridForCausalLM": "granite4",
    "JambaForCausalLM": "jamba",
}
"""Where the architecture alone tells, if its template speaks of tools."""

_BY_MARK = (
    ("<minimax:tool_call>", "minimax_m2"),
    ("<seed:tool_call>", "seed_oss"),
    ("<|tool_calls_section_begin|>", "kimi_k2"),
    ("<｜tool▁calls▁begin｜>", "deepseek_v3"),
    ("<arg_key>", "glm45"),
    ("<function=", "qwen3_xml"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|action_start|>", "internlm"),
    ("<tool_call>", "hermes"),
    ("<|python_tag|>", "llama3_json"),
)
"""What a template writes around a call, and the parser that reads it; the first that is found counts."""

_LLAMA3 = ("LlamaForCausalLM", "MllamaForConditionalGeneration")
_PHI = "Phi3ForCausalLM"


def tool_parser(architecture: str, template: str | None) -> str:
    """Name of vLLM's parser of tool calls (`--tool-call-parser`); empty for a family that is not known.

    template: the chat template; None without one.
    """
    if template is None or "tool" not in template:
        return ""
    if architecture in _BY_ARCHITECTURE:
        return _BY_ARCHITECTURE[architecture]
    found = next((name for mark, name in _BY_MARK if mark in template), "")
    if not found and architecture == _PHI and "<|tool|>" in template:
        return "phi4_mini_json"
    if not found and architecture in _LLAMA3 and "<|start_header_id|>" in template and '"parameters"' in template:
        return "llama3_json"
    return found


def reasoning_parser(architecture: str, template: str | None) -> str:
    """Name of vLLM's parser of thinking (`--reasoning-parser`); empty for a family that is not known."""
    if architecture == "GptOssForCausalLM":
        return "openai_gptoss"
    if template is None:
        return ""
    if architecture.startswith("Glm4") and "enable_thinking" in template:
        return "glm45"
    if architecture.startswith("Qwen3") and "enable_thinking" in template:
        return "qwen3"
    if architecture.startswith("Granite") and "thinking" in template and "</think>" not in template:
        return "granite"
    if "<seed:think>" in template:
        return "seed_oss"
    begins = any(mark in template for mark in ("<｜Assistant｜><think>", "<｜Assistant｜>' + '<think>"))
    return "deepseek_r1" if begins else ""
