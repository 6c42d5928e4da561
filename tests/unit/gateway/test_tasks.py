"""Vectors, ranks, speech and adapters: what each task's clients ask for, and what reaches the engine."""

from __future__ import annotations

import json

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from fastserve.gateway import reshape
from fastserve.gateway.answers import Refusal
from fastserve.gateway.config import Revision, Target
from fastserve.gateway.forms import KINDS, Upload, build, parse

RESULTS = [
    {"index": 0, "document": {"text": "interest rate"}, "relevance_score": 0.143},
    {"index": 1, "document": {"text": "kitten"}, "relevance_score": 0.624},
    {"index": 2, "document": {"text": "train to Oslo"}, "relevance_score": 0.091},
]
RERANK = {"model": "words", "query": "young cat", "documents": ["interest rate", "kitten", "train to Oslo"]}


async def answers_unsorted(request, body):
    """An engine that neither sorts nor cuts."""
    return web.json_response({"id": "r", "model": body["model"], "results": RESULTS, "usage": {"total_tokens": 9}})


async def echoes(request, body):
    return web.json_response({"object": "list", "data": [], "model": body["model"]})


@pytest.mark.parametrize("task", ["embed", "score"])
def test_rerank_is_sorted_cut_and_paired_by_index(play, kit, task):
    async def scenario(stand):
        engine = await stand.one_engine(answers_unsorted, model="words", task=task)
        for top_n, wanted in ((2, [1, 0]), (None, [1, 0, 2]), (3, [1, 0, 2]), (10, [1, 0, 2]), (1, [1])):
            answer = await stand.ask({**RERANK, "top_n": top_n}, path="/v1/rerank")
            assert answer.status == 200
            assert [result["index"] for result in answer.json["results"]] == wanted
            assert answer.json["results"][0]["document"] == {"text": "kitten"}
            assert answer.json["usage"] == {"total_tokens": 9}
        assert set(engine.paths) == {"/m/one/rerank"}
        for wrong, param in (({"top_n": 0}, "top_n"), ({"documents": []}, "documents"), ({"query": None}, "query")):
            answer = await stand.ask({**RERANK, **wrong}, path="/v1/rerank")
            assert (answer.status, answer.error["param"]) == (400, param)

    play(scenario)


scores = st.lists(st.floats(-1, 1), min_size=1, max_size=20)


@given(scores, st.one_of(st.none(), st.integers(1, 30)))
def test_any_scores_come_best_first_with_their_own_index(values, top_n):
    results = [{"index": at, "relevance_score": value} for at, value in enumerate(values)]
    body, kind = reshape.ranked(json.dumps({"results": results}).encode(), top_n)
    found = json.loads(body)["results"]
    assert kind == "application/json"
    assert len(found) == min(len(values), top_n or len(values))
    assert [result["relevance_score"] for result in found] == sorted(values, reverse=True)[: len(found)]
    assert all(values[result["index"]] == result["relevance_score"] for result in found)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"results": 1}', b'{"results": [{}]}', b'{"results": [{"a": 1}]}']
)
def test_a_rerank_answer_that_is_none_is_an_engines_fault(body):
    with pytest.raises(Refusal) as caught:
        reshape.ranked(body, None)
    assert caught.value.status == 502


@pytest.mark.parametrize("task", ["embed", "score"])
def test_scores_are_asked_of_models_that_rank_and_of_those_that_make_vectors(play, kit, task):
    async def scenario(stand):
        engine = await stand.one_engine(echoes, model="words", task=task)
        body = {"model": "words", "text_1": "q", "text_2": ["a", "b"]}
        assert (await stand.ask(body, path="/v1/score")).status == 200
        assert engine.paths == ["/m/one/score"]
        assert engine.asked == [body]

    play(scenario)


@pytest.mark.parametrize("more", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}, {"dimensions": 128}])
def test_embeddings_are_asked_as_the_client_wants_them(play, kit, more):
    async def scenario(stand):
        engine = await stand.one_engine(echoes, model="words", task="embed")
        body = {"model": "words", "input": ["cat", "kitten"], **more}
        assert (await stand.ask(body, path="/v1/embeddings")).status == 200
        assert engine.asked == [body]

    play(scenario)


