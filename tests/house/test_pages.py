"""Pages say what is true today: links lead somewhere, and commands, values and targets that they name are there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chart_files
import jsonschema
import pytest
import typer
import yaml

from fastserve.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(page for folder in ("deployments", "docs", "helm") for page in (ROOT / folder).rglob("*.md")),
    ]
)
WRITTEN = [page for page in PAGES if page.name not in ("CHANGELOG.md", "PROVENANCE.md")]
"""What happened once, or elsewhere, may name what is not there."""

VALUES = {value.path: value for value in chart_files.values()}
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path, program: str) -> Iterator[list[str]]:
    """The words of each command of a program: in blocks of shell, and alone between backticks."""
    text = page.read_text()
    blocks = [block.replace("\\\n", " ") for _, language, block in FENCE.findall(text) if language in ("", "sh")]
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    for line in [*lines, *re.findall(r"`([^`\n]+)`", text)]:
        found = re.match(rf"(?:[A-Z_]+=\S+ )*(?:\S*/bin/)?({program} .+)$", line)
        if found:
            try:
                yield shlex.split(found.group(1), comments=True)[1:]
            except ValueError:
                continue  # a command with another one in quotes that goes on in the next line


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_a_link_leads_to_a_file_or_a_heading_that_is_there(page: Path) -> None:
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            lost.append(target)
    assert lost == []


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_a_value_of_the_chart_that_a_page_sets_is_one(page: Path) -> None:
    set_in = re.compile(r"--set(?:-string|-json)?[ =]\n? *'?([^\s']+)")
    paths = {
        pair.partition("=")[0]
        for given in set_in.findall(page.read_text().replace("\\\n", " "))
        for pair in re.split(r",(?=[a-zA-Z.]+=)", given)
    }
    known = {path for path in VALUES if path} | {f"fastserve.{path}" for path in VALUES}
    assert {path for path in paths if path.strip("'") not in known} <= {"kuberay.enabled"}


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_a_command_of_fastserve_on_a_page_is_one(page: Path) -> None:
    root: Any = typer.main.get_command(app)
    unknown = []
    for words in commands(page, "fastserve"):
        command = root
        for word in [word for word in words if not word.startswith("-")]:
            if not hasattr(command, "commands") or "|" in word:
                break
            command = command.commands.get(word)
        known = {name for item in [*root.params, *getattr(command, "params", ())] for name in item.opts}
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        if command is None or options - known - {"--help"}:
            unknown.append(" ".join(words))
    assert unknown == []


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_a_target_of_make_and_a_file_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets
    folders = "deployments|docs|helm|operators|platform|requirements|tests"
    files = set(re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]*\w)", text))
    assert {file for file in files if not (ROOT / file).exists() and not (page.parent / file).exists()} == set()


VALUES_FILES = [
    pytest.param(block, id=f"{name_of(page)}-{number}")
    for page in WRITTEN
    for number, (_, language, block) in enumerate(FENCE.findall(page.read_text()))
    if language == "yaml" and block.lstrip().startswith("# values of the chart")
]


@pytest.mark.parametrize("block", VALUES_FILES)
def test_a_values_file_on_a_page_is_one(block: str) -> None:
    jsonschema.validate(yaml.safe_load(block), chart_files.schema())
