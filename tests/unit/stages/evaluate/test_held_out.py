import pytest

from fastserve.errors import DatasetInvalid
from fastserve.stages.evaluate.held_out import BEYOND_MAX_ROWS, held_out

QUESTION = "what is the capital of France"


def test_only_what_the_assistant_wrote_counts(files, write_rows):
    found = held_out(write_rows([QUESTION, "Paris"]), files, context=50, max_rows=10)
    (row,) = found.rows
    tokens = files.tokenizer()
    assert [tokens.id_to_token(row.ids[place]) for place in row.positions] == ["Paris", "<end>"]
    assert tokens.id_to_token(row.prompt[-1]) == "<assistant>"
    assert row.has_prompt
    assert (found.tokens, found.distinct_rows) == (2, 1)


def test_rows_beyond_max_rows_are_left_out_evenly_and_counted(files, write_rows):
    path = write_rows(*([QUESTION, f"Paris {'yes ' * n}"] for n in range(10)))
    found = held_out(path, files, context=50, max_rows=5)
    assert [row.place for row in found.rows] == [f"rows.jsonl:{line}" for line in (1, 3, 5, 7, 9)]
    assert found.excluded == {BEYOND_MAX_ROWS: 5}


def test_a_row_whose_answer_lies_beyond_context_is_left_out_and_counted(files, write_rows):
    path = write_rows([QUESTION, "Paris"], [QUESTION + " the" * 30, "Paris"], [QUESTION, "yes " * 30])
    found = held_out(path, files, context=20, max_rows=10)
    assert [row.place for row in found.rows] == ["rows.jsonl:1", "rows.jsonl:3"]
    assert found.excluded == {"no assistant token within context": 1}
    assert found.truncated == 1
    assert max(len(row.ids) for row in found.rows) == 20


def test_nothing_within_context_is_refused_by_name(files, write_rows):
    with pytest.raises(DatasetInvalid, match="context"):
        held_out(write_rows([QUESTION + " the" * 30, "Paris"]), files, context=20, max_rows=10)


def test_copies_of_a_row_are_one_distinct_row(files, write_rows):
    found = held_out(write_rows(*[[QUESTION, "Paris"]] * 4, [QUESTION, "Rome"]), files, context=50, max_rows=10)
    assert (len(found.rows), found.distinct_rows) == (5, 2)


def test_plain_text_has_no_prompt_to_answer(files, tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("what is the capital\n")
    (row,) = held_out(path, files, context=50, max_rows=10).rows
    assert list(row.positions) == [1, 2, 3]
    assert not row.has_prompt
