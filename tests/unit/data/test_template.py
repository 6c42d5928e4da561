"""Chat templates: what they print, what the assistant wrote of it, and what a hostile one may cost."""

from __future__ import annotations

import time
from datetime import date

import pytest

from fastserve.artifacts.tokenizer import TokenizerFiles
from fastserve.data.template import assistant_spans, prints_tool_calls, render, turn_end
from fastserve.errors import DatasetInvalid, SourceInvalid

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello "},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
]


def test_a_span_holds_the_answer_and_its_end_token_but_not_the_line_break_after_it() -> None:
    text, spans = assistant_spans(CHATML, TALK)
    assert [text[start:end] for start, end in spans] == ["Hello <|im_end|>", "See you<|im_end|>"]


def test_without_an_end_token_the_answers_own_blanks_are_kept() -> None:
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    plain += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    text, spans = assistant_spans(plain, TALK)
    assert [text[start:end] for start, end in spans] == ["Hello ", "See you"]


def test_a_template_that_rewrites_earlier_turns_is_refused_by_name() -> None:
    forgets = CHATML.replace("m['content']", "(m['content'] if loop.last else '...')")
    with pytest.raises(DatasetInvalid, match="not prefix-consistent"):
        assistant_spans(forgets, TALK)


def test_an_assistant_that_speaks_first_is_refused() -> None:
    with pytest.raises(DatasetInvalid, match="begin with a user or system message"):
        assistant_spans(CHATML, TALK[1:])


def test_generation_marks_are_read_and_print_only_their_body() -> None:
    marked = CHATML.replace("{{ '<|im_start|>' + m", "{% generation %}{{ '<|im_start|>' + m", 1)
    marked = marked.replace("{% endfor %}", "{% endgeneration %}{% endfor %}", 1)
    assert render(marked, TALK) == render(CHATML, TALK)


def test_loop_controls_json_and_dates_work_as_in_transformers() -> None:
    template = "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
    assert render(template, TALK) == '{"role": "user", "content": "Hi"}'
    assert render("{{ strftime_now('%d %b %Y') }}", [], today=date(2026, 1, 1)) == "01 Jan 2026"
    assert render("{{ bos_token }}<&>", [], special={"bos_token": "<s>"}) == "<s><&>"


def test_the_templates_own_refusal_becomes_a_refusal_of_the_row() -> None:
    with pytest.raises(DatasetInvalid, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", TALK)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10**12 }}",
        "{{ [0] * 10**12 }}",
        "{{ 9 ** 9999999 }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(5000) %}{% for j in range(5000) %}{% endfor %}{% endfor %}",
        "{% for i in range(900000) %}{{ 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' }}{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% include 'x' %}",
        "{{ undefined_function() }}",
        "{% for %}",
        "x" * 300_000,
    ],
)
def test_a_hostile_or_broken_template_is_refused_quickly(template: str) -> None:
    began = time.process_time()
    with pytest.raises(SourceInvalid):
        render(template, TALK)
    assert time.process_time() - began < 60


def test_the_end_of_turn_is_the_templates_own_whatever_the_header_says(smol: TokenizerFiles) -> None:
    assert smol.chat_template is not None
    assert turn_end(smol.chat_template, smol.tokenizer(), special=smol.special) == 2
    ends_otherwise = CHATML.replace("<|im_end|>", "<|endoftext|>")
    assert turn_end(ends_otherwise, smol.tokenizer()) == 0


def test_a_template_without_an_end_of_turn_has_none(smol: TokenizerFiles) -> None:
    assert turn_end("{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}", smol.tokenizer()) is None
    assert turn_end("{{ nonsense() }}", smol.tokenizer()) is None


def test_whether_tool_calls_are_printed_is_tried_out(smol: TokenizerFiles) -> None:
    assert smol.chat_template is not None
    assert not prints_tool_calls(smol.chat_template)
    prints = "{% for m in messages %}{{ m['content'] }}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"
    assert prints_tool_calls(prints)
