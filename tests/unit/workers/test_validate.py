import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planes.wire.errors import InvalidRequest
from planes.wire.frames import (
    DecodeLeg,
    Format,
    Generate,
    LocalLeg,
    PrefillLeg,
    Sampling,
    StructuredOutput,
    Ticket,
    pack_tokens,
)
from planes.wire.messages import Adapter, EngineFacts, HandoverEndpoint, HandoverMode, RequestId, Role, WorkerId
from workers.validate import AdapterMissing, HandoverRefused, RoleRefused, admit

FACTS = EngineFacts(
    block_size=16, num_blocks=8, context_length=32, max_batch=4, max_step_tokens=64, bytes_per_block=1, vocab_size=260
)
PULL = HandoverEndpoint(HandoverMode.PULL, "engine-1", "127.0.0.1", 5000)
PUSH = HandoverEndpoint(HandoverMode.PUSH, "engine-1", "127.0.0.1", 5000)
TICKET = Ticket(WorkerId("prefill-1"), HandoverMode.PULL, num_tokens=3, lease_s=30.0, params=b"{}")


def generate(prompt=(1, 2, 3), sampling=None, form=None, **changes):
    fields = {
        "stream": 1,
        "request": RequestId("r"),
        "prompt": pack_tokens(list(prompt)),
        "sampling": sampling or Sampling(max_tokens=4),
        "format": form or Format("chat", "id", "m", 1),
    }
    return Generate(**(fields | changes))


def admitted(request, role=Role.BOTH, endpoint=PULL):
    return admit(request, role=role, facts=FACTS, endpoint=endpoint)


def test_a_good_request_reaches_the_engine_as_it_is():
    request = admitted(generate(resume=pack_tokens([7, 8]), cache_salt="salt", priority=2))
    assert request.prompt.tolist() == [1, 2, 3]
    assert (request.resume, request.cache_salt, request.priority) == ((7, 8), "salt", 2)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (generate(prompt=()), "no tokens"),
        (generate(prompt=[260]), "token 260; the vocabulary ends at 259"),
        (generate(resume=pack_tokens([999])), "resume has token 999"),
        (generate(resume=b"123"), "resume takes 3 bytes"),
        (generate(prompt=[1] * 30), "30 tokens and max_tokens is 4, together 34; the context holds 32"),
        (generate(sampling=Sampling(max_tokens=0)), "max_tokens is 0"),
        (generate(sampling=Sampling(max_tokens=4, min_tokens=5)), "min_tokens is 5; 0 to max_tokens, 4"),
        (generate(sampling=Sampling(max_tokens=4, n=0)), "n is 0; 1 to 4"),
        (generate(sampling=Sampling(max_tokens=4, n=5)), "n is 5; 1 to 4"),
        (generate(sampling=Sampling(max_tokens=4, stop_token_ids=[-1])), "stop_token_ids has token -1"),
        (generate(sampling=Sampling(max_tokens=4, logit_bias={260: 1.0})), "logit_bias has token 260"),
        (generate(sampling=Sampling(max_tokens=4, stop=[""])), "empty string"),
        (generate(sampling=Sampling(max_tokens=4, bad_words=[[1, 260]])), "bad_words has token 260"),
        (generate(sampling=Sampling(max_tokens=4, bad_words=[[1], []])), "empty sequence"),
        (generate(sampling=Sampling(max_tokens=4, bad_words=[[1]] * 1001)), "1001 token sequences; 1000 are possible"),
        (generate(sampling=Sampling(max_tokens=4, thinking_tokens=-1)), "thinking_tokens is -1"),
        (generate(sampling=Sampling(max_tokens=4, structured=StructuredOutput())), "said 0 times"),
        (generate(sampling=Sampling(max_tokens=4, prompt_logprobs=1), leg=PrefillLeg(HandoverMode.PULL)), "where the"),
        (generate(sampling=Sampling(max_tokens=4, prompt_logprobs=1), resume=pack_tokens([1])), "probabilities of 1"),
        (generate(form=Format("image", "id", "m", 1)), "'image'; chat or completion"),
        (generate(timeout_s=-1.0), "timeout_s is -1.0"),
        (generate(timeout_s=float("nan")), "timeout_s is nan"),
        (generate(sampling=Sampling(max_tokens=4, n=2), resume=pack_tokens([1])), "n is 2"),
        (generate(sampling=Sampling(max_tokens=4, n=2), leg=PrefillLeg(HandoverMode.PULL)), "n is 2"),
        (generate(sampling=Sampling(max_tokens=4, logprobs=1), resume=pack_tokens([1])), "log probabilities of 1"),
    ],
)
def test_what_no_engine_could_run_is_invalid_and_names_value_and_limit(request_, message):
    with pytest.raises(InvalidRequest, match=message):
        admitted(request_)


