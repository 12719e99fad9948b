"""Schemathesis over the API's own description, against a gateway that runs: every answer is one that is described.

python -m tests.fuzz.routes 20000                # starts a stack with the simulated engine
python -m tests.fuzz.routes 20000 --url http://… # a gateway that runs already
"""

import argparse
import asyncio
import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from loadtest.stack import stack

PATIENCE_S = 180.0
"""For one answer; longer is a hang."""
ALLOWED_FAULTS = (503, 504)
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
ENDLESS = "/console/state"
"""Goes on for as long as somebody reads it."""
_WEIGHT_WITH_BODY = 8
"""A route with a body gets so many times the cases of one without."""


@dataclass
class Report:
    """What came of a run. failures: what was sent, and why it is one."""

    statuses: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    num_cases: int = 0


class HostileAnswerError(AssertionError):
    """A status that a server should not give."""


def run(url: str, num_cases: int, number: int, model: str, *, is_shown: bool = False) -> Report:
    """So many cases, shared out among all operations. number: the seed."""
    document = requests.get(f"{url}/openapi.json", timeout=PATIENCE_S).json()
    schema = schemathesis.openapi.from_dict(document)
    operations = [each.ok() for each in schema.get_all_operations()]
    operations = [each for each in operations if each.path != ENDLESS]
    weights = [_WEIGHT_WITH_BODY if "requestBody" in each.definition.raw else 1 for each in operations]
    report, session = Report(), requests.Session()
    began = time.monotonic()
    for operation, weight in zip(operations, weights, strict=True):
        for mode, part in _modes(operation, -(-num_cases * weight // sum(weights))):
            _fuzz(operation, mode, part, number, _Sender(url, session, model, report))
        if is_shown:
            _show(f"{report.num_cases:,} cases in {time.monotonic() - began:.0f} s, {len(report.failures)} failed; "
                  f"{operation.label}")  # fmt: skip
    return report


def _modes(operation: Any, share: int) -> Iterator[tuple[GenerationMode, int]]:
    """A third breaks the description, where there is something to break."""
    told = operation.definition.raw
    num_bad = share // 3 if "requestBody" in told or told.get("parameters") else 0
    yield GenerationMode.POSITIVE, share - num_bad
    if num_bad:
        yield GenerationMode.NEGATIVE, num_bad


@dataclass
class _Sender:
    url: str
    session: requests.Session
    model: str
    report: Report

    def send(self, case: Any) -> None:
        """Raises:  an error that tells what is wrong with the answer."""
        _tame(case, self.model)
        self.report.num_cases += 1
        response = case.call(base_url=self.url, session=self.session, timeout=PATIENCE_S)
        self.report.statuses[response.status_code] += 1
        if response.status_code >= 500 and response.status_code not in ALLOWED_FAULTS:
            raise HostileAnswerError(f"{response.status_code}: {response.text[:500]}")
        case.validate_response(response, checks=CHECKS, excluded_checks=[not_a_server_error])


def _fuzz(operation: Any, mode: GenerationMode, num_cases: int, number: int, sender: _Sender) -> None:
    @seed(number)
    @settings(
        max_examples=num_cases,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        try:
            sender.send(case)
        except (AssertionError, requests.RequestException, ExceptionGroup) as exc:
            sender.report.failures.append(f"{repr(case)[:3000]}\n{type(exc).__name__}: {exc}")

    with contextlib.suppress(Unsatisfiable):  # every text is a valid id
        check()


def _tame(case: Any, model: str) -> None:
    """Half of the bodies name a model that is there, and none asks for an answer that nobody waits for."""
    if not isinstance(case.body, dict):
        return
    if len(repr(case.body)) % 2:
        case.body["model"] = model
    if case.operation.path in GENERATING:
        name = "max_output_tokens" if case.operation.path == "/v1/responses" else "max_tokens"
        if case.body.get(name) is None or (isinstance(case.body[name], int) and case.body[name] > 8):
            case.body[name] = 8
        case.body.pop("max_completion_tokens", None)


def _show(text: str) -> None:
    sys.stderr.write(text + "\n")


async def _with_stack(arguments: argparse.Namespace) -> Report:
    flags = ("--engine", "sim", "--prefill", "1", "--decode", "1")
    async with stack(*flags) as one:
        return await asyncio.to_thread(
            run, f"http://127.0.0.1:{one.port}", arguments.num_cases, arguments.seed, one.model, is_shown=True
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("num_cases", type=int, nargs="?", default=20_000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--url", help="of a gateway; without it a stack is started")
    parser.add_argument("--model", default="sim", help="which it serves, with --url")
    parser.add_argument("--save", type=Path, default=Path("build/fuzz"), help="where failures are written")
    arguments = parser.parse_args()
    _show(f"seed {arguments.seed}")
    if arguments.url:
        report = run(arguments.url, arguments.num_cases, arguments.seed, arguments.model, is_shown=True)
    else:
        report = asyncio.run(_with_stack(arguments))
    _show(f"{report.num_cases:,} cases: {dict(report.statuses.most_common())}")
    if report.failures:
        arguments.save.mkdir(parents=True, exist_ok=True)
        (arguments.save / f"routes-{arguments.seed}.txt").write_text("\n\n".join(report.failures))
        _show(f"{len(report.failures)} FAILED (seed {arguments.seed}), in {arguments.save}; the first:")
        _show(report.failures[0])
    return int(bool(report.failures))


if __name__ == "__main__":
    sys.exit(main())
