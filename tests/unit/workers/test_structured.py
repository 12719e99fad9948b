import json

import pytest

from planes.wire.errors import UNUSABLE_GRAMMAR, InvalidRequest
from planes.wire.frames import StructuredOutput
from workers.structured import check_structured


def nested(depth):
    return '{"items": ' * depth + json.dumps({"type": "string"}) + "}" * depth


@pytest.mark.parametrize(
    ("structured", "message"),
    [
        (StructuredOutput(), "said 0 times (none); once is needed"),
        (StructuredOutput(regex="a", choice=["b"]), "said 2 times (regex, choice); once is needed"),
        (StructuredOutput(regex="a" * 262_145), "regex has 262145 characters; 262144 are possible"),
        (StructuredOutput(choice=["a" * 999] * 263), "choice has 263000 characters"),
        (StructuredOutput(regex="a\x00"), "NUL"),
        (StructuredOutput(json_schema="{"), "json_schema is no JSON that can be read"),
        (StructuredOutput(json_schema="[" * 100_000), "json_schema is no JSON that can be read"),
        (StructuredOutput(json_schema="true"), "json_schema is no JSON object"),
        (StructuredOutput(json_schema=nested(65)), "json_schema is nested more than 64 levels deep"),
        (StructuredOutput(structural_tag=nested(65)), "structural_tag is nested more than 64 levels deep"),
    ],
)
def test_what_no_engine_would_compile_is_refused_before_one_sees_it(structured, message):
    with pytest.raises(InvalidRequest) as refused:
        check_structured(structured)
    assert message in str(refused.value)
    assert (refused.value.param, refused.value.code) == ("response_format", UNUSABLE_GRAMMAR)


@pytest.mark.parametrize(
    "structured",
    [
        StructuredOutput(json_schema=nested(60)),
        StructuredOutput(regex="a+"),
        StructuredOutput(choice=["a", ""]),
        StructuredOutput(grammar='root ::= "a"'),
        StructuredOutput(structural_tag="{}"),
    ],
)
def test_what_may_be_compiled_passes(structured):
    check_structured(structured)
