import math
import re

import msgspec
import pytest
from msgspec.structs import replace

from loadtest.plan.report import Plan, explained, in_order, table
from loadtest.plan.trial import Fleet, Pressure, Trial
from loadtest.slo import Slo

SLO = Slo(2.0, 0.05)


def made(fleet, ttft_s=1.0, itl_s=0.02, shares=(0.8, 0.1, 0.2, 0.1)):
    return Trial(fleet, 100, 0, 0.99, ttft_s, itl_s, ttft_s / 2.0, itl_s / 0.05, Pressure(*shares))


def both(count, **figures):
    return made(Fleet(num_both=count), **figures)


def split(prefill, decode, **figures):
    return made(Fleet(num_prefill=prefill, num_decode=decode), **figures)


def plan(*trials, alone_p99_s=0.5, empty_step_s=0.008):
    return Plan("load", 5.0, 1000, SLO, alone_p99_s, empty_step_s, in_order(trials), {}, {})


def said(*trials, **fields):
    return "\n".join(explained(plan(*trials, **fields)))


def test_a_line_an_alternative_and_marks_for_those_that_hold():
    lines = table(plan(split(2, 2, ttft_s=1.9), both(3, ttft_s=3.6), both(4), both(6))).splitlines()
    assert [line.split()[:3] for line in lines[3:7]] == [
        ["3", "both", "3"],
        ["*", "4", "both"],
        ["6", "both", "6"],
        ["+", "2", "prefill"],
    ]
    assert "TTFT x1.80" in lines[3]


def test_one_that_never_serves_is_told_as_such():
    text = table(plan(both(1, ttft_s=math.inf), both(2)))
    assert "TTFT xnever" in text
    assert msgspec.json.decode(msgspec.json.encode(plan(both(1, ttft_s=math.inf))))["trials"][0]["ttft_p99_s"] is None


def test_what_was_not_tried_to_the_end_is_at_least_so_much():
    far = replace(both(2, ttft_s=4.1), is_cut=True)
    lines = table(plan(far, both(4))).splitlines()
    assert {"<99.0%", ">4.10", ">20.0", "TTFT", ">x2.05"} <= set(lines[3].split())
    assert "> at least: not tried to the end, since 2 times the SLO was sure" in lines[-1]
    assert "at least" not in table(plan(both(4)))
    assert "2 both miss it: p99 TTFT is at least 4.10 s" in said(far, both(4))
    assert "The nearest is 64 both" in said(far, both(64, ttft_s=9.0))


@pytest.mark.parametrize(
    ("trials", "words"),
    [
        ((both(3), split(3, 1)), r"not worth it here: 3 prefill \+ 1 decode would be needed, 1 more"),
        ((both(5), split(2, 1)), "saves 2 of 5 workers: 5 both would be needed"),
        ((both(3, ttft_s=1.9), split(2, 1)), r"saves no worker \(3 both hold it too\)"),
        ((both(3, ttft_s=0.2), split(2, 1, ttft_s=1.9)), "2 prefill \\+ 1 decode are as many, and leave less room"),
        ((both(3, ttft_s=9.0), split(2, 1)), "disaggregation is what makes it possible"),
        ((both(3), split(2, 1, itl_s=9.0)), "No split .* holds it: disaggregation is not worth it here"),
    ],
)
def test_whether_disaggregation_is_worth_it_is_said(trials, words):
    assert re.search(words, said(*trials))


def test_the_next_smaller_fleet_is_explained_by_what_it_is_short_of():
    text = said(both(2, ttft_s=9.0), both(3, ttft_s=4.0, shares=(1.1, 0.1, 0.1, 0.1)), both(4), split(9, 9))
    assert "3 both miss it: p99 TTFT is 4.00 s, 2.00 times the SLO; it is short of prefill (prefill 110%" in text
    assert "2 both" not in text
    assert "The next bottleneck is prefill: 80%" in text


def test_streams_that_prompts_stall_are_told_apart():
    assert "each stalls the streams beside it" in said(both(3, itl_s=0.1), both(4))


def test_short_answers_that_no_number_of_workers_speeds_up_are_told_apart():
    assert "though nothing is short (33% at most): one of a request's gaps is its handover" in said(
        both(3), split(9, 9, itl_s=0.1, shares=(0.33, 0.1, 0.1, 0.1))
    )


def test_an_slo_that_no_fleet_holds_says_so_and_why():
    text = said(both(3, ttft_s=9.0), both(64, ttft_s=4.5), split(60, 4, ttft_s=5.0), alone_p99_s=4.4)
    assert "No fleet of up to 64 workers holds the SLO. The nearest is 64 both" in text
    assert "More workers cannot help: a prompt of p99's length takes 4.40 s on an idle worker" in text


def test_a_narrow_miss_is_not_rounded_away():
    assert "ITL x1.01" in table(plan(both(1, itl_s=0.05001), both(2)))


def test_a_step_longer_than_the_slo_is_why_no_fleet_holds_it():
    text = said(both(3, itl_s=0.08), both(64, itl_s=0.07), empty_step_s=0.06)
    assert "More workers cannot help: the shortest decode step takes 60.0 ms, and the SLO is 50 ms." in text


def test_a_fleet_that_falls_behind_slowly_is_told_as_such():
    slow = both(2, shares=(0.9, 0.15, 0.1, 0.1))
    assert "load x1.05" in table(plan(slow, both(3, shares=(0.6, 0.1, 0.1, 0.1))))
    text = said(slow, both(3, shares=(0.6, 0.1, 0.1, 0.1)))
    assert "2 both miss it: 105% of the seconds that it has are wanted" in text