WRONG_INPUTS = [
    ({"input": []}, "input"),
    ({"input": ""}, "input"),
    ({"input": ["a", ""]}, "input"),
    ({"input": None}, "input"),
    ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ({"input": "a", "dimensions": 0}, "dimensions"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG_INPUTS)
def test_wrong_embeddings_are_named(play, kit, fields, param):
    async def scenario(stand):
        engine = await stand.one_engine(echoes, model="words", task="embed")
        answer = await stand.ask({"model": "words", **fields}, path="/v1/embeddings")
        assert (answer.status, answer.error["param"]) == (400, param)
        assert engine.asked == []

    play(scenario)


ENGINES_WORDS = [
    (
        "Model 'words' does not support Matryoshka embeddings; dimensions must be unset (received dimensions=128).",
        ("dimensions", None),
    ),
    ("Model 'words' only supports dimensions in range [1, 384], got 500.", ("dimensions", None)),
    (
        '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser',
        ("tools", "unsupported_parameter"),
    ),
    (
        "The provided JSON schema contains features not supported by xgrammar.",
        ("response_format", "invalid_json_schema"),
    ),
    ("This model's maximum context length is 10 tokens", (None, "context_length_exceeded")),
    ("something else", (None, None)),
]


@pytest.mark.parametrize(("words", "wanted"), ENGINES_WORDS)
def test_an_engines_refusal_gets_the_fields_name_and_a_code(play, kit, words, wanted):
    async def scenario(stand):
        async def refuses(request, body):
            error = {"message": words, "type": "BadRequestError", "param": None, "code": 400}
            return web.json_response({"error": error}, status=400)

        await stand.one_engine(refuses)
        answer = await stand.ask(kit.chat())
        assert answer.status == 400
        assert (answer.error["param"], answer.error["code"]) == wanted
        if wanted[0] == "tools":
            assert "no parser for calls of tools" in answer.error["message"]

    play(scenario)


def test_a_route_of_another_task_names_the_models_task(play, kit):
    async def scenario(stand):
        for task in ("embed", "score", "transcribe"):
            await stand.one_engine(model=task, task=task)
            answer = await stand.ask(kit.chat(model=task))
            assert (answer.status, answer.error["code"]) == (400, "unsupported_endpoint")
            assert task in answer.error["message"]

    play(scenario)


# -- speech ----------------------------------------------------------------------------------------------------------


def form_of(file=b"RIFF\r\n--sound", name="a.wav", **fields):
    form = aiohttp.FormData(default_to_multipart=True)
    for field, value in fields.items():
        for item in value if isinstance(value, list) else [value]:
            form.add_field(field.replace("_list", "[]"), item)
    if file is not None:
        form.add_field("file", file, filename=name, content_type="audio/wav")
    return form


async def send(stand, kit, form, path="/v1/audio/transcriptions"):
    url = f"http://127.0.0.1:{stand.port}{path}"
    async with stand.session.post(url, data=form, headers={"Authorization": f"Bearer {kit.KEY}"}) as response:
        return response.status, response.headers, await response.read()


async def transcribes(request, body):
    return web.json_response({"text": "guten Tag", "usage": {"type": "duration", "seconds": 1}})


def test_speech_is_passed_on_in_a_form_of_our_own(play, kit):
    async def scenario(stand):
        engine = await stand.one_engine(transcribes, model="ear", task="transcribe")
        form = form_of(model="ear", language="de", temperature="0.5", chunking_strategy="auto")
        status, headers, body = await send(stand, kit, form)
        assert (status, json.loads(body)["text"]) == (200, "guten Tag")
        assert headers["X-FastServe-Ignored"] == "chunking_strategy"
        assert engine.paths == ["/m/one/v1/audio/transcriptions"]
        inner = parse(engine.headers[0]["Content-Type"], engine.asked[0]["raw"])
        assert inner == {
            "model": "ear",
            "language": "de",
            "temperature": "0.5",
            "file": Upload("wav", b"RIFF\r\n--sound"),
        }
        assert b"a.wav" not in engine.asked[0]["raw"]
        assert b"chunking" not in engine.asked[0]["raw"]

    play(scenario)


def test_a_transcript_may_be_asked_for_as_text_and_with_times(play, kit):
    async def scenario(stand):
        engine = await stand.one_engine(transcribes, model="ear", task="transcribe")
        status, headers, body = await send(stand, kit, form_of(model="ear", response_format="text"))
        assert (status, body) == (200, b"guten Tag")
        assert headers["Content-Type"].startswith("text/plain")
        times = form_of(model="ear", response_format="verbose_json", timestamp_granularities_list=["word", "segment"])
        assert (await send(stand, kit, times))[0] == 200
        inner = parse(engine.headers[1]["Content-Type"], engine.asked[1]["raw"], ["timestamp_granularities[]"])
        assert inner["timestamp_granularities[]"] == ["word", "segment"]
        assert (await send(stand, kit, form_of(model="ear"), "/v1/audio/translations"))[0] == 200
        assert engine.paths[-1] == "/m/one/v1/audio/translations"

    play(scenario)


WRONG_FORMS = [
    (form_of, {"file": None, "model": "ear"}, "file"),
    (form_of, {"file": b"", "model": "ear"}, "file"),
    (form_of, {"name": "a.exe", "model": "ear"}, "file"),
    (form_of, {}, "model"),
    (form_of, {"model": "ear", "response_format": "srt"}, "response_format"),
    (form_of, {"model": "ear", "temperature": "hot"}, "temperature"),
    (form_of, {"model": "ear", "temperature": "nan"}, "temperature"),
    (form_of, {"model": "ear", "temperature": "2"}, "temperature"),
    (form_of, {"model": "ear", "language": "x" * 17}, "language"),
    (form_of, {"model": "ear", "language": ["de", "en"]}, "language"),
    (form_of, {"model": "ear", "timestamp_granularities_list": ["word"]}, "timestamp_granularities[]"),
    (form_of, {"model": "ear", "stream": "true"}, "stream"),
    (form_of, {"model": "ear", "vllm_xargs": "{}"}, "vllm_xargs"),
]


@pytest.mark.parametrize(("make", "fields", "param"), WRONG_FORMS)
def test_a_wrong_form_is_named_and_reaches_no_engine(play, kit, make, fields, param):
    async def scenario(stand):
        engine = await stand.one_engine(transcribes, model="ear", task="transcribe")
        status, _, body = await send(stand, kit, make(**fields))
        assert (status, json.loads(body)["error"]["param"]) == (400, param)
        assert engine.asked == []

    play(scenario)


def test_a_form_that_is_too_long_or_none_is_refused(play, kit):
    async def scenario(stand):
        engine = await stand.one_engine(transcribes, model="ear", task="transcribe")
        status, _, body = await send(stand, kit, form_of(b"x" * 3000, model="ear"))
        assert (status, json.loads(body)["error"]["code"]) == (413, "request_too_large")
        status, _, _ = await send(stand, kit, form_of(b"x" * 1000, model="ear"))
        assert status == 200  # longer than a JSON body may be
        answer = await stand.ask({"model": "ear", "file": "x"}, path="/v1/audio/transcriptions")
        assert (answer.status, answer.error["code"]) == (415, "unsupported_media_type")
        forms = ("multipart/form-data", "multipart/form-data; boundary=b")
        for kind in forms:
            torn = await stand.ask(path="/v1/audio/transcriptions", data=b"--b\r\n", headers={"Content-Type": kind})
            assert (torn.status, torn.error["code"]) == (400, "invalid_form")
        assert len(engine.asked) == 1

    play(scenario, max_body_bytes=500, max_upload_bytes=2500)


sounds = st.binary(min_size=1, max_size=300).map(lambda data: data + b"\r\n--fastserve\r\n\r\n")


@given(st.dictionaries(st.sampled_from(["model", "prompt", "language"]), st.text(max_size=40)), sounds)
def test_a_form_that_was_built_is_read_back_the_same(fields, data):
    fields = {name: value.replace("\x00", "") for name, value in fields.items()}
    kind, body = build({**fields, "many[]": ["a", "b"]}, Upload("mp3", data))
    assert parse(kind, body, ["many[]"]) == {**fields, "many[]": ["a", "b"], "file": Upload("mp3", data)}


@given(st.binary(max_size=400), st.sampled_from(["multipart/form-data; boundary=b", 'x; boundary="b c"', "x"]))
def test_any_bytes_are_a_form_or_a_refusal(body, kind):
    for whole in (body, b"--b" + body + b"\r\n--b--\r\n", b"--b\r\n" + body + b"\r\n--b--"):
        outcome = 200
        try:
            parse(kind, whole)
        except Refusal as refusal:
            outcome = refusal.status
        assert outcome in (200, 400)


def test_the_official_client_sends_speech(play, kit):
    openai = pytest.importorskip("openai")

    async def scenario(stand):
        await stand.one_engine(transcribes, model="ear", task="transcribe")
        url = f"http://127.0.0.1:{stand.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=kit.KEY, max_retries=0) as client:
            whole = await client.audio.transcriptions.create(model="ear", file=("a.mp3", b"ID3"))
            assert whole.text == "guten Tag"
            words = await client.audio.transcriptions.create(
                model="ear", file=("a.flac", b"fLaC"), response_format="text", language="de"
            )
            assert str(words) == "guten Tag"
        assert "mp3" in KINDS

    play(scenario)


# -- adapters --------------------------------------------------------------------------------------------------------


def test_an_adapter_is_a_model_beside_its_parent(play, kit):
    async def scenario(stand):
        engine = await stand.engine()
        revision = Revision("a" * 64, 100, (Target(engine.url),))
        stand.serve(revision, model="other")
        stand.serve(revision, model="polite", parent="other")
        rows = (await stand.ask(path="/v1/models", method="GET", key=kit.NARROW)).json["data"]
        assert [(row["id"], row.get("parent")) for row in rows] == [("other", None), ("polite", "other")]
        answer = await stand.ask(kit.chat(model="polite"), key=kit.NARROW)
        assert answer.status == 200
        assert engine.asked[0]["model"] == "polite"
        stand.serve(revision, model="foreign", parent="chat")
        assert (await stand.ask(kit.chat(model="foreign"), key=kit.NARROW)).error["code"] == "model_not_found"

    play(scenario)


def test_an_adapter_that_a_replica_is_just_loading_is_asked_for_again(play, kit):
    async def scenario(stand):
        async def loads(request, body):
            if len(engine.asked) == 1:
                error = {"message": "The model `polite` does not exist.", "type": "NotFoundError", "code": 404}
                return web.json_response({"error": error}, status=404)
            return await kit.answers_well(request, body)

        engine = await stand.one_engine(loads)
        assert (await stand.ask(kit.chat())).status == 200
        assert stand.stats()["chat"]["revisions"]["a" * 64]["errors"] == 0

    play(scenario)
