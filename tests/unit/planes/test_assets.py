"""Model cards over a store that is a dictionary."""

from pathlib import Path

import msgspec
import pytest

from planes.assets import (
    AssetsUnavailable,
    ModelCard,
    chat_template,
    fetch_card,
    make_card,
    publish_card,
    read_model_files,
    sha256,
)

FILES = {
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"chat_template": "x"}',
    "generation_config.json": b'{"eos_token_id": [1, 106], "other": 1}',
}


class FakeStore:
    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.num_gets = 0

    async def has(self, name: str) -> bool:
        return name in self.objects

    async def put(self, name: str, data: bytes) -> None:
        self.objects.setdefault(name, data)

    async def get(self, name: str) -> bytes:
        self.num_gets += 1
        return self.objects[name]


@pytest.fixture
def card() -> ModelCard:
    return make_card(FILES, model="m", block_size=16)


async def test_what_is_fetched_is_what_was_published(card: ModelCard, tmp_path: Path) -> None:
    store = FakeStore()
    digest = await publish_card(store, card, FILES)
    loaded = await fetch_card(store, digest, tmp_path)
    assert loaded.card == card
    assert loaded.files == FILES
    assert loaded.digest == digest


async def test_the_same_files_in_another_order_have_the_same_digest(card: ModelCard) -> None:
    again = make_card(dict(reversed(FILES.items())), model="m", block_size=16)
    assert await publish_card(FakeStore(), again, FILES) == await publish_card(FakeStore(), card, FILES)


async def test_a_second_fetch_comes_from_the_cache(card: ModelCard, tmp_path: Path) -> None:
    store = FakeStore()
    digest = await publish_card(store, card, FILES)
    await fetch_card(store, digest, tmp_path / "cache")
    gets = store.num_gets
    assert (await fetch_card(store, digest, tmp_path / "cache")).files == FILES
    assert store.num_gets == gets


async def test_a_damaged_cache_is_fetched_again(card: ModelCard, tmp_path: Path) -> None:
    store = FakeStore()
    digest = await publish_card(store, card, FILES)
    await fetch_card(store, digest, tmp_path)
    for name in (digest, *card.files.values()):
        (tmp_path / name).write_bytes(b"damaged")
    assert (await fetch_card(store, digest, tmp_path)).files == FILES


async def test_an_object_with_another_digest_is_refused(card: ModelCard, tmp_path: Path) -> None:
    store = FakeStore()
    digest = await publish_card(store, card, FILES)
    store.objects[card.files["tokenizer.json"]] = b"other"
    with pytest.raises(AssetsUnavailable, match="holds 5 bytes with the digest"):
        await fetch_card(store, digest, tmp_path)


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "A" * 64, "0" * 63])
async def test_a_digest_that_is_none_never_becomes_a_path(digest: str, tmp_path: Path) -> None:
    with pytest.raises(AssetsUnavailable, match="no sha256"):
        await fetch_card(FakeStore(), digest, tmp_path)


async def test_a_malformed_card_is_refused(tmp_path: Path) -> None:
    store = FakeStore()
    store.objects[sha256(b"{}")] = b"{}"
    with pytest.raises(AssetsUnavailable, match="malformed"):
        await fetch_card(store, sha256(b"{}"), tmp_path)


async def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(card: ModelCard, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = FakeStore()
    digest = await publish_card(store, card, FILES)
    assert (await fetch_card(store, digest, tmp_path / "file" / "cache")).files == FILES


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": b'{"eos_token_id": 2}', "config.json": b'{"eos_token_id": 3}'}, [2]),
        ({"generation_config.json": b"{}", "config.json": b'{"eos_token_id": [3]}'}, [3]),
        ({}, []),
    ],
)
def test_end_of_sequence_tokens(files: dict[str, bytes], expected: list[int]) -> None:
    assert make_card(files, model="m", block_size=16).eos_token_ids == expected


def test_a_broken_config_is_refused() -> None:
    with pytest.raises(AssetsUnavailable, match=r"generation_config\.json is malformed"):
        make_card({"generation_config.json": b"{"}, model="m", block_size=16)


def test_only_files_of_interest_are_read(tmp_path: Path) -> None:
    for name in (*FILES, "model.safetensors"):
        (tmp_path / name).write_bytes(FILES.get(name, b""))
    assert read_model_files(tmp_path) == FILES


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssetsUnavailable, match=r"no tokenizer\.json"):
        read_model_files(tmp_path)


def test_cards_of_a_newer_worker_are_understood() -> None:
    newer = b'{"model":"m","context_length":1,"eos_token_ids":[],"files":{},"new":1}'
    assert msgspec.json.decode(newer, type=ModelCard).model == "m"


@pytest.mark.parametrize(
    ("config", "source"),
    [
        ({}, None),
        ({"chat_template": "x"}, "x"),
        ({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}, "d"),
        ({"chat_template": [{"name": "tool_use", "template": "t"}]}, None),
        ({"chat_template": 3}, None),
    ],
)
def test_the_template_is_found_in_the_configuration(config, source):
    assert chat_template({"tokenizer_config.json": msgspec.json.encode(config)}) == source


def test_a_template_in_a_file_of_its_own_comes_first():
    assert chat_template({"chat_template.jinja": b"own", "tokenizer_config.json": b'{"chat_template": "x"}'}) == "own"
