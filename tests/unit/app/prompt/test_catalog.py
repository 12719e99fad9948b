import json
from pathlib import Path

import msgspec
import pytest

from app.openai.errors import ModelNotFound
from app.prompt.card import CardUnusable, ModelUnusable, RenderingDiffers
from app.prompt.catalog import ModelBroken, ModelLoading, Models, NoModelYet, NoWorkerLeft
from planes.assets import AssetsUnavailable, make_card, read_model_files, sha256
from planes.wire.errors import HeadraceError, InvalidRequest
from planes.wire.messages import Adapter, Role, WorkerId, WorkerState
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

    def publish(self, files, model="sim", **more):
        encoded = msgspec.json.encode(make_card(files, model=model, block_size=16, **more))
        for data in (*files.values(), encoded):
            self.objects[sha256(data)] = data
        return sha256(encoded)


@pytest.fixture
def store():
    return Store()


@pytest.fixture
def models(store, tmp_path):
    return Models(store, tmp_path)


def worker(name, digest, role=Role.BOTH, *, epoch=1, model="sim", state=WorkerState.READY, **facts):
    found = registration(name, role, epoch=epoch, card_digest=digest, model=model, state=state)
    return msgspec.structs.replace(found, facts=msgspec.structs.replace(FACTS, **facts))


async def join(models, *workers):
    for each in workers:
        models.registered(each)
        await models.load(each)
        models.worker_up(each.worker)


def without_template(store, model="sim"):
    config = {key: value for key, value in json.loads(FILES["tokenizer_config.json"]).items() if key != "chat_template"}
    changed = {**FILES, "tokenizer_config.json": json.dumps(config).encode()}
    changed.pop("chat_template.jinja", None)
    return store.publish(changed, model)


async def test_a_model_is_there_after_its_first_worker_and_fetched_once(models, store):
    digest = store.publish(FILES)
    with pytest.raises(NoModelYet):
        models.entry("sim")
    await join(models, worker("d0", digest))
    with pytest.raises(ModelNotFound):
        models.entry("other")
    asked = store.num_asked
    await join(models, worker("d1", digest))
    assert store.num_asked == asked
    entry = models.entry("sim")
    assert (entry.block_size, entry.context_length, entry.vocab_size, entry.digest) == (16, 4096, 300, digest)
    assert entry.template is not None


async def test_until_its_files_have_come_a_known_model_is_loading(models, store):
    missing = worker("d0", "0" * 64)
    models.registered(missing)
    with pytest.raises(HeadraceError):
        await models.load(missing)
    with pytest.raises(ModelLoading, match="'sim' is being loaded"):
        models.entry("sim")


async def test_a_model_whose_only_card_cannot_be_used_is_not_said_to_be_loading(models, store):
    broken = worker("d0", store.publish({**FILES, "tokenizer.json": b"{}"}))
    models.registered(broken)
    with pytest.raises(CardUnusable):
        await models.load(broken)
    with pytest.raises(ModelBroken, match="GET /v1/fleet"):
        models.entry("sim")
    await join(models, worker("d1", store.publish(FILES)))
    assert models.entry("sim").digest != broken.card_digest
    models.deregistered(WorkerId("d1"))
    models.deregistered(WorkerId("d0"))
    models.registered(broken)  # a new worker may bring the same card and this gateway another version
    with pytest.raises(ModelLoading):
        models.entry("sim")


async def test_a_request_is_prepared_by_the_card_that_most_ready_workers_have(models, store):
    old, new = store.publish(FILES), without_template(store)
    await join(models, worker("old-1", old), worker("old-2", old), worker("new-1", new, epoch=5))
    assert models.entry("sim").digest == old
    assert models.entry("sim").template is not None
    models.registered(worker("old-1", old, state=WorkerState.DRAINING))
    assert models.entry("sim").digest == new, "one each: the one whose newest worker started last"
    assert models.entry("sim").template is None
    models.registered(worker("old-1", old))
    assert models.entry("sim").digest == old
    models.worker_down(WorkerId("old-2"))
    assert models.entry("sim").digest == new
    models.deregistered(WorkerId("new-1"))
    assert models.entry("sim").digest == old


