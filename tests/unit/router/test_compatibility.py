"""Workers that disagree on what a model is: who is offered a request, and who hands over to whom."""

import random

import numpy as np
import pytest
from msgspec.structs import replace

from planes.wire.blocks import pack
from planes.wire.messages import BlocksStored, KvEvents, RequestId, Role, WorkerId
from router.errors import ContextTooLong, NoPair, NoWorker
from router.policies import POLICIES, load_policy
from router.request import HandoverPreference, Observed, RoutableRequest, Route
from router.router import Router
from router.settings import RouterSettings
from tests.fakes import FACTS, registration

OLD, NEW = "a" * 64, "b" * 64


def worker(name, role=Role.BOTH, *, card=OLD, layout="", **facts):
    return replace(registration(name, role, card_digest=card), layout=layout, facts=replace(FACTS, **facts))


def request(name="r", *, tokens=2000, blocks=(), **fields):
    return RoutableRequest(RequestId(name), "sim", np.array(blocks, dtype=np.uint64), tokens, 10, 1e9, **fields)


def router_of(*workers, policy="headrace"):
    router = Router(RouterSettings(), load_policy(policy), rng=random.Random(0))
    for each in workers:
        router.worker_up(each)
    return router


def served(router, wanted):
    router.submit(wanted, now=0.0)
    (answer,) = router.dispatch(now=0.0)
    assert isinstance(answer, Route)
    router.release(answer.request, Observed(), now=0.0)
    return answer


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("handover", HandoverPreference)
def test_a_request_goes_to_workers_of_its_card_alone(policy, handover):
    workers = [worker(f"{card[0]}-{role}", role, card=card) for card in (OLD, NEW) for role in Role]
    router = router_of(*workers, policy=policy)
    for number in range(8):
        for card in (OLD, NEW):
            found = served(router, request(f"{number}{card}", card_digest=card, handover=handover))
            assert {name[0] for name in (found.prefill, found.decode) if name} == {card[0]}


def test_a_request_of_no_card_goes_to_any_worker_but_never_to_two_cards():
    workers = [worker("old", Role.PREFILL, card=OLD), worker("new", Role.DECODE, card=NEW)]
    assert served(router_of(*workers), request(tokens=4000)).decode == "new"
    with pytest.raises(NoPair):
        router_of(*workers).submit(request(handover=HandoverPreference.ALWAYS), now=0.0)


def test_whose_card_is_gone_is_refused_for_it():
    router = router_of(worker("new", card=NEW))
    with pytest.raises(NoWorker, match="none of 1 registered workers can decode for model 'sim' with card aaaaaaaa;"):
        router.submit(request(card_digest=OLD), now=0.0)
    router.worker_up(worker("old", card=OLD))
    assert served(router, request(card_digest=OLD)).decode == "old"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("sender", "receiver", "is_pairing"),
    [
        ({"layout": "x"}, {"layout": "x"}, True),
        ({}, {}, True),
        ({"layout": "x"}, {"layout": "y"}, False),
        ({"layout": "x"}, {}, False),
        ({"block_size": 16}, {"block_size": 32}, False),
    ],
)
def test_a_kv_cache_is_handed_over_only_where_it_fits(policy, sender, receiver, is_pairing):
    router = router_of(worker("p", Role.PREFILL, **sender), worker("d", Role.DECODE, **receiver), policy=policy)
    insists = request(tokens=3000, handover=HandoverPreference.ALWAYS)
    if is_pairing:
        assert served(router, insists).prefill == "p"
    else:
        with pytest.raises(NoPair, match="same handover mode and KV layout"):
            router.submit(insists, now=0.0)
        found = served(router, request(tokens=3000))
        assert (found.prefill, found.decode) == (None, "d")


def test_in_a_fleet_of_two_layouts_each_hands_over_to_its_like():
    router = router_of(*(worker(f"{k}-{role}", role, layout=k) for k in "xy" for role in (Role.PREFILL, Role.DECODE)))
    for number in range(20):
        found = served(router, request(f"r{number}", handover=HandoverPreference.ALWAYS))
        assert found.prefill[0] == found.decode[0]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("handover", HandoverPreference)
def test_a_request_goes_to_workers_with_room_for_its_context(policy, handover):
    workers = [worker(f"{size}-{role}", role, context_length=size) for size in (1024, 8192) for role in Role]
    router = router_of(*workers, policy=policy)
    for number in range(8):
        found = served(router, request(f"r{number}", tokens=1000, max_context=1025, handover=handover))
        assert {name[:4] for name in (found.prefill, found.decode) if name} == {"8192"}
    names = [served(router, request(f"s{n}", tokens=1000, max_context=1024)).decode[:4] for n in range(30)]
    assert "1024" in names


def test_a_request_that_no_worker_has_room_for_is_refused_with_the_numbers():
    router = router_of(worker("b0", context_length=1024), worker("p", Role.PREFILL, context_length=8192))
    with pytest.raises(ContextTooLong, match=r"may take 2048 tokens, .* among 1 workers .* is 1024") as refused:
        router.submit(request(max_context=2048), now=0.0)
    assert (refused.value.code, isinstance(refused.value, NoWorker)) == ("context_too_long", True)


def test_names_of_blocks_of_another_size_say_nothing_of_a_worker():
    router = router_of(worker("small", block_size=16), worker("large", block_size=32))
    names = np.arange(1, 51, dtype=np.uint64)
    for name in ("small", "large"):
        router.apply_events(KvEvents(WorkerId(name), 1, 1, [BlocksStored(pack(names))]))
    found = served(router, request(tokens=1000, blocks=names, block_size=16))
    assert (found.decode, found.cached_tokens) == ("small", 800)
    explanation = router.explain(RequestId("r"))
    assert {option.decode: option.decode_cached_tokens for option in explanation.candidates if not option.prefill} == {
        "small": 800,
        "large": 0,
    }
