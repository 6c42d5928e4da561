"""What a container has left: pages of files are no use of memory."""

from pathlib import Path

import pytest

from fastserve.stages import cgroup
from fastserve.stages.cgroup import FIRST, SECOND, Names, free_bytes, let_engines_reclaim, used_for_good

STAT = {FIRST: "cache 900\ntotal_active_file 100000\n", SECOND: "anon 5\nactive_file 100000\n"}
MORE = {FIRST: "total_inactive_file 200000\ninactive_file 7\n", SECOND: "inactive_file 200000\n"}


def filled(folder: Path, names: Names, limit: str = "1000000") -> Path:
    """A cgroup of which 700,000 bytes are used, 300,000 of them pages of files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names.limit).write_text(f"{limit}\n")
    (folder / names.usage).write_text("700000\n")
    (folder / "memory.stat").write_text(STAT[names] + MORE[names])
    return folder


@pytest.mark.parametrize("names", [FIRST, SECOND])
def test_the_memory_of_a_cgroup_is_a_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, names: Names) -> None:
    monkeypatch.setattr(cgroup, "_own", lambda: iter([(filled(tmp_path, names), names)]))
    assert free_bytes() == 600_000
    monkeypatch.setattr(cgroup, "_own", lambda: iter([(filled(tmp_path, names, "max"), names)]))
    assert free_bytes() > 600_000


@pytest.mark.parametrize(("names", "place"), [(FIRST, "memory"), (SECOND, ".")])
def test_an_engine_does_not_count_pages_of_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, names: Names, place: str
) -> None:
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    filled(tmp_path / place, names)
    once = used_for_good(lambda: 700_000)
    assert once() == 400_000
    assert used_for_good(once) is once
    assert used_for_good(lambda: None)() is None, "no limit"
    assert used_for_good(lambda: 1)() == 0, "read a moment earlier"


def test_the_engine_that_is_installed_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    utils = pytest.importorskip("vllm.utils.cpu_resource_utils")
    monkeypatch.setattr(utils, "get_cgroup_memory_limit", lambda: 1_000_000)
    monkeypatch.setattr(utils, "get_cgroup_memory_usage", lambda: 700_000)
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    filled(tmp_path, SECOND)
    assert utils.get_memory_node_info().available_memory == 300_000
    let_engines_reclaim()
    assert utils.get_memory_node_info().available_memory == 600_000