async def test_models_are_told_apart_by_what_they_do(models, store):
    await join(models, worker("w1", store.publish(FILES)))
    for model in ("vectors", "more"):
        digest = store.publish(FILES, model, embedding_size=64, is_matryoshka=True, matryoshka_dimensions=(16, 32))
        await join(models, worker(model, digest, model=model))
    assert models.for_task(is_embedding=False) == ["sim"]
    assert models.for_task(is_embedding=True) == ["more", "vectors"]
    entry = models.entry("vectors")
    assert (entry.embedding_size, entry.is_matryoshka, entry.matryoshka_dimensions) == (64, True, (16, 32))


async def test_workers_that_cannot_decode_do_not_decide_which_card_serves(models, store):
    old, new = store.publish(FILES), without_template(store)
    prefills = [worker(f"p{index}", new, Role.PREFILL, epoch=5) for index in range(3)]
    await join(models, worker("d0", old), *prefills)
    assert models.entry("sim").digest == old


async def test_every_card_is_shown_with_its_workers(models, store):
    old, new = store.publish(FILES), without_template(store)
    await join(models, worker("old-1", old), worker("old-2", old), worker("new-1", new))
    models.worker_down(WorkerId("old-2"))
    models.worker_down(WorkerId("new-1"))
    shown = {each.card: (each.num_workers, each.num_ready, each.is_current) for each in models.statuses()}
    assert shown == {old: (2, 1, True), new: (1, 0, False)}


async def test_workers_of_one_card_that_are_up_agree_on_the_block_size(models, store):
    digest = store.publish(FILES)
    await join(models, worker("d0", digest))
    with pytest.raises(ModelUnusable, match="d1 has blocks of 32 tokens; d0, with the same model card, has 16"):
        await join(models, worker("d1", digest, block_size=32))
    assert models.entry("sim").block_size == 16


async def test_workers_that_come_back_with_another_block_size_are_served(models, store):
    digest = store.publish(FILES)
    await join(models, worker("d0", digest))
    models.deregistered(WorkerId("d0"))
    with pytest.raises(NoWorkerLeft, match="'sim' is registered any more"):
        models.entry("sim")
    await join(models, worker("d0", digest, epoch=2, block_size=32))
    assert models.entry("sim").block_size == 32


async def test_the_largest_context_of_the_workers_that_are_there_counts(models, store):
    digest = store.publish(FILES)
    lengths = []
    for name, length in (("d0", 1024), ("d1", 8192), ("d2", 2048)):
        await join(models, worker(name, digest, context_length=length))
        lengths.append(models.entry("sim").context_length)
    models.deregistered(WorkerId("d1"))
    lengths.append(models.entry("sim").context_length)
    await join(models, worker("p0", digest, Role.PREFILL, context_length=9000))
    lengths.append(models.entry("sim").context_length)
    assert lengths == [1024, 8192, 8192, 2048, 2048]


async def test_token_ids_that_some_worker_does_not_know_are_not_taken_in(models, store):
    digest = store.publish(FILES)
    await join(models, worker("d0", digest, vocab_size=320), worker("d1", digest, vocab_size=300))
    assert models.entry("sim").vocab_size == 300
    models.deregistered(WorkerId("d1"))
    assert models.entry("sim").vocab_size == 320


