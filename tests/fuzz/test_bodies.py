"""A short share of `make fuzz`, always the same; and that it finds what there is to find."""

import itertools
import json
import random

from tests.fuzz import bodies
from tests.fuzz.seeds import SEEDS


async def test_nothing_but_our_own_errors_comes_out(tmp_path):
    report = await bodies.in_process(bodies.Gateway(), 1500, 1, tmp_path)
    assert report.failures == []
    assert report.outcomes.total() == 1500
    assert report.outcomes["taken"] > 100, "they are hostile, but not all of them useless"


async def test_every_seed_is_valid():
    gateway = bodies.Gateway()
    outcomes = {
        (dialect, number): await gateway.take(bodies.Input(dialect, json.dumps(body).encode(), is_strict=True))
        for dialect, each in SEEDS.items()
        for number, body in enumerate(each)
    }
    assert {case: outcome for case, outcome in outcomes.items() if outcome not in ("taken", "counted")} == {}


class Careless:
    async def take(self, one):
        if b"model" in one.body:
            raise KeyError("name")
        return "taken"


async def test_an_exception_is_told_and_its_body_saved(tmp_path):
    report = await bodies.in_process(Careless(), 30, 1, tmp_path)
    assert report.failures
    assert report.outcomes["taken"]
    path, why = report.failures[0]
    assert b"model" in path.read_bytes()
    assert "KeyError: 'name'" in why


def test_a_seed_says_everything():
    def first():
        return list(itertools.islice(bodies.inputs(random.Random(7)), 300))

    assert first() == first()
    assert len({one.body for one in first()}) > 250
