"""Rows as people write them: one plain form, and one clear error each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.data.rows import read_rows
from fastserve.errors import DatasetInvalid, SourceNotFound

CHAT = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}'


def write(folder: Path, text: str | bytes, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_windows_file_means_what_its_clean_twin_means(cases: Path) -> None:
    dirty, clean = list(read_rows(cases / "01-bom-crlf.jsonl")), list(read_rows(cases / "01-clean.jsonl"))
    assert [row.messages for row in dirty] == [row.messages for row in clean]
    assert [row.digest for row in dirty] == [row.digest for row in clean]
    assert [row.extra for row in dirty] == [row.extra for row in clean]
    assert "tags" not in dirty[0].extra["meta"]
    assert "score" not in dirty[1].extra["meta"]


def test_a_mark_in_the_middle_is_refused_with_its_line(cases: Path, tmp_path: Path) -> None:
    lines = (cases / "01-bom-crlf.jsonl").read_bytes().split(b"\r\n")
    lines[1] = b"\xef\xbb\xbf" + lines[1]
    path = write(tmp_path, b"\r\n".join(lines), "01-bom-crlf.jsonl")
    with pytest.raises(DatasetInvalid, match=r"01-bom-crlf\.jsonl:2: .*byte-order mark"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{nonsense", "not JSON"),
        ("[1, 2]", "a list, not an object"),
        ("null", "null, not an object"),
        ("{}", "empty"),
        ('{"messages": null}', "empty"),
        ('{"messages": []}', "empty"),
        ('{"messages": [], "id": 4}', "messages is empty"),
        ('{"question": "a", "answer": "b"}', "has answer, question"),
        ('{"conversations": [{"from": "human", "value": "a"}]}', "human as user"),
        ('{"messages": [{"from": "human", "value": "a"}]}', "human as user"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', "role 'bot'"),
        ('{"messages": [{"role": "user", "content": " "}]}', "content is empty"),
        ('{"messages": [{"role": "user"}]}', "has no content"),
        ('{"messages": [{"role": "user", "content": 7}]}', "content is a number"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "only text is read"),
        ('{"messages": "hello"}', "messages is text that is not JSON"),
        ('{"messages": {"role": "user"}}', "messages is an object, not a list"),
        ('{"messages": ["hi"]}', "message 1 is text"),
        ('{"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}', "only an assistant"),
        ('{"messages": [{"role": "assistant", "tool_calls": [{}]}]}', "function.name"),
        ('{"instruction": "a"}', "no answer"),
        ('{"prompt": "a", "response": ["b"]}', "response is a list"),
        ('{"text": ""}', "empty"),
        ('{"text": true}', "text is true or false"),
        ('{"text": "\\ud800"}', "surrogate"),
        ('{"text": "a\\ufeffb"}', "byte-order mark"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_with_file_and_line(tmp_path: Path, line: str, words: str) -> None:
    path = write(tmp_path, f"{CHAT}\n{line}\n{CHAT}\n")
    with pytest.raises(DatasetInvalid) as caught:
        list(read_rows(path))
    assert str(caught.value).startswith("rows.jsonl:2: ")
    assert words in str(caught.value)


def test_a_blank_line_is_refused_between_rows_and_forgiven_at_the_end(tmp_path: Path) -> None:
    with pytest.raises(DatasetInvalid, match=r"rows\.jsonl:2: the row is empty"):
        list(read_rows(write(tmp_path, f"{CHAT}\n\n{CHAT}\n")))
    assert len(list(read_rows(write(tmp_path, f"{CHAT}\n{CHAT}\n\n \n")))) == 2


@pytest.mark.parametrize(("data", "words"), [("ä".encode("latin-1"), "not UTF-8"), ("a".encode("utf-16"), "UTF-16")])
def test_another_encoding_is_named(tmp_path: Path, data: bytes, words: str) -> None:
    with pytest.raises(DatasetInvalid, match=words):
        list(read_rows(write(tmp_path, data)))


def test_instruction_rows_become_chat_rows(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add", "input": "1 and 2", "output": "3"},
        {"prompt": "Add 1 and 2", "response": "3"},
        {"prompt": "Add 1 and 2", "completion": "3"},
    ]
    first, second, third = read_rows(write(tmp_path, "\n".join(json.dumps(row) for row in rows)))
    assert first.messages[0]["content"] == "Add\n\n1 and 2"
    assert (
        second.messages
        == third.messages
        == (
            {"role": "user", "content": "Add 1 and 2"},
            {"role": "assistant", "content": "3"},
        )
    )


def test_each_line_of_a_text_file_is_a_row(tmp_path: Path) -> None:
    rows = list(read_rows(write(tmp_path, b"\xef\xbb\xbfone\r\n\r\ntwo\r\n", "rows.txt")))
    assert [(row.line, row.text) for row in rows] == [(1, "one"), (3, "two")]


def test_a_folder_is_read_in_the_order_of_its_files_names(tmp_path: Path) -> None:
    write(tmp_path, "two", "b.txt")
    write(tmp_path, "one", "a.text")
    write(tmp_path, "no rows", "README.md")
    assert [row.text for row in read_rows(tmp_path)] == ["one", "two"]


def test_what_holds_no_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetInvalid, match=r"\.csv"):
        list(read_rows(write(tmp_path, "a,b", "rows.csv")))
    with pytest.raises(SourceNotFound):
        list(read_rows(tmp_path / "gone.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetInvalid, match="no file with rows"):
        list(read_rows(tmp_path / "empty"))


def test_parts_of_text_and_arguments_written_as_text_are_read(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "We"}, {"type": "text", "text": "ather?\r\n"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    (row,) = read_rows(write(tmp_path, json.dumps({"messages": messages})))
    assert row.messages[0]["content"] == "Weather?\n"
    assert row.messages[1]["content"] == ""
    assert row.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}


def test_the_digest_is_of_what_a_row_says(tmp_path: Path) -> None:
    other = CHAT.replace("Hello", "  Hello ").replace('{"messages"', '{"id": 3, "messages"')
    first, second, third = read_rows(write(tmp_path, "\n".join([CHAT, other, CHAT.replace("Hello", "Bye")])))
    assert first.digest == second.digest != third.digest


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufeff\r"), min_size=1).filter(str.strip))
def test_any_text_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text(json.dumps({"text": text}, ensure_ascii=False), encoding="utf-8", newline="\n")
    assert [row.text for row in read_rows(path)] == [text]
