"""Temporary folders are gone with their owner, or at the next look when the owner was killed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import fastserve
from fastserve.artifacts.temporary import sweep_temporary, temporary_folder

KEEP = """
import sys, time
from fastserve.artifacts.temporary import temporary_folder
with temporary_folder("checkpoint") as folder:
    (folder / "state").write_bytes(b"x")
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_is_there_while_it_is_used_and_gone_when_that_fails(place: Path) -> None:
    def use() -> None:
        with temporary_folder("checkpoint") as folder, temporary_folder("checkpoint") as other:
            assert folder != other
            assert folder.is_dir()
            (folder / "a").mkdir()
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert list(place.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_uses_is_not(place: Path) -> None:
    environment = {
        "PYTHONPATH": str(Path(fastserve.__file__).parents[1]),
        "TMPDIR": str(place),
        "PATH": "/usr/bin:/bin",
    }
    process = subprocess.Popen([sys.executable, "-c", KEEP], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        sweep_temporary("checkpoint")
        assert (theirs / "state").exists()
    finally:
        process.kill()
        process.communicate()
    assert theirs.exists()
    with temporary_folder("other"):
        assert theirs.exists()
    with temporary_folder("checkpoint") as folder:
        assert list(place.iterdir()) == [folder]
