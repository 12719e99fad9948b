import json
from pathlib import Path

import msgspec
import pytest

from app.openai.errors import ModelNotFound
from app.prompt.catalog import ModelLoading, Models, ModelUnusable, NoModelYet
from planes.assets import AssetsUnavailable, make_card, read_model_files, sha256
from planes.wire.errors import HeadraceError
from tests.fakes import FACTS, registration

FILES = read_model_files(Path(__file__).parents[4] / "workers" / "sim" / "model")


class Store:
    def __init__(self):
        self.objects: dict[str, bytes] = {}
        self.num_asked = 0

    async def has(self, name):
        return name in self.objects

    async def put(self, name, data):
        self.objects[name] = data

    async def get(self, name):
        self.num_asked += 1
        if name not in self.objects:
            raise AssetsUnavailable(name)
        return self.objects[name]

    def publish(self, files, model="sim"):
        encoded = msgspec.json.encode(make_card(files, model=model, context_length=4096))
        for data in (*files.values(), encoded):
            self.objects[sha256(data)] = data
        return sha256(encoded)


@pytest.fixture
def store():
    return Store()


@pytest.fixture
def models(store, tmp_path):
    return Models(store, tmp_path)


def with_facts(digest, **facts):
    worker = registration("d0", card_digest=digest)
    return msgspec.structs.replace(worker, facts=msgspec.structs.replace(FACTS, **facts))


async def test_a_model_is_there_after_its_first_worker_and_fetched_once(models, store):
    digest = store.publish(FILES)
    with pytest.raises(NoModelYet):
        models.entry("sim")
    await models.load(registration("d0", card_digest=digest))
    with pytest.raises(ModelNotFound):
        models.entry("other")
    asked = store.num_asked
    await models.load(registration("d1", card_digest=digest))
    assert store.num_asked == asked
    entry = models.entry("sim")
    assert (entry.block_size, entry.context_length, entry.vocab_size) == (16, 4096, 300)
    assert entry.template is not None


async def test_until_its_files_have_come_a_known_model_is_loading(models, store):
    with pytest.raises(HeadraceError):
        await models.load(registration("d0", card_digest="0" * 64))
    with pytest.raises(ModelLoading, match="'sim' is being loaded"):
        models.entry("sim")


async def test_a_new_card_replaces_the_old_one(models, store):
    await models.load(registration("d0", card_digest=store.publish(FILES)))
    config = {key: value for key, value in json.loads(FILES["tokenizer_config.json"]).items() if key != "chat_template"}
    changed = {**FILES, "tokenizer_config.json": json.dumps(config).encode()}
    changed.pop("chat_template.jinja", None)
    await models.load(registration("d1", card_digest=store.publish(changed)))
    assert models.entry("sim").template is None


async def test_workers_of_one_model_must_agree_on_the_block_size(models, store):
    digest = store.publish(FILES)
    await models.load(with_facts(digest))
    with pytest.raises(ModelUnusable, match="blocks of 32 tokens; the model's other workers have 16"):
        await models.load(with_facts(digest, block_size=32))


async def test_the_smallest_context_counts(models, store):
    digest = store.publish(FILES)
    for length in (4096, 2048, 3000):
        await models.load(with_facts(digest, context_length=length))
    assert models.entry("sim").context_length == 2048


async def test_a_tokenizer_that_cannot_be_used_is_said_so(models, store):
    digest = store.publish({**FILES, "tokenizer.json": b"{}"})
    with pytest.raises(ModelUnusable, match=r"tokenizer\.json"):
        await models.load(registration("d0", card_digest=digest))


async def test_a_template_that_cannot_be_compiled_leaves_the_model_to_completions(models, store):
    digest = store.publish({**FILES, "chat_template.jinja": b"{% if %}"})
    await models.load(registration("d0", card_digest=digest))
    assert models.entry("sim").template is None


async def test_the_number_of_models_is_bounded(models, store):
    digest = store.publish(FILES)
    for number in range(66):
        await models.load(registration("d0", card_digest=digest, model=f"m{number}"))
    with pytest.raises(ModelNotFound):
        models.entry("m0")
    assert models.entry("m65").model == "m65"


async def test_the_longest_context_is_that_of_all_models(models, store):
    assert models.longest_context == 0
    for model, context_length in (("a", 1000), ("b", 4000), ("c", 2000)):
        worker = with_facts(store.publish(FILES, model), context_length=context_length)
        await models.load(msgspec.structs.replace(worker, model=model))
    assert models.longest_context == 4000
