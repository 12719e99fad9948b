import asyncio

import pytest

from loadtest.client import Client
from loadtest.closed_loop import CHAT, MESSAGES, RESPONSES, Api
from planes.wire.messages import WorkerId
from workers.answer.detokenizer import load_vocabulary
from workers.engine.make import make_engine
from workers.settings import SIM_MODEL, WorkerSettings
from workers.sim.plain import PlainServer

COMPLETIONS = Api("/v1/completions", "max_tokens")


class Nobody:
    def kv_changed(self, events): ...
    def stepped(self, sample): ...
    def died(self, reason): ...


async def asking(ask, **settings):
    """What `ask` makes of a client of a plain worker."""
    vocabulary = load_vocabulary(SIM_MODEL / "tokenizer.json")
    told = WorkerSettings(engine="sim", handover="none", speedup=1000.0, **settings)
    engine = make_engine(told, WorkerId("w"), vocab_size=len(vocabulary.names))
    await engine.start(Nobody(), progress=lambda _: None)
    server = PlainServer(engine, "sim", vocabulary)
    port = await server.listen("127.0.0.1", 0)
    client = Client("127.0.0.1", port, keeps_text=True)
    try:
        return await ask(client, engine)
    finally:
        client.close()
        server.close()
        await engine.stop()


def body_of(api, *, is_streaming, tokens=5):
    body = api.body("sim", "hello there", tokens, is_streaming=is_streaming)
    if api is COMPLETIONS:
        body["prompt"] = "hello there"
        del body["messages"]
    return body


@pytest.mark.parametrize("is_streaming", [True, False])
@pytest.mark.parametrize("api", [CHAT, COMPLETIONS, RESPONSES, MESSAGES], ids=lambda api: api.path)
def test_each_api_is_answered_with_what_the_engine_says(api, is_streaming):
    async def ask(client, engine):
        body = body_of(api, is_streaming=is_streaming)
        return [await client.post(api.path, body) for _ in range(2)]

    first, second = asyncio.run(asking(ask))
    assert (first.error, first.status) == ("", 200)
    assert (first.prompt_tokens or 11, first.completion_tokens) == (11, 5)
    if is_streaming:
        assert len(first.text) == 5
        assert len(first.gaps_s) == 4
        assert first.text == second.text


def test_what_it_does_not_know_is_said_and_the_connection_goes_on():
    async def ask(client, engine):
        strange = await client.post("/v1/embeddings", {})
        broken = await client.post(CHAT.path, ["no object"])
        return strange, broken, await client.post(CHAT.path, body_of(CHAT, is_streaming=True))

    strange, broken, well = asyncio.run(asking(ask))
    assert strange.status == 404
    assert "/v1/embeddings is none of /v1/chat/completions" in strange.error
    assert broken.status == 400
    assert well.completion_tokens == 5


def test_a_client_that_leaves_ends_its_request():
    async def ask(client, engine):
        asked = asyncio.create_task(client.post(CHAT.path, body_of(CHAT, is_streaming=True, tokens=20_000)))
        while not engine.load().num_running:  # noqa: ASYNC110 - the engine tells nobody
            await asyncio.sleep(0)
        client.close()
        asked.cancel()
        while engine.load().num_running:  # noqa: ASYNC110
            await asyncio.sleep(0)
        return True

    assert asyncio.run(asking(ask))