async def test_a_tokenizer_that_cannot_be_used_is_said_so(models, store):
    digest = store.publish({**FILES, "tokenizer.json": b"{}"})
    with pytest.raises(CardUnusable, match=r"tokenizer\.json"):
        await join(models, worker("d0", digest))


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": b'{"additional_special_tokens": 5}'},
        {"tokenizer_config.json": b"\xff"},
        {"tokenizer_config.json": b"[" * 100_000},
        {"tokenizer.json": b"[" * 100_000},
        {"tokenizer.json": b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": ["a b c"]}}'},
    ],
)
async def test_whatever_a_card_raises_makes_that_card_unusable(models, store, files):
    with pytest.raises(CardUnusable):
        await join(models, worker("d0", store.publish({**FILES, **files})))
    good = store.publish(FILES)
    await join(models, worker("d1", good))
    assert models.entry("sim").digest == good


@pytest.mark.parametrize(
    "template",
    [
        b"{% if %}",
        b"{{ 7**(7**5) }}",
        b"{% if x %}" * 600 + b"{% endif %}" * 600,
        b"{{ " + b"(" * 5000 + b"1" + b")" * 5000 + b" }}",
    ],
)
async def test_a_template_that_cannot_be_compiled_leaves_the_model_to_completions(models, store, template):
    await join(models, worker("d0", store.publish({**FILES, "chat_template.jinja": template})))
    assert models.entry("sim").tokenizer is not None


async def test_no_model_with_workers_is_forgotten_for_another_one(store, tmp_path):
    models = Models(store, tmp_path, max_cards=3)
    digest = store.publish(FILES)
    for number in range(3):
        await join(models, worker(f"d{number}", digest, model=f"m{number}"))
    with pytest.raises(ModelUnusable, match="no room for 'm3': 3 model cards have workers here and the limit is 3"):
        await join(models, worker("d3", digest, model="m3"))
    for number in range(3):
        assert models.entry(f"m{number}").model == f"m{number}"
    with pytest.raises(ModelLoading):
        models.entry("m3")


async def test_the_model_that_has_been_without_workers_for_longest_makes_room(store, tmp_path):
    models = Models(store, tmp_path, max_cards=3)
    digest = store.publish(FILES)
    for number in range(3):
        await join(models, worker(f"d{number}", digest, model=f"m{number}"))
    models.deregistered(WorkerId("d1"))
    models.deregistered(WorkerId("d0"))
    await join(models, worker("d3", digest, model="m3"))
    with pytest.raises(ModelNotFound):
        models.entry("m1")
    with pytest.raises(NoWorkerLeft):
        models.entry("m0")
    assert models.entry("m2").model == "m2"
    assert models.entry("m3").model == "m3"


async def test_what_is_kept_of_models_that_come_and_go_is_bounded(store, tmp_path):
    models = Models(store, tmp_path, max_cards=3)
    digest = store.publish(FILES)
    for number in range(20):
        models.registered(worker("d0", digest, model=f"m{number}", epoch=number))
        await models.load(worker("d0", digest, model=f"m{number}", epoch=number))
    models.deregistered(WorkerId("d0"))
    assert (len(models._cards), models._locks, models._workers, models._current) == (3, {}, {}, {})


async def test_the_longest_context_is_that_of_all_models(models, store):
    assert models.longest_context == 0
    digest = store.publish(FILES)
    for model, context_length in (("a", 1000), ("b", 4000), ("c", 2000)):
        await join(models, worker(f"of-{model}", digest, model=model, context_length=context_length))
    assert models.longest_context == 4000
    models.deregistered(WorkerId("of-b"))
    assert models.longest_context == 2000


async def test_a_worker_that_renders_otherwise_is_refused_and_no_other(models, store):
    digest = store.publish(FILES)
    await join(models, worker("w0", digest))
    ours = models.entry("sim").rendering
    await join(models, msgspec.structs.replace(worker("w1", digest), rendering=ours))
    odd = msgspec.structs.replace(worker("w2", digest), rendering="1:" + "f" * 32)
    with pytest.raises(
        RenderingDiffers, match=f"w2 renders or tokenizes the probes otherwise .1:ffffffff.*{ours[:10]}"
    ):
        await join(models, odd)
    assert models.entry("sim").digest == digest


