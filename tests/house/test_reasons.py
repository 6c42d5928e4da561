"""Whatever reason a condition, an event or a failure has, a person who meets it finds it on the page of troubles."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastserve.errors import FastServeError
from fastserve.plan.observed import RevisionState

ROOT = Path(__file__).parents[2]
MODULES = sorted(module for folder in ("platform", "operators") for module in (ROOT / folder).rglob("*.py"))
PAGE = ROOT / "docs/guides/troubleshooting.md"
WORD = re.compile(r"[A-Z][a-z0-9]+(?:[A-Z][a-z0-9]*)*")
GIVEN_AT = {"Trouble": 0, "condition": 2, "tell": 3, "_note_failure": 2, "fail": 2, "Ended": 1, "Failed": 0}
"""Functions that are handed a reason, and its place among their arguments."""


def words_in(node: ast.AST) -> Iterator[str]:
    """CamelCase words that an expression can give: `told or "A"`, `"A" if x else "B"`."""
    for found in ast.walk(node):
        if isinstance(found, ast.Constant) and isinstance(found.value, str) and WORD.fullmatch(found.value):
            yield found.value


def first_of(row: ast.AST) -> ast.AST:
    """What stands first in a row of a table."""
    items = row.args if isinstance(row, ast.Call) else row.elts if isinstance(row, ast.Tuple) else [row]
    return items[0]


def named(node: ast.AST) -> str:
    """The last word of what is called or assigned to."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def reasons_in(tree: ast.AST) -> Iterator[str]:
    """Every reason that a module writes down."""
    for node in ast.walk(tree):
        match node:
            case ast.keyword(arg="reason", value=value):
                yield from words_in(value)
            case ast.Dict(keys=keys, values=values):
                for key, value in zip(keys, values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "reason":
                        yield from words_in(value)
            case ast.Call(func=func, args=args) if named(func) in GIVEN_AT and len(args) > GIVEN_AT[named(func)]:
                yield from words_in(args[GIVEN_AT[named(func)]])
            case ast.Assign(targets=[target], value=ast.Tuple(elts=rows)) if re.search("(?i)cause", named(target)):
                yield from (word for row in rows for word in words_in(first_of(row)))
            case ast.Assign(targets=[target], value=value) if re.search("(?i)reason|rolled_back", named(target)):
                yield from words_in(value)
            case ast.FunctionDef(name="reason" | "refusal"):
                for given in ast.walk(node):
                    if isinstance(given, ast.Return) and given.value is not None:
                        yield from words_in(given.value)


def errors(root: type[FastServeError] = FastServeError) -> Iterator[str]:
    """Every error that a user can meet, by the name that is its reason; a mere kind of errors is none."""
    for kind in root.__subclasses__():
        if kind.__module__ == FastServeError.__module__ and any(
            re.search(rf"\b{kind.__name__}\(", text) for text in TEXTS
        ):
            yield kind.__name__
        yield from errors(kind)


TEXTS = [module.read_text() for module in MODULES if module.name != "errors.py"]
STATES = {state.value.capitalize() for state in RevisionState}
"""The condition `Serve` says them in the place of a reason."""

INTERNAL = {"NotStarted"}
"""What parts of the code tell one another, and nobody else."""

REASONS = sorted({*errors(), *STATES, *(word for text in TEXTS for word in reasons_in(ast.parse(text)))} - INTERNAL)


def test_the_reasons_are_found() -> None:
    """In each of the forms in which code writes one."""
    wanted = {"SourceInvalid", "OutOfMemory", "GateFailed", "RolledBack", "Committed", "InternalError", "ByHand"}
    assert wanted <= set(REASONS)


@pytest.mark.parametrize("reason", REASONS)
def test_a_reason_has_a_row(reason: str) -> None:
    rows = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert any(f"`{reason}`" in row for row in rows), f"say in {PAGE.name} what {reason} means and what to do"


def test_no_row_outlives_its_reason() -> None:
    told, in_table = set(), False
    for line in PAGE.read_text().splitlines():
        in_table = line.startswith("| reason |") or (in_table and line.startswith("|"))
        if in_table:
            told |= set(re.findall(r"`(\w+)`", line.split("|")[1]))
    assert told - set(REASONS) == set()
