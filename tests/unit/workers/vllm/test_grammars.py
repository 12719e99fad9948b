"""Which library may compile a grammar; what tries it is replaced by a process that answers at once."""

import asyncio
import sys

import msgspec
import pytest

from planes.wire.errors import UNUSABLE_GRAMMAR, InvalidRequest
from planes.wire.frames import StructuredOutput
from workers.vllm.grammar_process import Attempt, is_lark
from workers.vllm.grammars import GrammarProcessEnded, GrammarTrials, choice_grammar, grammar_of

PROCESS = """
import json, sys
print("{}", flush=True)
for number, line in enumerate(sys.stdin):
    spec = json.loads(line)["spec"]
    if spec == "die":
        break
    verdict = {"reason": f"{spec} will not do"} if spec.startswith("bad") else {"library": f"library {number}"}
    print(json.dumps(verdict), flush=True)
"""


@pytest.fixture
async def trials():
    trials = GrammarTrials(libraries_for=lambda kind, spec: ["xgrammar"])
    trials.begin((sys.executable, "-c", PROCESS))
    yield trials
    await trials.stop()


async def test_a_grammar_is_tried_once_and_its_verdict_kept(trials):
    assert await trials.library("regex", "a") == "library 0"
    assert await trials.library("regex", "b") == "library 1"
    assert await trials.library("regex", "a") == "library 0"


async def test_requests_together_are_answered_each_with_its_own_verdict(trials):
    specs = [f"s{number % 7}" for number in range(40)]
    libraries = await asyncio.gather(*(trials.library("regex", spec) for spec in specs))
    assert len(set(libraries)) == len(set(zip(specs, libraries, strict=True))) == 7


async def test_a_grammar_that_will_not_do_is_refused_with_the_library_s_reason(trials):
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="the answer's regex cannot be used: bad one will not do") as refused:
            await trials.library("regex", "bad one")
    assert (refused.value.param, refused.value.code) == ("response_format", UNUSABLE_GRAMMAR)


async def test_a_process_that_ends_fails_one_request_and_is_started_again(trials):
    with pytest.raises(GrammarProcessEnded):
        await trials.library("regex", "die")
    assert await trials.library("regex", "a") == "library 0"


async def test_a_request_that_is_given_up_leaves_no_verdict_to_the_next(trials):
    given_up = asyncio.create_task(trials.library("regex", "a"))
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    with pytest.raises(InvalidRequest):
        await trials.library("regex", "bad")


async def test_a_schema_that_no_library_supports_is_refused_without_a_trial():
    trials = GrammarTrials(libraries_for=lambda kind, spec: [])
    with pytest.raises(InvalidRequest, match="neither of the libraries"):
        await trials.library("json", "{}")


@pytest.mark.parametrize(
    ("structured", "expected"),
    [
        (StructuredOutput(json_schema="{}"), ("json", "{}")),
        (StructuredOutput(regex="a"), ("regex", "a")),
        (StructuredOutput(choice=["a", "b"]), ("grammar", 'root ::= "a" | "b"')),
        (StructuredOutput(grammar="g"), ("grammar", "g")),
        (StructuredOutput(structural_tag="{}"), ("structural_tag", "{}")),
    ],
)
def test_what_an_answer_must_match_becomes_one_of_vllm_s_keywords(structured, expected):
    assert grammar_of(structured) == expected


def test_texts_to_choose_from_keep_every_character():
    grammar = choice_grammar(['say "x"', "a\\b", "line\nbreak\x7f", "\u00e9\U0001f600"])
    assert grammar == 'root ::= "say \\"x\\"" | "a\\\\b" | "line\\u000abreak\\u007f" | "\u00e9\U0001f600"'


def test_a_grammar_without_rules_of_ebnf_is_lark():
    assert is_lark('start: "a"  # not ::= this')
    assert not is_lark('# EBNF\nroot ::= "a"')


def test_an_attempt_survives_the_pipe():
    attempt = Attempt("json", '{"a": "\\n"}', ("xgrammar",))
    line = msgspec.json.encode(attempt)
    assert b"\n" not in line
    assert msgspec.json.decode(line, type=Attempt) == attempt
