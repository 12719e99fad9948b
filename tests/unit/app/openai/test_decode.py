import contextlib
import json

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.openai.chat import parse_chat
from app.openai.completions import parse_completion
from app.openai.decode import check_range, shown
from app.openai.errors import response
from app.openai.schema import ParsedRequest
from planes.wire.errors import InvalidRequest

START = b'{"model":"m","metadata":'


@pytest.mark.parametrize("parse", [parse_chat, parse_completion])
@given(body=st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(body=b"")
@example(body=b"null")
@example(body=b"[]")
@example(body=b'{"model":"\\ud800"}')
@example(body=b'{"model":"\xed\xa0\x80"}')
@example(body=b'{"model":"m","prompt":NaN}')
@example(body=b'{"model":"m","prompt":1e999}')
@example(body=b'{"model":"m","seed":' + b"9" * 10_000 + b"}")
@example(body=b'{"model":"m","model":"n"}')
@example(body=b'\xef\xbb\xbf{"model":"m"}')
@example(body=START + b"[" * 100_000)
@example(body=START + b'{"a":' * 100_000)
@example(body=START + b"[" * 500 + b"]" * 500 + b',"n":"x"}')
def test_any_bytes_are_parsed_or_refused(parse, body):
    try:
        assert isinstance(parse(body), ParsedRequest)
    except InvalidRequest as exc:
        answer = response(exc)
        assert answer.status == 400
        assert json.loads(answer.body)["error"]["message"]


@given(cut=st.integers(0, 200), flip=st.integers(0, 255))
def test_any_damaged_body_is_parsed_or_refused(cut, flip):
    body = bytearray(
        b'{"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"h\\u00e9llo"}]}],"n":2,'
        b'"stop":["a","b"],"logit_bias":{"1":2.5},"stream":true,"stream_options":{"include_usage":true}}'
    )
    body[cut % len(body)] = flip
    with contextlib.suppress(InvalidRequest):
        assert isinstance(parse_chat(bytes(body)), ParsedRequest)


def test_of_a_duplicated_field_the_last_counts():
    body = b'{"model":"a","model":"b","messages":[{"role":"user","content":"x"}]}'
    assert parse_chat(body).model == "b"


def test_malformed_json_is_refused_with_the_place():
    with pytest.raises(InvalidRequest, match=r"not valid JSON: .*byte 9") as caught:
        parse_chat(b'{"model":}')
    assert caught.value.code == "invalid_json"


def test_nesting_that_exceeds_the_stack_is_refused():
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        parse_chat(START + b"[" * 100_000 + b"]" * 100_000 + b"}")


def test_a_type_error_before_a_syntax_error_is_explained_without_the_value():
    with pytest.raises(InvalidRequest, match=r"expected int \| null, got str\.$"):
        parse_chat(b'{"model":"m","n":"x",,')


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(InvalidRequest) as caught:
        parse_chat(json.dumps({"model": "m", "messages": "y" * 100_000}).encode())
    assert len(str(caught.value)) < 200


def test_a_value_that_json_cannot_hold_is_shown_by_its_type():
    assert shown(object()) == "object"


def test_nan_is_in_no_range():
    with pytest.raises(InvalidRequest, match="out of range"):
        check_range("x", float("nan"), 0, 1)


@pytest.mark.parametrize("high", [pytest.param(10**400, id="10**400"), 2**31, 12_345_678])
def test_a_bound_that_another_field_sets_is_told_to_the_digit_however_large(high):
    with pytest.raises(InvalidRequest, match=f"must be from 0 to {str(high)[:50]}") as caught:
        check_range("min_tokens", -1, 0, high)
    assert len(str(caught.value)) < 200


def test_the_fast_path_and_the_error_path_decode_the_same_value():
    with pytest.raises(InvalidRequest) as caught:
        parse_chat(msgspec.json.encode({"model": "m", "messages": [{"role": "user", "content": {"é": [1]}}]}))
    assert caught.value.param == "messages[0].content"
    assert 'the value is {"é":[1]}' in str(caught.value)


def test_a_long_body_is_not_decoded_once_more_to_quote_what_is_wrong_with_it():
    def refused(num):
        with pytest.raises(InvalidRequest) as caught:
            parse_chat(json.dumps({"model": "m", "messages": [], "stop_token_ids": [1] * num + ["x"]}).encode())
        return str(caught.value)

    assert refused(10) == "Invalid type for 'stop_token_ids[10]': expected int, got str; the value is \"x\"."
    assert refused(50_000) == "Invalid type for 'stop_token_ids[50000]': expected int, got str."
