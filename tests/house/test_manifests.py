"""Every manifest that we show is a manifest that we read: in deployments/, in the README and in docs/."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from fastserve.spec.load import read, read_file
from fastserve.spec.model import GROUP

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "deployments").rglob("*.yaml"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```ya?ml\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
    if f"apiVersion: {GROUP}/" in block
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_manifest_in_deployments_is_read(path: Path) -> None:
    kinds = {
        (document["apiVersion"], document["kind"]) for document in yaml.safe_load_all(path.read_text()) if document
    }
    foreign = sorted(kind for version, kind in kinds if not version.startswith(f"{GROUP}/"))
    if len(foreign) == len(kinds):
        pytest.skip(f"holds no kind of ours: {', '.join(foreign)}")
    assert not foreign, "kinds of ours and of Kubernetes stand in files of their own"
    assert read_file(path)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_manifest_on_a_page_is_read(block: str) -> None:
    assert read(block)


def test_the_manifest_of_the_readme_is_the_quickstart() -> None:
    """Line by line, comments aside: what a newcomer reads first is what runs."""
    lines = (ROOT / "deployments" / "01-quickstart.yaml").read_text().splitlines()
    quickstart = "\n".join(line for line in lines if line.strip() and not line.lstrip().startswith("#"))
    assert f"```yaml\n{quickstart}\n```" in (ROOT / "README.md").read_text()
