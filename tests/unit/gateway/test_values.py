"""Keys, config, events and routes as plain values."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from datetime import date
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.errors import UsageInvalid
from fastserve.gateway.config import Config, Key, Revision, Served, parse, read, to_json, write
from fastserve.gateway.keys import KEY, digest, new_key
from fastserve.gateway.routes import Router
from fastserve.gateway.sse import EventCutter

CONFIG = Config(
    port=8123,
    models={"chat": Served("generate", 7, (Revision("a" * 64, 95, ("http://127.0.0.1:8000/m/chat/aa",)),))},
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
    ({"keys": [{"name": "k", "sha256": "short"}]}, "keys[0].sha256"),
    ({"keys": [{"name": "k", "sha256": "a" * 64, "expires": "tomorrow"}]}, "keys[0].expires"),
    ({"keys": [{"name": "k", "sha256": "a" * 64, "models": "*"}]}, "keys[0].models"),
    ({"readTimeoutSeconds": float("inf")}, "readTimeoutSeconds"),
]


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


weights = st.lists(st.integers(0, 1000), min_size=1, max_size=6)


@given(weights, st.integers(0, 2**32))
def test_traffic_follows_the_weights_and_weight_zero_gets_nothing(shares, seed):
    revisions = tuple(Revision(str(at), share, (f"http://{at}",)) for at, share in enumerate(shares))
    router = Router({"m": Served("generate", 0, revisions)}, Random(seed))
    asked = 400
    choices = [router.choose("m") for _ in range(asked)]
    if not sum(shares):
        assert choices == [None] * asked
        return
    seen = Counter(choice.revision for choice in choices)
    for at, share in enumerate(shares):
        wanted = share / sum(shares)
        # Six standard deviations of a binomial count: a false alarm once in 10^8.
        assert abs(seen[str(at)] - asked * wanted) <= 6 * (asked * wanted * (1 - wanted)) ** 0.5 + 1e-9 + 2
        if not share:
            assert seen[str(at)] == 0


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 5))
def test_a_request_goes_to_a_target_with_the_least_to_do(steps, targets):
    names = tuple(f"http://{at}" for at in range(targets))
    router = Router({"m": Served("generate", 0, (Revision("r", 1, names),))}, Random(0))
    leases = []
    for step in steps:
        if step == 0 and leases:
            leases.pop(0).__exit__(None, None, None)
            continue
        choice = router.choose("m")
        assert router.running(choice.target) == min(router.running(name) for name in names)
        lease = router.lease(choice.target)
        lease.__enter__()
        leases.append(lease)
    for lease in leases:
        lease.__exit__(None, None, None)
    assert sum(router.running(name) for name in names) == 0


def test_a_second_try_avoids_the_first_target_where_it_can():
    revisions = (
        Revision("a", 100, ("http://1", "http://2")),
        Revision("b", 1, ("http://3",)),
        Revision("c", 0, ("http://4",)),
    )
    router = Router({"m": Served("generate", 0, revisions)}, Random(0))
    seen = {router.choose("m", ["http://1"]).target for _ in range(500)}
    assert seen == {"http://2", "http://3"}
    assert {router.choose("m", ["http://1", "http://2"]).target for _ in range(50)} == {"http://3"}
    every = ["http://1", "http://2", "http://3"]
    assert {router.choose("m", every).target for _ in range(2000)} == set(every)


def test_the_same_seed_chooses_the_same():
    revisions = (Revision("a", 50, ("http://1",)), Revision("b", 50, ("http://2",)))
    models = {"m": Served("generate", 0, revisions)}
    one, two = Router(models, Random(5)), Router(models, Random(5))
    assert [one.choose("m") for _ in range(50)] == [two.choose("m") for _ in range(50)]


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
    assert parse(to_json(CONFIG)) == CONFIG
