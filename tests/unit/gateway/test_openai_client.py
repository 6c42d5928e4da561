"""The official Python client against the gateway, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from fastserve.gateway.config import Hold

openai = pytest.importorskip("openai")


@contextlib.asynccontextmanager
async def client_of(stand, kit, **more):
    patience = openai.Timeout(600.0)  # its own five seconds for a connection are over soon on a busy machine
    settings = {"api_key": kit.KEY, "max_retries": 0, "timeout": patience, **more}
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{stand.port}/v1", **settings) as client:
        yield client


def test_it_lists_models_and_reads_a_whole_answer(play, kit):
    async def scenario(stand):
        await stand.one_engine()
        async with client_of(stand, kit) as client:
            assert [model.id async for model in client.models.list()] == ["chat"]
            assert (await client.models.retrieve("chat")).owned_by == "fastserve"
            answer = await client.chat.completions.create(**kit.chat())
            assert answer.choices[0].message.content == "Paris"
            assert answer.usage.completion_tokens == 3
            assert answer._request_id.startswith("req-")

    play(scenario)


def test_it_reads_a_stream(play, kit):
    async def scenario(stand):
        await stand.one_engine()
        async with client_of(stand, kit) as client:
            stream = await client.chat.completions.create(**kit.chat(stream=True))
            words = [chunk.choices[0].delta.content async for chunk in stream]
            assert "".join(words) == "The capital is Paris"

    play(scenario)


def test_it_raises_when_a_replica_is_lost_in_mid_stream(play, kit):
    async def torn(request, body):
        return await kit.streams(request, [kit.event("The"), b'data: {"cho'])

    async def scenario(stand):
        await stand.one_engine(torn)
        async with client_of(stand, kit) as client:
            stream = await client.chat.completions.create(**kit.chat(stream=True))
            assert (await anext(stream)).choices[0].delta.content == "The"
            with pytest.raises(openai.APIError, match="lost in the middle"):
                await anext(stream)

    play(scenario)


def test_it_sees_the_right_class_for_every_refusal(play, kit):
    async def scenario(stand):
        engine = await stand.one_engine()
        async with client_of(stand, kit) as client:
            with pytest.raises(openai.BadRequestError) as wrong:
                await client.chat.completions.create(**kit.chat(temperature=9))
            assert wrong.value.param == "temperature"
            with pytest.raises(openai.NotFoundError) as missing:
                await client.chat.completions.create(**kit.chat(model="none"))
            assert missing.value.code == "model_not_found"
            stand.serve(hold=Hold(seconds=0.05))
            with pytest.raises(openai.InternalServerError) as cold:
                await client.chat.completions.create(**kit.chat())
            assert cold.value.code == "model_loading"
        async with client_of(stand, kit, api_key="fs-" + "x" * 40) as client:
            with pytest.raises(openai.AuthenticationError) as denied:
                await client.models.list()
            assert denied.value.code == "invalid_api_key"
        assert engine.asked == []

    play(scenario)


def test_fifty_clients_at_once_are_all_served(play, kit):
    async def scenario(stand):
        await stand.one_engine()

        async def one(client):
            stream = await client.chat.completions.create(**kit.chat(stream=True))
            return "".join([chunk.choices[0].delta.content async for chunk in stream])

        async with client_of(stand, kit) as client:
            assert set(await asyncio.gather(*(one(client) for _ in range(50)))) == {"The capital is Paris"}

    play(scenario)
