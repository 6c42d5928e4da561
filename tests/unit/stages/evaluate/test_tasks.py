import json
from pathlib import Path

import pytest

from fastserve.artifacts.tokenizer import TokenizerFiles
from fastserve.errors import DatasetInvalid
from fastserve.stages.evaluate.exact_match import WORDS
from fastserve.stages.evaluate.tasks import questions, task_lines, task_metrics, task_report

CASES = Path(__file__).parents[3] / "data" / "cases"
QUESTION = "what is the capital of France"


def asked(path, files, context=100):
    return questions(path, files, context=context, max_tokens=8)


def test_the_last_turn_is_the_reference_and_all_before_it_the_prompt(files, write_rows):
    (question,) = asked(write_rows(["yes", "no", QUESTION, "Paris"]), files).questions
    assert question.reference == "Paris"
    assert files.tokenizer().decode(list(question.prompt)).split() == (
        f"<user> yes <end> <assistant> no <end> <user> {QUESTION} <end> <assistant>".split()
    )


def test_a_row_without_an_answer_at_its_end_is_refused_with_its_line(files, write_rows):
    path = write_rows([QUESTION, "Paris"], [QUESTION, "Paris", "yes"])
    with pytest.raises(DatasetInvalid, match=r"rows\.jsonl:2: .*assistant"):
        asked(path, files)


def test_a_prompt_without_room_for_its_answer_is_left_out_and_counted(files, write_rows):
    path = write_rows([QUESTION, "Paris"], [QUESTION + " the" * 30, "Paris"])
    found = asked(path, files, context=30)
    assert [question.place for question in found.questions] == ["rows.jsonl:1"]
    assert sum(found.excluded.values()) == 1
    with pytest.raises(DatasetInvalid, match=r"evaluate\.context"):
        asked(write_rows([QUESTION + " the" * 30, "Paris"], name="long.jsonl"), files, context=30)


def test_a_model_without_a_template_cannot_be_asked(files, write_rows):
    bare = TokenizerFiles(files.tokenizer_json, None)
    with pytest.raises(DatasetInvalid, match="chat template"):
        asked(write_rows([QUESTION, "Paris"]), bare)


def test_blanks_in_the_reference_change_no_score(files):
    answer = "The capital of France is Paris."
    clean, dirty = (asked(CASES / f"09-task-{name}.jsonl", files) for name in ("clean", "dirty"))
    assert {question.reference for question in dirty.questions} != {question.reference for question in clean.questions}
    for predictions in ([answer] * 4, [answer, "Paris", answer + "\n", "Rome"]):
        scores = [task_metrics(rows, predictions, predictions) for rows in (clean, dirty)]
        assert scores[0]["candidate"] == scores[1]["candidate"]
        assert scores[0]["drop"] == scores[1]["drop"]
    assert task_metrics(clean, [answer] * 4, None)["candidate"]["value"] == 1.0


def test_without_a_parent_nothing_is_compared(files, write_rows):
    rows = asked(write_rows([QUESTION, "Paris"], [QUESTION, "Paris"]), files)
    found = task_metrics(rows, ["Paris", "Rome"], None)
    assert (found["rows"], found["distinctRows"], found["candidate"]["value"]) == (2, 1, 0.5)
    assert "drop" not in found
    assert "parent" not in found


def test_the_drop_is_that_of_the_same_rows(files, write_rows):
    rows = asked(write_rows(*[[QUESTION, "Paris"]] * 10), files)
    found = task_metrics(rows, ["Paris"] * 6 + ["Rome"] * 4, ["Paris"] * 9 + ["Rome"])
    assert found["drop"]["value"] == pytest.approx(0.3)
    assert found["drop"]["low"] < 0.3 < found["drop"]["high"]


def test_the_report_has_the_words_and_both_texts_as_they_are(files, write_rows):
    rows = asked(write_rows([QUESTION, "Paris\u00a0!"]), files)
    (line,) = task_lines(rows, [" Paris !\n"], ["Rome"])
    assert json.loads(json.dumps(line)) == {
        "row": "rows.jsonl:1",
        "reference": "Paris\u00a0!",
        "prediction": " Paris !\n",
        "match": True,
        "parentPrediction": "Rome",
        "parentMatch": False,
    }
    report = task_report(task_metrics(rows, [" Paris !\n"], None), "triage")
    assert report["normalisation"] == WORDS
    assert report["lines"] == "tasks/triage.jsonl"
