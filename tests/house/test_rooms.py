"""The shape of the house: where code may stand, how long a piece of it may be, and that each says why it exists."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BARE = [ROOT / name for name in ("platform", "operators") if (ROOT / name).is_dir()]
MODULES = sorted(module for folder in BARE for module in folder.rglob("*.py"))
IDS = [str(module.relative_to(ROOT)) for module in MODULES]

MOST_LINES = 400
MOST_LINES_OF_A_FUNCTION = 50
VAGUE = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "managers"}

LONG_MODULES: dict[str, str] = {
    "platform/fastserve/plan/engine_flags.py": "generated: one flag of vLLM a line",
}
"""Modules above MOST_LINES, each with the reason why it has no seam."""

LONG_FUNCTIONS: dict[str, str] = {}
"""`module.py:function` above MOST_LINES_OF_A_FUNCTION, each with the reason why it has no seam."""


@pytest.mark.parametrize("folder", BARE, ids=lambda folder: folder.name)
def test_a_bare_folder_holds_packages_and_nothing_else(folder: Path) -> None:
    """`platform/__init__.py` would shadow Python's own `platform` module for whoever stands in the repository."""
    assert [item.name for item in folder.iterdir() if item.suffix == ".py"] == []


def test_pythons_own_platform_is_found_from_the_root() -> None:
    code = "import asyncio, uuid, platform; assert platform.python_version()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_no_test_folder_is_a_package() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


@pytest.mark.parametrize("module", MODULES, ids=IDS)
def test_a_module_opens_with_why_it_exists(module: Path) -> None:
    assert ast.get_docstring(ast.parse(module.read_text())), "open it with a docstring"


@pytest.mark.parametrize("module", MODULES, ids=IDS)
def test_a_module_is_named_after_what_is_in_it(module: Path) -> None:
    assert module.stem not in VAGUE, "name it after the noun it holds"


@pytest.mark.parametrize("module", MODULES, ids=IDS)
def test_a_module_is_short_or_says_why_not(module: Path) -> None:
    lines = len(module.read_text().splitlines())
    name = str(module.relative_to(ROOT))
    assert lines <= MOST_LINES or name in LONG_MODULES, f"{lines} lines: split it along nouns"


@pytest.mark.parametrize("module", MODULES, ids=IDS)
def test_a_function_is_short_or_says_why_not(module: Path) -> None:
    name = module.relative_to(ROOT)
    long = {f"{name}:{function}": lines for function, lines in _functions(module) if lines > MOST_LINES_OF_A_FUNCTION}
    assert {key: lines for key, lines in long.items() if key not in LONG_FUNCTIONS} == {}, "split it along nouns"


def test_no_exception_outlives_its_reason() -> None:
    lengths = {str(module.relative_to(ROOT)): len(module.read_text().splitlines()) for module in MODULES}
    functions = {
        f"{module.relative_to(ROOT)}:{function}": lines for module in MODULES for function, lines in _functions(module)
    }
    assert [name for name in LONG_MODULES if lengths.get(name, 0) <= MOST_LINES] == []
    assert [name for name in LONG_FUNCTIONS if functions.get(name, 0) <= MOST_LINES_OF_A_FUNCTION] == []


def _functions(module: Path) -> Iterator[tuple[str, int]]:
    """Every function with its lines, its docstring not counted."""
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            has_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            docstring = (first.end_lineno or 0) - first.lineno + 1 if has_docstring else 0
            yield node.name, (node.end_lineno or 0) - node.lineno + 1 - docstring
