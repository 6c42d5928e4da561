"""Keys, config, events and routes as plain values."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.errors import UsageInvalid
from fastserve.gateway.config import Config, Hold, Key, Revision, Served, Target, parse, read, to_json, write
from fastserve.gateway.keys import KEY, digest, new_key
from fastserve.gateway.sse import EventCutter

PLACES = (
    Target("http://127.0.0.1:8000/m/chat/aa/big", 64, "big", 0),
    Target("http://127.0.0.1:8000/m/chat/aa/small", 0, "small", 1),
    Target("http://127.0.0.1:8000/m/chat/aa", 0, last=True),
)
CONFIG = Config(
    port=8123,
    admin_port=8124,
    admin_sha256="d" * 64,
    models={
        "chat": Served("generate", 7, (Revision("a" * 64, 95, PLACES),), hold=Hold(5, 1.5)),
        "polite": Served("generate", 8, (Revision("a" * 64, 95, PLACES),), parent="chat"),
    },
    keys=(Key("team", "b" * 64, ("chat",), date(2027, 6, 30)), Key("all", "c" * 64, ("*",))),
)


def test_new_keys_are_long_random_and_look_like_ours():
    made = {new_key() for _ in range(100)}
    assert len(made) == 100
    assert all(key.startswith("fs-") and len(key) >= 43 and KEY.fullmatch(key) for key in made)


@pytest.mark.parametrize("end", ["\n", "\r\n", " ", "\t"])
def test_a_line_end_behind_a_key_does_not_change_its_digest(end):
    assert digest("fs-abc" + end) == digest("fs-abc")
    assert re.fullmatch("[0-9a-f]{64}", digest("fs-abc"))


def test_a_config_that_was_written_reads_back_the_same(tmp_path):
    file = tmp_path / "gateway.json"
    write(file, CONFIG)
    write(file, CONFIG)
    assert read(file) == CONFIG
    assert [path.name for path in tmp_path.iterdir()] == ["gateway.json"]


def test_the_smallest_config_is_empty_and_denies_everything():
    assert parse({}) == Config()
    assert Config().host == "127.0.0.1"


def target(**wrong):
    """A config whose only target has something wrong."""
    return {"models": {"m": {"revisions": [{"digest": "a", "targets": [{"url": "http://x", **wrong}]}]}}}


WRONG = [
    ([], "the file"),
    ({"prot": 1}, "unknown key 'prot'"),
    ({"port": "8100"}, "port"),
    ({"port": 70000}, "port"),
    ({"host": ""}, "host"),
    ({"models": []}, "models"),
    ({"models": {"a/b": {}}}, "models.a/b"),
    ({"models": {"m": {"task": "sing"}}}, "models.m.task"),
    ({"models": {"m": {"revisions": [{"digest": "a", "weight": -1}]}}}, "models.m.revisions[0].weight"),
    ({"models": {"m": {"revisions": [{"digest": "a", "weight": True}]}}}, "models.m.revisions[0].weight"),
    ({"models": {"m": {"revisions": [{"digest": "a", "targets": ["ftp://x"]}]}}}, "models.m.revisions[0].targets"),
    ({"models": {"m": {"revisions": [{"digest": "a", "targets": ["http://u@x"]}]}}}, "models.m.revisions[0].targets"),
    ({"models": {"m": {"revisions": [{"digest": "a", "targets": [{}]}]}}}, "models.m.revisions[0].targets[0].url"),
    (target(slots=-1), "models.m.revisions[0].targets[0].slots"),
    (target(slots=True), "models.m.revisions[0].targets[0].slots"),
    (target(rank="first"), "models.m.revisions[0].targets[0].rank"),
    (target(last="yes"), "models.m.revisions[0].targets[0].last"),
    (target(profile=1), "models.m.revisions[0].targets[0].profile"),
    (
        target(price=1),
        "models.m.revisions[0].targets[0]: unknown key 'price'; the keys are url, slots, profile, rank, last",
    ),
    ({"models": {"m": {"revisions": [{"digest": "a", "targets": ["http://x", "http://x/"]}]}}}, "twice"),
    ({"models": {"m": {"hold": {"requests": -1}}}}, "models.m.hold.requests"),
    ({"models": {"m": {"hold": {"seconds": "long"}}}}, "models.m.hold.seconds"),
    ({"models": {"m": {"hold": 5}}}, "models.m.hold"),
    ({"models": {"m": {"parent": "none"}}}, "models.m.parent: 'none'"),
    ({"models": {"m": {"parent": "m"}}}, "models.m.parent"),
    ({"models": {"a": {}, "b": {"parent": "a"}, "c": {"parent": "b"}}}, "models.c.parent"),
    ({"models": {"a": {"task": "embed"}, "b": {"parent": "a"}}}, "models.b.task"),
    ({"adminPort": 70000}, "adminPort"),
    ({"adminPort": 8200}, "adminSha256"),
    ({"adminPort": 8100, "adminSha256": "a" * 64}, "adminPort"),
    ({"adminPort": 8200, "adminSha256": "secret"}, "adminSha256"),
    ({"keys": [{"name": "k", "sha256": "short"}]}, "keys[0].sha256"),
    ({"keys": [{"name": "k", "sha256": "a" * 64, "expires": "tomorrow"}]}, "keys[0].expires"),
    ({"keys": [{"name": "k", "sha256": "a" * 64, "models": "*"}]}, "keys[0].models"),
    ({"readTimeoutSeconds": float("inf")}, "readTimeoutSeconds"),
]


def test_a_target_may_be_a_plain_url():
    config = parse({"models": {"m": {"revisions": [{"digest": "a", "targets": ["http://x/m/"]}]}}})
    assert config.models["m"].revisions[0].targets == (Target("http://x/m", 0, "", 0),)
    assert config.models["m"].hold == Hold(256, 300.0)


@pytest.mark.parametrize(("raw", "words"), WRONG)
def test_a_wrong_config_is_refused_by_name(raw, words):
    with pytest.raises(UsageInvalid, match=re.escape(words)):
        parse(raw)


def test_a_config_file_that_is_missing_or_torn_is_named(tmp_path):
    with pytest.raises(UsageInvalid, match="no such file"):
        read(tmp_path / "none.json")
    (tmp_path / "torn.json").write_text('{"port": 81')
    with pytest.raises(UsageInvalid, match=r"torn\.json"):
        read(tmp_path / "torn.json")


words = st.text(max_size=20).map(lambda text: json.dumps({"delta": {"content": text}}))


@given(st.lists(words, max_size=12), st.lists(st.integers(1, 40), min_size=1), st.sampled_from([b"\n\n", b"\r\n\r\n"]))
def test_events_come_out_whole_unchanged_and_counted_however_they_are_cut(texts, cuts, end):
    sent = b"".join(b"data: " + text.encode() + end for text in [*texts, "[DONE]"])
    cutter = EventCutter()
    got = []
    rest, turn = sent, 0
    while rest:
        size = cuts[turn % len(cuts)]
        got.append(cutter.feed(rest[:size]))
        rest, turn = rest[size:], turn + 1
    assert all(piece.endswith(end) for piece in got if piece)
    assert b"".join(got) == sent
    assert cutter.done
    assert cutter.tokens == len(texts)


def test_the_opening_event_of_a_chat_is_no_token_and_the_engines_count_wins():
    cutter = EventCutter()
    cutter.feed(b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n')
    cutter.feed(b'data: {"choices":[{"index":0,"delta":{"content":"\\"completion_tokens\\": 99"}}]}\n\n')
    assert cutter.tokens == 1
    cutter.feed(b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":7}}\n\n')
    assert cutter.tokens == 7
    assert not cutter.done
    assert cutter.finish() == b""


def test_done_inside_a_text_is_not_the_end():
    cutter = EventCutter()
    cutter.feed(b'data: {"choices":[{"delta":{"content":"data: [DONE]"}}]}\n\n')
    assert not cutter.done
    assert cutter.feed(b"data: [DONE]\n") == b""
    assert cutter.finish() == b"data: [DONE]\n\n"
    assert cutter.done


def test_a_model_may_be_listed_by_name_or_by_star():
    assert replace(CONFIG.keys[0], models=("a", "b")).allows("b")
    assert not CONFIG.keys[0].allows("other")
    assert CONFIG.keys[1].allows("other")
    assert CONFIG.keys[0].allows("polite", "chat")
    assert not CONFIG.keys[0].allows("polite", "other")
    assert not CONFIG.keys[0].allows("polite")
    assert parse(to_json(CONFIG)) == CONFIG