async def test_the_first_worker_of_a_card_is_refused_too_if_it_renders_otherwise(models, store):
    odd = msgspec.structs.replace(worker("w0", store.publish(FILES)), rendering="1:" + "f" * 32)
    with pytest.raises(RenderingDiffers):
        await join(models, odd)


async def test_a_model_that_is_alone_need_not_be_named(models, store):
    with pytest.raises(NoModelYet):
        models.only()
    await join(models, worker("a", store.publish(FILES)), worker("b", store.publish(FILES), context_length=9000))
    assert models.only() == "sim"
    assert (models.context_length("sim"), models.context_length("other")) == (9000, None)
    models.registered(worker("c", "1" * 64, model="other"))
    with pytest.raises(InvalidRequest, match="other, sim") as refused:
        models.only()
    assert refused.value.param == "model"


async def test_a_model_is_simulated_where_all_its_workers_are(models, store):
    digest = store.publish(FILES)
    await join(models, worker("s0", digest))
    assert models.entry("sim").is_simulated
    await join(models, msgspec.structs.replace(worker("v0", digest), engine="vllm"))
    assert not models.entry("sim").is_simulated
    models.deregistered(WorkerId("v0"))
    assert models.entry("sim").is_simulated


async def test_what_one_worker_lacks_is_asked_of_none(models, store):
    digest = store.publish(FILES)
    other = worker("s1", digest)
    facts = msgspec.structs.replace(other.facts, lacks=("own_tokens",))
    await join(models, worker("s0", digest), msgspec.structs.replace(other, facts=facts))
    assert models.entry("sim").lacks == {"own_tokens"}
    models.deregistered(WorkerId("s1"))
    assert models.entry("sim").lacks == set()


async def test_an_adapter_is_its_model_to_those_that_have_loaded_it(store, tmp_path):
    poet, known = Adapter("poet", "sim", "/a", 7), {}
    models, digest = Models(store, tmp_path, adapters=known), store.publish(FILES)
    await join(models, worker("d0", digest), worker("d1", digest))
    with pytest.raises(ModelNotFound):
        models.entry("poet")
    known["poet"] = poet
    with pytest.raises(ModelLoading):
        models.entry("poet")
    news = models.changed()
    models.registered(msgspec.structs.replace(worker("d1", digest), adapters={7: ""}))
    models.registered(msgspec.structs.replace(worker("d0", digest), adapters={7: "why"}))
    await news
    assert models.answers(poet) == {"d0": "why", "d1": ""}
    entry = models.entry("poet")
    assert (entry.model, entry.adapter, entry.digest) == ("sim", poet, digest)
    assert models.context_length("poet") == models.context_length("sim")
    assert models.entry("sim").adapter is None


async def test_an_adapter_s_workers_are_looked_at_again_when_anything_has_changed_and_not_before(store, tmp_path):
    known, digest = {"poet": Adapter("poet", "sim", "/a", 7)}, store.publish(FILES)
    models = Models(store, tmp_path, adapters=known)
    having, without = (msgspec.structs.replace(worker("d0", digest), adapters=each) for each in ({7: ""}, {}))
    await join(models, having)
    entry = models.entry("poet")
    assert models.entry("poet") is entry
    known["poet"] = Adapter("poet", "sim", "/b", 8)
    with pytest.raises(ModelLoading):
        models.entry("poet")
    known["poet"] = Adapter("poet", "sim", "/a", 7)
    assert models.entry("poet").adapter is known["poet"]
    await join(models, worker("d1", digest, epoch=2, max_batch=99))
    assert models.entry("poet").max_batch == 99
    models.registered(without)
    with pytest.raises(ModelLoading):
        models.entry("poet")
    models.registered(having)
    assert models.entry("poet")
    for name in ("d0", "d1"):
        models.deregistered(WorkerId(name))
    with pytest.raises(NoWorkerLeft):
        models.entry("poet")
