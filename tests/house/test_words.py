"""What no committed file may hold, and what a newcomer must find."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MACHINE_PATH = re.compile(r"(?<![\w.~/}$-])/(?:work|root|farm)(?:/|\b)")
REGISTRY = re.compile(
    r"(?:--(?:extra-)?index-url|--find-links|--trusted-host)\b"
    r"|\b(?:p[y]pi\.org|p[y]thonhosted\.org|registry\.n[p]mjs\.org|(?:proxy|sum)\.g[o]lang\.org)\b"
)
"""Where packages come from is the business of whoever installs: a mirror, a proxy, a folder of wheels."""


def _committed() -> list[Path]:
    """Files that are in the repository or would be with the next `git add`."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return sorted(ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file())


def _texts() -> list[tuple[str, str]]:
    texts = []
    for path in _committed():
        if path == Path(__file__):
            continue
        try:
            texts.append((str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue
    return texts


@pytest.fixture(scope="module")
def texts() -> list[tuple[str, str]]:
    return _texts()


@pytest.mark.parametrize("words", [MACHINE_PATH, REGISTRY], ids=["machine-paths", "registries"])
def test_no_committed_file_holds(words: re.Pattern[str], texts: list[tuple[str, str]]) -> None:
    found = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in texts
        if words.search(text)
        for number, line in enumerate(text.splitlines(), 1)
        if words.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("command", ["make quickstart", "make test"])
def test_the_readme_says_how_to_begin(command: str) -> None:
    assert command in (ROOT / "README.md").read_text()
