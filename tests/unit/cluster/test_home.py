"""The home folder: small files replaced whole, one tender at a time."""

import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastserve.cluster.home import MOST_REVISIONS, Home
from fastserve.errors import HomeInUse, StoreFailed, UsageInvalid
from fastserve.plan.observed import Pin
from fastserve.plan.revision import Revision
from fastserve.plan.stages import Stage
from fastserve.spec.load import read


@pytest.fixture
def home(tmp_path: Path) -> Home:
    found = Home(tmp_path / "home")
    found.create()
    return found


def model(name: str = "chat"):
    head = "apiVersion: fastserve.dev/v1alpha1\nkind: Model\n"
    text = f"{head}metadata: {{name: {name}}}\nspec: {{source: hf://a/b, serve: {{}}}}"
    return read(text)[0]


def revision(key: str = "k") -> Revision:
    return Revision("chat", Stage.SOURCE, key, "d" * 64, {"task": "generate"})


def test_a_model_is_wanted_until_it_is_not(home: Home) -> None:
    home.want(model(), {"hf://a/b": "1" * 64}, {"key": 2})
    assert home.model_names() == ["chat"]
    assert home.model("chat") == model()
    assert home.resolved("chat") == {"hf://a/b": "1" * 64}
    assert home.forgiven("chat") == {"key": 2}
    home.unwant("chat")
    assert home.model_names() == []
    assert home.known_models() == ["chat"]
    assert home.ended("chat") == model()
    home.want(model(), {}, {})
    assert home.ended("chat") is None, "what is wanted has not ended"


def test_a_resolved_digest_is_added_to_the_others(home: Home) -> None:
    home.want(model(), {"a": "1"}, {})
    home.set_resolved("chat", "b", "2")
    assert home.resolved("chat") == {"a": "1", "b": "2"}


def test_revisions_are_kept_in_the_order_they_were_made(home: Home) -> None:
    newer, older = revision("new"), revision("old")
    home.keep_revision(newer, made_at=200.0)
    home.keep_revision(older, made_at=100.0)
    home.keep_revision(older, made_at=300.0)  # keeping again changes nothing
    assert list(home.revisions("chat")) == [older.digest, newer.digest]
    assert Revision.from_json(home.revisions("chat")[older.digest]) == older


def test_of_many_revisions_the_newest_and_those_in_use_are_kept(home: Home) -> None:
    made = [revision(f"k{number}") for number in range(MOST_REVISIONS + 20)]
    used = made[:5]
    home.want(model(), {}, {})
    home.set_weights("chat", {used[0].digest: 100})
    home.set_weights("chat", {used[1].digest: 90, used[2].digest: 10})
    home.set_pin("chat", Pin(used[3].digest, used[2].digest))
    home.start_serving("chat-app", used[4])
    other = Revision("other", Stage.SOURCE, "k", "d" * 64, {})
    home.keep_revision(other, made_at=0.0)
    for number, item in enumerate(made):
        home.keep_revision(item, made_at=float(number))
    kept = list(home.revisions("chat"))
    assert kept == [item.digest for item in made if item.digest in kept]  # oldest first
    assert {item.digest for item in used} <= set(kept)
    assert {item.digest for item in made[-MOST_REVISIONS:]} <= set(kept)
    assert len(kept) <= MOST_REVISIONS + len(used)
    assert list(home.revisions("other")) == [other.digest]


def test_a_pin_holds_until_it_is_taken_away(home: Home) -> None:
    home.set_pin("chat", Pin("a", "b"))
    assert home.pin("chat") == Pin("a", "b")
    home.set_pin("chat", None)
    home.set_pin("chat", None)
    assert home.pin("chat") is None


def test_a_pin_keeps_its_reason(home: Home) -> None:
    pin = Pin("a", "b", "RolledBack", "It was slow.")
    home.set_pin("chat", pin)
    assert home.pin("chat") == pin
    home.write_json("models/chat/pin.json", {"revision": "a", "instead_of": "b"})  # as older versions wrote it
    assert home.pin("chat") == Pin("a", "b")


