import asyncio
import json
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from planes.assets import AssetsUnavailable, fetch_card
from planes.events import EventPlaneUnavailable
from workers.model_card import CardPublisher, read_card, read_parser_names
from workers.parsers import ParserNames
from workers.settings import SIM_MODEL


class FakeStore:
    def __init__(self, failures=0):
        self.objects, self.failures = {}, failures
        self.was_away, self.was_filled = asyncio.Event(), asyncio.Event()

    async def has(self, name):
        return name in self.objects

    async def put(self, name, data):
        if self.failures:
            self.failures -= 1
            self.was_away.set()
            raise EventPlaneUnavailable("away")
        self.objects[name] = data
        if len(self.objects) == 4:  # three files and the card
            self.was_filled.set()

    async def get(self, name):
        return self.objects[name]


class FakePlane:
    def __init__(self):
        self.connect = None

    def on_connect(self, callback):
        self.connect = callback


async def sim_card():
    return await read_card(SIM_MODEL, model="sim", block_size=16)


@asynccontextmanager
async def running(publisher):
    task = asyncio.create_task(publisher.run())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_the_card_is_stored_with_its_files_under_the_digest_known_before(tmp_path):
    store, plane = FakeStore(), FakePlane()
    publisher = CardPublisher(SIM_MODEL, await sim_card(), store, plane)
    plane.connect()
    async with running(publisher):
        await publisher.published.wait()
    loaded = await fetch_card(store, publisher.digest, tmp_path)
    assert (loaded.card.model, loaded.card.block_size) == ("sim", 16)
    assert 259 in loaded.card.eos_token_ids
    assert loaded.files["tokenizer.json"] == (SIM_MODEL / "tokenizer.json").read_bytes()


async def test_a_store_that_failed_is_tried_again_with_the_next_connection():
    store, plane = FakeStore(failures=1), FakePlane()
    publisher = CardPublisher(SIM_MODEL, await sim_card(), store, plane)
    plane.connect()
    async with running(publisher):
        await store.was_away.wait()
        assert not publisher.published.is_set()
        plane.connect()
        await publisher.published.wait()
    assert publisher.digest in store.objects


async def test_a_store_that_lost_everything_is_filled_again():
    store, plane = FakeStore(), FakePlane()
    publisher = CardPublisher(SIM_MODEL, await sim_card(), store, plane)
    plane.connect()
    async with running(publisher):
        await publisher.published.wait()
        store.objects.clear()
        store.was_filled.clear()
        plane.connect()
        await store.was_filled.wait()


async def test_a_directory_without_a_tokenizer_makes_no_card(tmp_path: Path):
    with pytest.raises(AssetsUnavailable, match=r"tokenizer\.json"):
        await read_card(tmp_path, model="m", block_size=16)


async def test_a_store_that_is_emptied_while_everybody_stays_connected_is_filled_again():
    store, plane = FakeStore(), FakePlane()
    publisher = CardPublisher(SIM_MODEL, await sim_card(), store, plane, look_s=0.001)
    plane.connect()
    async with running(publisher):
        await store.was_filled.wait()
        store.was_filled.clear()
        store.objects.clear()
        await store.was_filled.wait()
    assert publisher.digest in store.objects


RESPONSES = {
    "start_anchor": "<|assistant|>",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "content": {},
        "tool_calls": {"open": "<call>", "close": "</call>", "repeats": True, "content": "json"},
    },
}
"""As a checkpoint describes what its answers look like."""


def model_with(folder, **config):
    (folder / "tokenizer.json").write_bytes((SIM_MODEL / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


async def test_a_checkpoint_that_describes_its_responses_is_read_by_that_and_its_card_says_so(tmp_path):
    model = model_with(tmp_path, response_template=RESPONSES, chat_template="<tool_call> </think>")
    names = read_parser_names(model, "auto", "auto", engine="vllm")
    assert names == ParserNames("hf", "hf")
    card = await read_card(model, model="m", block_size=16, parsers=names)
    assert (card.tool_parser, card.reasoning_parser) == ("hf", "hf")


def test_an_engine_that_cannot_read_by_it_and_a_checkpoint_without_it_go_by_the_chat_template(tmp_path):
    model = model_with(tmp_path, response_template=RESPONSES, chat_template="<tool_call> </think>")
    assert read_parser_names(model, "auto", "auto", engine="sim") == ParserNames("tags", "think")
    model_with(tmp_path, response_template=None, chat_template="<tool_call>")
    assert read_parser_names(model, "auto", "auto", engine="vllm") == ParserNames("tags", "")


@pytest.mark.parametrize(
    "config", [{"response_template": "x"}, {"response_template": {"fields": ["content"]}}], ids=str
)
def test_a_description_that_is_none_is_refused_by_the_file_s_name(config, tmp_path):
    with pytest.raises(AssetsUnavailable, match=r"tokenizer_config\.json cannot be used: .*response_template"):
        read_parser_names(model_with(tmp_path, **config), "auto", "auto", engine="vllm")
