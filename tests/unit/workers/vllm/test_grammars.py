"""Which library may compile a grammar; what tries it is replaced by a process that answers at once."""

import asyncio
import sys

import msgspec
import pytest

from planes.wire.errors import UNUSABLE_GRAMMAR, InvalidRequest
from planes.wire.frames import StructuredOutput
from workers.vllm.grammar_process import Attempt, is_lark
from workers.vllm.grammars import GrammarProcessEnded, GrammarTrials, TrialLate, choice_grammar, grammar_of

PROCESS = """
import json, os, sys, time
print("{}", flush=True)
for number, line in enumerate(sys.stdin):
    spec = json.loads(line)["spec"]
    if spec == "die":
        break
    if spec.startswith("wait for "):
        while not os.path.exists(spec.removeprefix("wait for ")):
            time.sleep(0.01)
    verdict = {"reason": f"{spec} will not do"} if spec.startswith("bad") else {"library": f"library {number}"}
    if spec == "late once" and not number:
        verdict = {"reason": "it had no turn", "is_late": True}
    print(json.dumps(verdict), flush=True)
"""


@pytest.fixture
async def trials():
    trials = GrammarTrials(libraries_for=lambda kind, spec: ["xgrammar"])
    trials.begin((sys.executable, "-c", PROCESS))
    yield trials
    await trials.stop()


async def begun():
    """What can happen at once has happened."""
    for _ in range(9):
        await asyncio.sleep(0)


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


async def test_a_trial_that_the_clock_ended_is_no_verdict(trials):
    with pytest.raises(TrialLate, match="regex was given up: it had no turn"):
        await trials.library("regex", "late once")
    assert await trials.library("regex", "late once") == "library 1"


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


async def test_a_process_that_cannot_be_started_fails_one_request_and_not_those_after_it(tmp_path):
    trials = GrammarTrials(libraries_for=lambda kind, spec: ["xgrammar"])
    program = tmp_path / "program"
    trials.begin((str(program),))
    with pytest.raises(GrammarProcessEnded, match="cannot be started"):
        await trials.library("regex", "a")
    program.write_text(f"#!{sys.executable}\n{PROCESS}")
    program.chmod(0o700)
    assert await trials.library("regex", "a") == "library 0"
    await trials.stop()


async def test_a_start_that_failed_before_anybody_asked_fails_nobody(tmp_path):
    trials = GrammarTrials(libraries_for=lambda kind, spec: ["xgrammar"])
    program = tmp_path / "program"
    trials.begin((str(program),))
    await asyncio.wait([trials._starting])
    program.write_text(f"#!{sys.executable}\n{PROCESS}")
    program.chmod(0o700)
    assert await trials.library("regex", "a") == "library 0"
    await trials.stop()


async def test_a_trial_goes_on_when_its_request_is_given_up_and_its_verdict_is_kept(trials, tmp_path):
    await trials.library("regex", "a")
    file = tmp_path / "file"
    given_up = asyncio.create_task(trials.library("regex", f"wait for {file}"))
    unheard = asyncio.create_task(trials.library("regex", "unheard"))
    other = asyncio.create_task(trials.library("regex", "b"))
    await begun()
    for task in (given_up, unheard):
        task.cancel()
    await asyncio.wait([given_up, unheard])
    assert not other.done()
    file.touch()
    assert await other == "library 2"  # of the same process, which was not asked what nobody waits for any more
    assert await trials.library("regex", f"wait for {file}") == "library 1"


async def test_a_process_that_says_nothing_is_ended_and_the_next_request_has_another(tmp_path):
    trials = GrammarTrials(libraries_for=lambda kind, spec: ["xgrammar"], timeout_s=0.5)
    trials.begin((sys.executable, "-c", PROCESS))
    with pytest.raises(GrammarProcessEnded, match=r"nothing for 0\.5 s"):
        await trials.library("regex", f"wait for {tmp_path / 'nothing'}")
    trials._timeout_s = 60.0
    assert await trials.library("regex", "a") == "library 0"
    await trials.stop()


async def test_a_trial_that_nobody_waits_for_ends_with_the_worker(trials, tmp_path):
    given_up = asyncio.create_task(trials.library("regex", f"wait for {tmp_path / 'nothing'}"))
    await begun()
    given_up.cancel()
    await asyncio.wait([given_up])
    await trials.stop()
    assert asyncio.all_tasks() == {asyncio.current_task()}


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