def test_weights_keep_their_time_and_who_had_all(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("fastserve.cluster.home.time.time", lambda: now[0])
    assert (home.weights("chat"), home.shifted_at("chat"), home.proven("chat")) == ({}, None, None)
    home.set_weights("chat", {"a": 100}, "It is ready.")
    now[0] = 110.0
    home.set_weights("chat", {"a": 95, "b": 5})
    now[0] = 120.0
    home.set_weights("chat", {"a": 95, "b": 5})  # doing so again changes nothing
    assert (home.weights("chat"), home.shifted_at("chat"), home.proven("chat")) == ({"a": 95, "b": 5}, 110.0, "a")
    now[0] = 90.0  # the clock was set back
    home.set_weights("chat", {"a": 95, "b": 5})
    assert home.shifted_at("chat") == 90.0
    home.set_weights("chat", {})
    assert (home.weights("chat"), home.proven("chat")) == ({}, None)


def test_weights_of_an_older_version_are_read(home: Home) -> None:
    home.write_json("models/chat/weights.json", {"a": 100})
    assert (home.weights("chat"), home.shifted_at("chat"), home.proven("chat")) == ({"a": 100}, None, "a")


def test_what_serves_is_found_again(home: Home) -> None:
    home.start_serving("chat-1234", revision())
    home.start_serving("chat-1234", revision())
    assert home.serving() == {"chat-1234": revision()}
    assert home.serving_since().keys() == {"chat-1234"}
    home.stop_serving("chat-1234")
    home.stop_serving("chat-1234")
    assert home.serving() == {}


def test_files_are_closed_to_others(home: Home) -> None:
    home.write_json("keys.json", [])
    assert stat.S_IMODE(os.stat(home.path / "keys.json").st_mode) == 0o600
    assert stat.S_IMODE(os.stat(home.path).st_mode) == 0o700
    key = home.local_key(lambda: "fs-secret")
    assert home.local_key(lambda: "fs-other") == key == "fs-secret"
    assert stat.S_IMODE(os.stat(home.path / "local.key").st_mode) == 0o600


def test_a_write_that_fails_leaves_the_old_value(home: Home) -> None:
    home.write_json("settings.json", {"store": "/old"})
    with pytest.raises(TypeError):
        home.write_json("settings.json", {"store": object()})
    assert home.store_uri == "/old"
    assert not list(home.path.glob(".new-*"))


def killed_process() -> int:
    """Number of a process that is gone."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_what_a_killed_writer_left_is_cleared_and_what_a_living_one_writes_is_not(home: Home) -> None:
    home.want(model(), {}, {})
    left = [
        home.path / name / f"{sign}{killed_process()}-0a"
        for name in (".", "models/chat", "serving", "gateway")
        for sign in (".new-", ".config.json.")
    ]
    under_way = home.path / "models" / "chat" / f".new-{os.getpid()}-0b"
    for path in (*left, under_way):
        path.write_text("{")
    home.clear_torn()
    assert not [path for path in left if path.exists()]
    assert under_way.exists()
    assert home.model("chat") == model()


@pytest.mark.parametrize("line", range(1, 7))
def test_ctrl_c_at_any_line_of_a_write_leaves_the_old_value_or_the_new_one(
    home: Home, monkeypatch: pytest.MonkeyPatch, line: int
) -> None:
    home.write_json("settings.json", {"store": "/old"})
    calls = [0]

    def interrupted(what: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] == line:
                raise KeyboardInterrupt
            done = what(*arguments, **named)
            calls[0] += 1
            if calls[0] == line:
                raise KeyboardInterrupt
            return done

        return call

    for name in ("open", "chmod", "replace"):
        monkeypatch.setattr(f"fastserve.cluster.home.os.{name}", interrupted(getattr(os, name)))
    with pytest.raises(KeyboardInterrupt):
        home.write_json("settings.json", {"store": "/new"})
    monkeypatch.undo()
    assert home.store_uri == ("/new" if line == 6 else "/old")
    assert not list(home.path.glob(".new-*"))


def test_several_commands_at_once_make_one_key(home: Home) -> None:
    """Each reads a whole key, and all the same."""
    code = (
        "import sys; from fastserve.cluster.home import Home\n"
        f"home = Home({str(home.path)!r}); sys.stdin.readline()\n"
        "print(home.local_key(home.token))"
    )
    many = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    found = set()
    for process in many:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in many:
        found.add(process.communicate(timeout=120)[0].strip())
    assert len(found) == 1
    assert len(found.pop()) == 64
    assert not list(home.path.glob(".new-*"))


def test_a_damaged_file_is_named(home: Home) -> None:
    (home.path / "keys.json").write_text("{")
    with pytest.raises(StoreFailed, match=r"keys\.json is damaged"):
        home.read_json("keys.json")


def test_a_second_tender_is_refused_while_the_first_lives(home: Home) -> None:
    code = (
        "import sys, time\n"
        "from fastserve.cluster.home import Home\n"
        f"with Home({str(home.path)!r}).tended(detached=False):\n"
        "    print('owned', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "owned\n"
        assert home.tender() == {"pid": other.pid, "detached": False}
        with pytest.raises(HomeInUse, match=f"process {other.pid}"), home.tended(detached=False):
            pass
        other.kill()  # a killed owner leaves its file, but not its lock
        other.wait()
        assert home.tender() is None
        with home.tended(detached=True):
            assert json.loads((home.path / "up.json").read_text())["detached"] is True
    assert home.tender() is None


def test_whoever_only_looks_who_tends_keeps_nobody_from_tending(home: Home) -> None:
    """A look holds the lock for a moment; many looks at once must not be taken for an owner."""
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            home.tender()

    looks = [threading.Thread(target=look) for _ in range(3)]
    for thread in looks:
        thread.start()
    try:
        for _ in range(100):
            with home.tended(detached=False):
                assert home.read_json("up.json")["pid"] == os.getpid()
    finally:
        over.set()
        for thread in looks:
            thread.join()


def test_a_home_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageInvalid, match="is not a folder"):
        Home(tmp_path / "file").create()


def test_each_home_has_an_id_of_its_own(tmp_path: Path) -> None:
    assert Home(tmp_path / "a").id == Home(tmp_path / "b" / ".." / "a").id != Home(tmp_path / "b").id
