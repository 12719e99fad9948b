import msgspec
import pytest

from app.fleet.split import split_gauges, splits_of
from tests.fakes import registration


def worker(name, *, card="a", layout="", **fields):
    return msgspec.structs.replace(registration(name, card_digest=card * 64, **fields), layout=layout)


@pytest.mark.parametrize(
    "workers",
    [
        [],
        [worker("w1"), worker("w2")],
        [worker("w1", model="m"), worker("w2", model="n", card="b")],
        [worker("w1", layout="x"), worker("w2", layout="x")],
        [worker("w1", layout="x"), worker("w2")],  # an older worker does not tell: it is taken to fit
        [worker("w1", layout="x"), worker("w2", layout="y", mode=None)],  # who never hands over fits everybody
    ],
)
def test_workers_that_agree(workers):
    assert splits_of(workers) == {}


def test_two_cards_under_one_name_are_named_with_their_workers():
    (told,) = splits_of([worker("w1"), worker("w2", card="b"), worker("w3", card="b")]).values()
    assert told.startswith(
        "model 'sim' has 2 different cards, and one of them serves: aaaaaaaa (w1), bbbbbbbb (w2, w3)"
    )


def test_two_layouts_of_one_card_are_named_with_their_workers():
    (told,) = splits_of([worker("w1", layout="x"), worker("w2", layout="y")]).values()
    assert "has 2 KV cache layouts, which cannot hand over to each other: x (w1), y (w2)" in told


def test_of_many_workers_some_are_named():
    (told,) = splits_of([worker("v", card="b"), *(worker(f"w{index}") for index in range(10))]).values()
    assert "(w0, w1, w2, w3, w4, w5, w6, w7, 2 more)" in told


def test_gauges_count_cards_and_layouts_of_each_model():
    workers = [worker("w1", layout="x"), worker("w2", layout="y"), worker("w3", card="b"), worker("w4", model="n")]
    found = {(gauge.name, gauge.labels[0][1]): gauge.value for gauge in split_gauges(workers)}
    assert found == {
        ("model_cards", "sim"): 2,
        ("model_layouts", "sim"): 2,
        ("model_cards", "n"): 1,
        ("model_layouts", "n"): 0,
    }


def test_workers_of_one_card_that_make_different_prompts_are_named():
    workers = [
        msgspec.structs.replace(worker(name), rendering=told)
        for name, told in (("w1", "1:x"), ("w2", "1:y"), ("w3", "2:z"))
    ]
    (told,) = splits_of([*workers, worker("w4")]).values()
    assert "make 2 different prompts of the same probes: x (w1), y (w2)" in told
