"""The Containerfiles, read instruction by instruction; tests/cluster builds them."""

from __future__ import annotations

import re
import shlex
import tomllib
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "deployments/images").rglob("Containerfile"))
IDS = [str(file.relative_to(ROOT)) for file in FILES]


@dataclass
class Stage:
    """What stands between one FROM and the next."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def last(self, word: str) -> str | None:
        found = [said for step, said in self.steps if step == word]
        return found[-1] if found else None


def steps_of(file: Path) -> list[tuple[str, str]]:
    """Instructions and what they say, with continued lines joined and comments gone."""
    lines = [line for line in file.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [(word, " ".join(said.split())) for word, _, said in (line.partition(" ") for line in text.splitlines())]


def stages_of(file: Path) -> list[Stage]:
    found: list[Stage] = []
    for word, said in steps_of(file):
        if word == "FROM":
            base, _, name = said.partition(" AS ")
            found.append(Stage(name, base))
        elif found:
            found[-1].steps.append((word, said))
    return found


def arguments(file: Path) -> dict[str, str]:
    """Build arguments with a default."""
    return {
        name: value
        for word, said in steps_of(file)
        if word == "ARG"
        for name, equals, value in [said.partition("=")]
        if equals
    }


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets a file or folder into the build; the last line that fits it decides."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    sent = True
    for line in lines:
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            above = [path, *map(str, Path(path).parents)][:-1]
            if any(fnmatch(each, pattern) for each in above):
                sent = line.startswith("!")
    return sent


def test_there_are_both() -> None:
    assert [file.parent.name for file in FILES] == ["operator", "ray"]


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_what_is_copied_is_there_and_is_sent(file: Path) -> None:
    copied = [
        said for stage in stages_of(file) for word, said in stage.steps if word == "COPY" and "--from" not in said
    ]
    sources = [source for said in copied for source in said.split()[:-1]]
    for choice in ("cpu", "gpu") if "EXTRA" in arguments(file) else ("",):
        paths = [source.replace("${EXTRA}", choice) for source in sources]
        assert [path for path in paths if not (ROOT / path).exists()] == []
        assert [path for path in paths if not is_sent(path)] == []
    assert "pyproject.toml" in sources


@pytest.mark.parametrize("path", ["platform/fastserve/units.py", "requirements/cpu.txt", "deployments/data/x.jsonl"])
def test_what_is_needed_is_sent(path: str) -> None:
    assert is_sent(path)


@pytest.mark.parametrize("path", [".venv/bin/python", ".git/config", "tests/conftest.py", "platform/a/__pycache__"])
def test_nothing_else_is_sent(path: str) -> None:
    assert not is_sent(path)


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_a_stage_is_made_from_one_above(file: Path) -> None:
    stages = stages_of(file)
    for at, stage in enumerate(stages):
        above = {other.name for other in stages[:at]}
        named = re.findall(r"--from=(\S+)", " ".join(said for word, said in stage.steps if word == "COPY"))
        assert {stage.base, *named} <= {*above, "${BASE}"}


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_every_package_is_checked_against_its_digest(file: Path) -> None:
    runs = [said for stage in stages_of(file) for word, said in stage.steps if word == "RUN"]
    installs = [part for said in runs for part in re.split(r"&&|;", said) if re.search(r"-m pip .*\binstall\b", part)]
    assert len(installs) >= 3
    assert [part for part in installs if "--require-hashes" not in part and "--no-index" not in part] == []
    assert [part for part in installs if "--no-deps" not in part] == []
    fetched = [part for part in installs if "--no-index" not in part]
    assert [part for part in fetched if "--only-binary=:all:" not in part] == [], "nothing is compiled in a build"


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_it_runs_as_the_charts_user_and_writes_below_tmp(file: Path) -> None:
    stages = stages_of(file)
    by_name = {stage.name: stage for stage in stages if stage.name}
    lineage = [stages[-1]]
    while lineage[-1].base in by_name:
        lineage.append(by_name[lineage[-1].base])
    user = next(said for stage in lineage if (said := stage.last("USER")))
    number = yaml.safe_load((ROOT / "helm/fastserve/values.yaml").read_text())["podSecurity"]["runAsUser"]
    assert user == f"{number}:{number}"
    environment = dict(
        pair.split("=", 1)
        for stage in reversed(lineage)
        for word, said in stage.steps
        if word == "ENV"
        for pair in shlex.split(said)
    )
    assert environment["HOME"] == "/tmp"
    assert environment["PATH"].split(":")[0] == "/opt/fastserve/bin"
    assert environment["PYTHONDONTWRITEBYTECODE"] == "1"


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_versions_are_those_of_the_project(file: Path) -> None:
    given = arguments(file)
    chart = yaml.safe_load((ROOT / "helm/fastserve/Chart.yaml").read_text())
    assert given["VERSION"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert given["VERSION"] == chart["appVersion"]
    (resolved_for,) = set(re.findall(r"--python-version (\S+)", (ROOT / "Makefile").read_text()))
    assert f":{resolved_for}-" in given["BASE"]


def test_ray_is_the_one_that_the_chart_names() -> None:
    version = yaml.safe_load((ROOT / "helm/fastserve/values.yaml").read_text())["ray"]["version"]
    for extra in ("cpu", "gpu"):
        pinned = re.search(r"^ray\S*==(\S+)", (ROOT / f"requirements/{extra}.txt").read_text(), re.MULTILINE)
        assert pinned is not None
        assert pinned.group(1) == version


def test_the_operator_has_the_packages_of_the_examples() -> None:
    """It reads sources, too; the lines are those of the requirements that Ray's image is made from."""
    lines = [line for line in (ROOT / "requirements/examples.txt").read_text().splitlines() if not line.startswith("#")]
    whole = (ROOT / "requirements/cpu.txt").read_text().splitlines()
    assert set(pairwise(lines)) <= set(pairwise(whole))
    manifests = "\n".join(file.read_text() for file in sorted((ROOT / "deployments").glob("*.yaml")))
    named = {name.lower() for name in re.findall(r"package://([\w.-]+)/", manifests)}
    assert named == {line.partition("==")[0] for line in lines if "==" in line}
