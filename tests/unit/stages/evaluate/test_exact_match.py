import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.stages.evaluate.exact_match import WORDS, matches, normalise

BLANKS = [chr(code) for code in range(0x3001) if chr(code).isspace()]
ANSWER = "The capital of France is Paris."


@pytest.mark.parametrize(
    "reference",
    [
        ANSWER + "\n",
        f"  {ANSWER}  ",
        ANSWER + "\r\n",
        ANSWER.replace("of France", "of\u00a0France"),
        ANSWER.replace(" ", " \t "),
        "\u2003\u3000" + ANSWER + "\u2028",
    ],
)
def test_blanks_decide_nothing(reference):
    assert matches(ANSWER, reference)
    assert matches(reference, ANSWER)


def test_both_ways_to_write_an_accent_are_one():
    assert matches("cafe\u0301", "café")


@pytest.mark.parametrize(
    "other", ["the capital of france is paris.", "The capital of France is Paris", "The capitalof France is Paris."]
)
def test_case_punctuation_and_missing_blanks_count(other):
    assert not matches(ANSWER, other)


def test_compatibility_forms_stay_different():
    assert not matches("x²", "x2")


def test_the_words_name_every_step():
    assert all(word in WORDS for word in ("NFC", "ends", "inner runs", "Case and punctuation are kept"))


@given(st.text())
def test_normalising_twice_equals_once(text):
    assert normalise(normalise(text)) == normalise(text)


@given(st.text(), st.text(st.sampled_from(BLANKS)), st.text(st.sampled_from(BLANKS)))
def test_blanks_around_any_text_change_nothing(text, before, behind):
    assert normalise(before + text + behind) == normalise(text)


@given(st.text())
def test_any_text_matches_its_canonically_equal_forms(text):
    assert matches(unicodedata.normalize("NFD", text), text)
    assert matches(unicodedata.normalize("NFC", text), text)
