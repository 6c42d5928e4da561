"""YAML as a tree with lines: what is refused, and that it is refused quickly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.errors import ManifestInvalid, Problem
from fastserve.spec.yaml_tree import Block, parse, to_plain


def stopped(text: str) -> Problem:
    with pytest.raises(ManifestInvalid) as caught:
        parse(text, "a.yaml")
    (problem,) = caught.value.problems
    return problem


def values(text: str) -> object:
    documents = parse(text)
    assert not documents.problems
    (tree,) = documents.trees
    return to_plain(tree)


def test_every_key_knows_its_line() -> None:
    (tree,) = parse("a: 1\nb:\n  c: [1,\n    2]\n").trees
    assert isinstance(tree, Block)
    assert tree.entries["a"].line == 1
    inner = tree.entries["b"].node
    assert isinstance(inner, Block)
    assert inner.entries["c"].line == 3


@pytest.mark.parametrize(
    "text", ["\ufeffa: 1\n", "a: 1\r\n", "a: 1\r\nb: 2\r\n---\r\n", "---\na: 1\n...\n", "# only\na: 1"]
)
def test_marks_and_line_ends_of_windows_do_no_harm(text: str) -> None:
    assert parse(text).trees


def test_empty_documents_are_no_documents() -> None:
    assert len(parse("---\n# nothing\n---\na: 1\n---\n---\nb: 2\n").trees) == 2


def test_a_merge_key_brings_in_what_is_not_there() -> None:
    text = "base: &b {x: 1, z: 2}\na: {<<: *b, x: 3}\n"
    assert values(text) == {"base": {"x": 1, "z": 2}, "a": {"x": 3, "z": 2}}


def test_of_several_merged_blocks_the_first_wins() -> None:
    text = "b: &b {x: 1}\nc: &c {x: 5, z: 1}\nd: {<<: [*b, *c], w: 9}\n"
    assert values(text) == {"b": {"x": 1}, "c": {"x": 5, "z": 1}, "d": {"x": 1, "z": 1, "w": 9}}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: [1, 2\nb: 3\n", 2, "is not YAML"),
        ("a: 1\n\tb: 2\n", 2, "tab"),
        ("a: b: c\n", 1, "is not YAML"),
        ("a: 1\nb: \x00\n", 2, "U+0000"),
        ("a: \ud800\n", 1, "U+D800"),
        ("a: *nowhere\n", 1, "&nowhere"),
        ("a: &a [*a]\n", 1, "inside what it names"),
        ("[" * 3000, 1, "nest"),
        ("- " * 3000, 1, "nest"),
        ("a: 'x\n", 2, "is not YAML"),
        ("{]", 1, "is not YAML"),
        ("%YAML 9.9\n---\na: 1\n", 1, "is not YAML"),
    ],
)
def test_what_is_not_yaml_is_one_problem_with_its_line(text: str, line: int, words: str) -> None:
    problem = stopped(text)
    assert words in problem.message
    assert problem.line == line
    assert problem.file == "a.yaml"


def test_a_key_given_twice_names_both_lines() -> None:
    (problem,) = parse("a:\n  b: 1\n  c: 2\n  b: 3\n").problems
    assert (problem.path, problem.line) == ("a.b", 4)
    assert "line 2" in problem.message


@pytest.mark.parametrize("key", ["on", "1", "0123", "null", "1.5", "~", "y"])
def test_a_key_that_is_not_text_must_be_put_in_quotes(key: str) -> None:
    (problem,) = parse(f"a: {{{key}: x}}\n").problems
    assert problem.suggestion == f'"{key}"'
    assert not parse(f'a: {{"{key}": x}}\n').problems


@pytest.mark.parametrize("key", ["[1, 2]", "{a: 1}"])
def test_a_key_that_is_no_word_is_refused(key: str) -> None:
    assert "write a word" in parse(f"? {key}\n: 1\n").problems[0].message


@pytest.mark.parametrize(
    "tag", ["!!python/object:os.system", "!!python/object/apply:os.system", "!mine", "!!binary", "!!int"]
)
@pytest.mark.parametrize("value", ["x", "[x]", "{x: y}"])
def test_a_tag_is_refused_by_name_and_never_obeyed(tag: str, value: str) -> None:
    (problem,) = parse(f"a: {tag} {value}\n").problems
    assert tag in problem.message
    assert problem.path == "a"


def test_a_tag_that_says_text_is_obeyed() -> None:
    assert values("a: !!str 0123\n") == {"a": "0123"}


@pytest.mark.timeout(5)
def test_a_billion_laughs_are_refused_at_once() -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40)]
    assert "aliases" in stopped("\n".join(levels)).message


@pytest.mark.timeout(5)
def test_merged_laughs_are_refused_at_once() -> None:
    levels = ["a0: &a0 {x: 1}"]
    levels += [f"a{n}: &a{n} {{k{n}: *a{n - 1}, m{n}: *a{n - 1}}}" for n in range(1, 30)]
    assert "aliases" in stopped("\n".join(levels)).message


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "text", ["a: " + "x" * 2_000_000, "- a\n" * 100_000, "{" * 500_000, "&a " * 100_000, "? " * 50_000]
)
def test_a_huge_file_is_refused_at_once(text: str) -> None:
    stopped(text)


def problems_of_any(text: str) -> int:
    try:
        parse(text)
    except ManifestInvalid as error:
        return len(error.problems)
    return 0


@given(st.text() | st.text(alphabet="ab:-[]{},&*!?|>'\"%@#\n \t<~0.1", max_size=60))
def test_any_text_is_read_or_refused_with_one_problem(text: str) -> None:
    assert problems_of_any(text) in (0, 1)