@pytest.mark.parametrize(
    ("leg", "role", "endpoint", "message"),
    [
        (PrefillLeg(HandoverMode.PULL), Role.BOTH, None, "hands no KV cache over"),
        (PrefillLeg(HandoverMode.PUSH), Role.BOTH, PULL, "mode is push; this worker's is pull"),
        (DecodeLeg(ticket=TICKET), Role.BOTH, PUSH, "mode is pull; this worker's is push"),
        (DecodeLeg(source=PUSH), Role.BOTH, PULL, "mode is push; this worker's is pull"),
        (DecodeLeg(), Role.BOTH, PULL, "mode is missing"),
        (DecodeLeg(ticket=TICKET, source=PUSH), Role.BOTH, PULL, "mode is missing"),
        (DecodeLeg(source=HandoverEndpoint(HandoverMode.PUSH, "e", "", 1)), Role.BOTH, PUSH, "source"),
        (DecodeLeg(source=HandoverEndpoint(HandoverMode.PUSH, "e", "h", 0)), Role.BOTH, PUSH, "source"),
    ],
)
def test_a_part_in_a_handover_that_this_worker_cannot_play_is_refused(leg, role, endpoint, message):
    with pytest.raises(HandoverRefused, match=message):
        admitted(generate(leg=leg), role, endpoint)


@pytest.mark.parametrize(
    ("leg", "able"),
    [
        (PrefillLeg(HandoverMode.PULL), {Role.PREFILL, Role.BOTH}),
        (DecodeLeg(ticket=TICKET), {Role.DECODE, Role.BOTH}),
        (LocalLeg(), {Role.DECODE, Role.BOTH}),
    ],
)
@pytest.mark.parametrize("role", Role)
def test_a_worker_does_what_its_role_says_and_nothing_else(leg, able, role):
    request = generate(leg=leg)
    if role in able:
        assert admitted(request, role).leg == leg
    else:
        with pytest.raises(RoleRefused, match=f"a {type(leg).__name__} came to a worker whose role is {role}"):
            admitted(request, role)


def test_a_ticket_for_more_tokens_than_the_prompt_has_is_refused():
    with pytest.raises(HandoverRefused, match="ticket is for 3 tokens; the prompt has 2"):
        admitted(generate(prompt=[1, 2], leg=DecodeLeg(ticket=TICKET)))


@pytest.mark.parametrize(
    ("leg", "endpoint"),
    [
        (PrefillLeg(HandoverMode.PULL), PULL),
        (PrefillLeg(HandoverMode.PUSH), PUSH),
        (DecodeLeg(ticket=TICKET), PULL),
        (DecodeLeg(source=PUSH), PUSH),
    ],
)
def test_both_legs_of_a_handover_pass_where_the_mode_agrees(leg, endpoint):
    assert admitted(generate(leg=leg), endpoint=endpoint).leg is leg


@given(prompt=st.binary(max_size=160), resume=st.binary(max_size=40), max_tokens=st.integers(-1, 40))
def test_whatever_is_admitted_is_safe_for_the_engine(prompt, resume, max_tokens):
    form = Format("chat", "id", "m", 1)
    try:
        request = admitted(Generate(1, RequestId("r"), prompt, Sampling(max_tokens=max_tokens), form, resume=resume))
    except InvalidRequest:
        return
    assert 1 <= len(request.prompt) <= FACTS.context_length - max_tokens
    assert request.prompt.dtype == np.uint32
    assert max([*request.prompt.tolist(), *request.resume]) < FACTS.vocab_size


EMBEDS = msgspec.structs.replace(FACTS, embedding_size=4)


def test_a_vector_is_asked_of_those_that_make_them_and_an_answer_of_the_others():
    vector = generate(form=Format("embedding", "id", "m", 1), sampling=Sampling(max_tokens=1))
    assert admit(vector, role=Role.BOTH, facts=EMBEDS, endpoint=None).is_embedding
    assert not admitted(generate()).is_embedding
    with pytest.raises(InvalidRequest, match="is 'chat'; this worker's vectors: 4"):
        admit(generate(), role=Role.BOTH, facts=EMBEDS, endpoint=None)
    with pytest.raises(InvalidRequest, match="is 'embedding'; this worker's vectors: 0"):
        admitted(vector)


def test_a_vector_takes_nothing_of_the_context_beside_its_prompt():
    def vector(num_tokens):
        return generate([7] * num_tokens, Sampling(max_tokens=1), Format("embedding", "id", "m", 1))

    longest = FACTS.context_length
    assert len(admit(vector(longest), role=Role.BOTH, facts=EMBEDS, endpoint=None).prompt) == longest
    with pytest.raises(InvalidRequest, match=f"has {longest + 1} tokens.*holds {longest}") as refused:
        admit(vector(longest + 1), role=Role.BOTH, facts=EMBEDS, endpoint=None)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "input")


@pytest.mark.parametrize(
    "changes",
    [{"resume": pack_tokens([7])}, {"sampling": Sampling(max_tokens=1, n=2)}, {"leg": PrefillLeg(HandoverMode.PULL)}],
)
def test_a_vector_is_made_by_one_worker_once(changes):
    with pytest.raises(InvalidRequest, match="one worker, once"):
        admit(generate(form=Format("embedding", "id", "m", 1), **changes), role=Role.BOTH, facts=EMBEDS, endpoint=PULL)


def test_an_adapter_that_is_not_loaded_is_for_another_worker():
    poet = Adapter("poet", "m", "/a", 7)
    request = generate(adapter=poet)
    with pytest.raises(AdapterMissing, match="the adapter 'poet' is not loaded here"):
        admit(request, role=Role.BOTH, facts=FACTS, endpoint=PULL, adapters={8})
    assert admit(request, role=Role.BOTH, facts=FACTS, endpoint=PULL, adapters={7}).adapter == poet
