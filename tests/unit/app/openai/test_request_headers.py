import json

import pytest
from msgspec.structs import replace

from app.openai.request_headers import HeaderOptions, ignored_header, parse_header_options, route_header
from planes.wire.errors import InvalidRequest
from planes.wire.messages import WorkerId
from router.request import HandoverPreference, Sacrifice
from tests.fakes import candidate, route


def test_without_headers_nothing_is_wished():
    assert parse_header_options({}, n=4) == HeaderOptions(HandoverPreference.AUTO, is_explained=False)


def test_wishes_are_read_from_the_headers():
    headers = {"x-headrace-handover": " never", "x-headrace-explain": "1"}
    assert parse_header_options(headers, n=4) == HeaderOptions(HandoverPreference.NEVER, is_explained=True)
    assert parse_header_options({"x-headrace-handover": "always"}, n=1).handover is HandoverPreference.ALWAYS


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("x-headrace-handover", "maybe", "auto, always, never"),
        ("x-headrace-handover", "", "auto, always, never"),
        ("x-headrace-handover", "Always", "auto, always, never"),
        ("x-headrace-explain", "yes", "0, 1"),
    ],
)
def test_any_other_value_is_refused_with_what_is_allowed(name, value, allowed):
    with pytest.raises(InvalidRequest, match=f"{name} is '{value}'; {allowed} are possible") as refused:
        parse_header_options({name: value}, n=1)
    assert refused.value.param == name


def test_milliseconds_are_read_from_the_headers():
    options = parse_header_options({"x-headrace-slo-ttft-ms": " 250", "x-headrace-slo-itl-ms": "40.5"}, n=1)
    assert (options.slo_ttft_s, options.slo_itl_s) == (0.25, 0.0405)
    assert parse_header_options({"x-headrace-slo-ttft-ms": "+.5e3"}, n=1).slo_ttft_s == 0.5
    alone = parse_header_options({"x-headrace-slo-itl-ms": "0.001"}, n=1)
    assert (alone.slo_ttft_s, alone.slo_itl_s) == (None, 1e-6)


@pytest.mark.parametrize("name", ["x-headrace-slo-ttft-ms", "x-headrace-slo-itl-ms"])
@pytest.mark.parametrize(
    "value", ["", "soon", "0", "-1", "1e-300", "nan", "inf", "86400001", "50ms", "5,0", "1_000", "٣", "²"]
)
def test_a_time_that_cannot_be_used_is_refused_with_name_value_and_limits(name, value):
    with pytest.raises(InvalidRequest, match=f"{name} is '{value}'; .* from 0.001 to 86400000 is possible") as refused:
        parse_header_options({name: value}, n=1)
    assert refused.value.param == name


def test_several_choices_cannot_be_handed_over():
    with pytest.raises(InvalidRequest, match="n is 2"):
        parse_header_options({"x-headrace-handover": "always"}, n=2)


def test_the_route_s_header_is_short_ascii_json():
    worker = WorkerId("prefill-é" + "x" * 400)
    seconds = {"queue_s": 1 / 3, "prefill_s": 0.2, "handover_s": 0.3, "inflicted_s": 1e9 / 7, "total_s": 2e9 / 7}
    chosen = candidate("d0", worker, cached_tokens=16, gives_up=Sacrifice.EVERYTHING, **seconds)
    bound = replace(
        route("r", "d0"), prefill=worker, cached_tokens=16, predicted=chosen, held_s=0.25, num_candidates=12
    )
    header = route_header(bound)
    assert header.isascii()
    assert len(header) < 2048
    assert json.loads(header) == {
        "prefill": worker,
        "decode": "d0",
        "cached_tokens": 16,
        "queue_s": 0.333333,
        "prefill_s": 0.2,
        "handover_s": 0.3,
        "inflicted_s": 142857142.857143,
        "total_s": 285714285.714286,
        "gives_up": "a stream's time between tokens, and its time to first token, and streams stand still for long",
        "held_s": 0.25,
        "candidates": 12,
    }


def test_log_probabilities_of_a_prompt_cannot_be_handed_over():
    with pytest.raises(InvalidRequest, match="take one worker"):
        parse_header_options({"x-headrace-handover": "always"}, n=1, has_prompt_logprobs=True)


def test_ignored_fields_are_named_in_a_header_of_bounded_length():
    assert ignored_header(["a", "b.c"]) == "a, b.c"
    assert ignored_header(["a\r\nx: y", "ü"]) == "a\\r\\nx: y, \\xfc"
    long = ignored_header([f"field{i}" * 20 for i in range(1000)])
    assert len(long) < 600
    told, more = long.rsplit(", and ", 1)
    assert more == f"{1000 - len(told.split(', '))} more"
