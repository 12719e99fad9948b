"""Hostile bodies for every dialect: valid ones, changed at random, through the parsers and everything up to the router.

python -m tests.fuzz.bodies 1000000              # in process; nothing but our own errors may come out, and memory stays
python -m tests.fuzz.bodies 20000 --stack        # over HTTP: only statuses that the API's description has
"""

import argparse
import asyncio
import copy
import json
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import httpx
import msgspec

from app.anthropic.message import parse_count, parse_message
from app.anthropic.schema import MessageBody
from app.http.intake import prepared_request
from app.http.routes.tokens import text_of, tokenized_body
from app.keys.tenant import Tenant
from app.openai.bodies import ChatBody, CompletionBody
from app.openai.chat import parse_chat
from app.openai.completions import parse_completion
from app.openai.embeddings import EmbeddingBody, parse_embedding
from app.openai.responses.bodies import ResponseBody
from app.openai.responses.request import parse_response
from app.openai.schema import Limits, ParsedRequest
from app.openai.tokenize import DetokenizeBody, TokenizeBody, parse_detokenize, parse_tokenize
from app.prompt.prepare import ModelEntry, Preprocessor
from app.prompt.template import ChatTemplate
from app.prompt.tokenizer import Tokenizer
from loadtest.stack import stack
from planes.wire.errors import HeadraceError
from planes.wire.messages import RequestId
from tests.fuzz.seeds import HOSTILE, SEEDS, SNIPPETS

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0
"""For one input. Most take less than a thousandth of a second."""
MOST_GROWTH_BYTES = 48 << 20
"""Resident memory may grow by so much after the first tenth; what leaks per input grows without bound."""

PATHS = {
    "chat": "/v1/chat/completions",
    "completion": "/v1/completions",
    "response": "/v1/responses",
    "message": "/v1/messages",
    "count": "/v1/messages/count_tokens",
    "embedding": "/v1/embeddings",
    "tokenize": "/tokenize",
    "detokenize": "/detokenize",
}
PARSERS: dict[str, Callable[..., Any]] = {
    "chat": parse_chat,
    "completion": parse_completion,
    "response": parse_response,
    "message": parse_message,
    "count": parse_count,
    "embedding": parse_embedding,
    "tokenize": parse_tokenize,
    "detokenize": parse_detokenize,
}
BODIES = (ChatBody, CompletionBody, ResponseBody, MessageBody, EmbeddingBody, TokenizeBody, DetokenizeBody)
FIELDS = sorted({name for kind in BODIES for name in kind.__struct_fields__})
DIALECTS = list(PATHS)
PLAUSIBLE: dict[str, list[Any]] = {}
"""Values that a field has somewhere in a valid body."""
for _bodies in SEEDS.values():
    for _body in _bodies:
        for _name, _value in _body.items():
            PLAUSIBLE.setdefault(_name, []).append(_value)
ALIKE = {kind: [value for value in HOSTILE if type(value) is kind] for kind in (str, int, float, list, dict)}
ALIKE[bool] = [True, False]
ALIKE[int], ALIKE[float] = ALIKE[int] + ALIKE[float], ALIKE[float] + ALIKE[int]


class HungError(Exception):
    """One input took longer than `PATIENCE_S`."""


@dataclass(frozen=True)
class Input:
    """A body for one dialect. is_strict: whether unknown fields are refused."""

    dialect: str
    body: bytes
    is_strict: bool


@dataclass
class Report:
    """What came of a run. failures: where each was saved, and why it is one."""

    outcomes: Counter = field(default_factory=Counter)
    failures: list[tuple[Path, str]] = field(default_factory=list)
    growth_bytes: int = 0
    slowest_s: float = 0.0


# Inputs


def inputs(rng: random.Random) -> Iterator[Input]:
    """Without end; the same for the same state of `rng`."""
    while True:
        dialect = rng.choice(DIALECTS)
        value = copy.deepcopy(rng.choice(SEEDS[dialect]))
        for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
            value = _changed(value, rng)
        body = _encoded(value, rng)
        if rng.random() < 0.2:
            body = _damaged(body, rng)
        yield Input(dialect, body, is_strict=rng.random() < 0.1)


def _changed(value: Any, rng: random.Random) -> Any:
    """One change somewhere inside."""
    if not isinstance(value, dict | list) or not value:
        return _hostile(rng, value)
    if isinstance(value, dict) and rng.random() < 0.35:
        name = rng.choice(FIELDS) if rng.random() < 0.9 else rng.choice(SNIPPETS)
        if name in PLAUSIBLE and rng.random() < 0.5:
            value[name] = copy.deepcopy(rng.choice(PLAUSIBLE[name]))
        else:
            value[name] = _hostile(rng)
        return value
    at: Any = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    match rng.randrange(8):
        case 0:
            del value[at]
        case 1 | 2:
            value[at] = _hostile(rng, value[at])
        case 3 if isinstance(value, list):
            value.extend([value[at]] * rng.choice((1, 2, 40)))
        case 3 if isinstance(value, dict):
            value[rng.choice(SNIPPETS)] = value[at]
        case 4:
            value[at] = [value[at]] if rng.random() < 0.5 else {rng.choice(FIELDS): value[at]}
        case _:
            value[at] = _changed(value[at], rng)
    return value


def _hostile(rng: random.Random, like: Any = None) -> Any:
    """Often of the type of what it replaces: other types end at the first door."""
    alike = ALIKE.get(type(like)) if rng.random() < 0.6 else None
    value = copy.deepcopy(rng.choice(alike or HOSTILE))
    if isinstance(value, str) and rng.random() < 0.3:
        return value + rng.choice(SNIPPETS) * rng.choice((1, 2, 300))
    if rng.random() < 0.02:
        for _ in range(rng.choice((5, 60, 600))):
            value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def _encoded(value: Any, rng: random.Random) -> bytes:
    try:
        text = json.dumps(value, ensure_ascii=rng.random() < 0.7)
    except RecursionError:
        text = "[" * 5000
    return text.encode("utf-8", "surrogatepass")


def _damaged(body: bytes, rng: random.Random) -> bytes:  # noqa: PLR0911 - one for each kind of damage
    """As bytes, so that it may be no JSON any more."""
    at = rng.randrange(len(body) + 1)
    match rng.randrange(9):
        case 0:
            return body[:at]
        case 1:
            end = min(len(body), at + rng.randrange(1, 30))
            return body[:at] + body[end:]
        case 2:
            return body[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 6))) + body[at:]
        case 3:
            name = rng.choice(FIELDS)
            return b'{"%b": %b, ' % (name.encode(), json.dumps(_hostile(rng)).encode()) + body.lstrip()[1:]
        case 4:
            return body.replace(b"1", rng.choice((b"1e999", b"-0", b"1E-400", b"9" * 400, b"NaN", b"01", b"1.0")), 1)
        case 5:
            return body.replace(
                b'": "', rng.choice((b'": "\\ud800', b'": "\\u0000', b'": "\xed\xa0\x80', b'": "\xff')), 1
            )
        case 6:
            opening = rng.choice((b"[", b'{"a":', b'[{"a":'))
            return body.replace(b": ", b": " + opening * rng.choice((10, 1000, 50_000)), 1)
        case 7:
            return _deepened(body, rng)
        case _:
            return rng.choice(
                (b"", b"null", b"[]", b"\xef\xbb\xbf" + body, body + b"}", body + body, b" " * 1000 + body)
            )


def _deepened(body: bytes, rng: random.Random) -> bytes:
    """With one more member somewhere, nested about as deeply as interpreters go."""
    depth = rng.choice((20, 200, rng.randrange(300, 1100)))
    opening, closing = rng.choice(((b"[", b"]"), (b'{"a": ', b"}")))
    member = b'"%b": %b%b, ' % (rng.choice(FIELDS).encode(), opening * depth + b"1", closing * depth)
    pieces = body.split(b'{"')
    at = rng.randrange(1, len(pieces)) if len(pieces) > 1 else 0
    return b'{"'.join(pieces[:at]) + b"{" + member + b'"' + b'{"'.join(pieces[at:]) if at else body


# In process


class Gateway:
    """As much of a gateway as stands between a body and the router."""

    def __init__(self) -> None:
        folder = ROOT / "workers" / "sim" / "model"
        config = json.loads((folder / "tokenizer_config.json").read_text())
        tokenizer = Tokenizer((folder / "tokenizer.json").read_bytes(), config)
        template = ChatTemplate(config["chat_template"], tokenizer.special_tokens, variables=tokenizer.variables)
        shape = {"context_length": 2048, "block_size": 16, "vocab_size": tokenizer.vocab_size, "max_batch": 128}
        told = {"tool_parser": "hermes", "reasoning_parser": "think"}
        self._models = {
            "sim": ModelEntry("sim", tokenizer, template, **shape, **told),
            "plain": ModelEntry("plain", tokenizer, template, **shape),
            "bare": ModelEntry("bare", tokenizer, None, **shape),
            "embed": ModelEntry("embed", tokenizer, template, **shape, embedding_size=8, is_matryoshka=True),
        }
        self.models = self
        self.settings = SimpleNamespace(request_timeout_s=60.0)
        self.preprocessor = Preprocessor(inline_bytes=1 << 30)
        self.tracer = None

    def entry(self, name: str) -> ModelEntry:
        """Names of models are no news here: what nobody serves stands for one that reads no calls."""
        return self._models.get(name) or self._models["plain"]

    def for_task(self, *, is_embedding: bool) -> list[str]:
        return [name for name, entry in self._models.items() if (entry.embedding_size > 0) == is_embedding]

    def wall_clock(self) -> float:
        return 0.0

    async def take(self, one: Input) -> str:
        """What becomes of a body.  Raises:  whatever is no error of ours."""
        try:
            asked = PARSERS[one.dialect](one.body, Limits(has_strict_fields=one.is_strict))
            if one.dialect in ("count", "tokenize", "detokenize"):
                return await self._counted(one.dialect, asked)
            parsed = _completed(one.dialect, asked)
            job = await prepared_request(
                self,
                parsed,
                headers={},
                tenant=Tenant("fuzz"),
                request_id=RequestId("r"),
                arrived_at=time.monotonic(),
            )
        except HeadraceError as exc:
            str(exc).encode()  # it must have a message that can be written
            return exc.code
        for each in (job, *job.beside):
            msgspec.msgpack.encode((each.sampling, each.format, each.cache_salt))
        return "taken"

    async def _counted(self, dialect: str, asked: Any) -> str:
        """What the routes do that generate nothing."""
        model = self.entry(asked.parsed.model if dialect == "tokenize" else asked.model)
        if dialect == "detokenize":
            text_of(model, asked.tokens).encode()
            return "counted"
        is_plain = dialect == "tokenize" and asked.is_plain
        parsed = asked.parsed if dialect == "tokenize" else asked
        tokens = await self.preprocessor.tokenize(parsed, model, is_plain=is_plain)
        if dialect == "tokenize":
            msgspec.json.encode(tokenized_body(model, tokens, asked.has_strings))
        return "counted"


def _completed(dialect: str, asked: Any) -> ParsedRequest:
    if dialect == "response":
        return asked.completed([], {}, is_stored=False, num_bytes=0)
    return asked.parsed if dialect == "embedding" else asked


class Taker(Protocol):
    """What bodies are given to."""

    async def take(self, one: Input) -> str:
        """A word for what became of it.  Raises:  whatever is no error of ours."""


async def in_process(gateway: Taker, num_inputs: int, seed: int, folder: Path, *, is_shown: bool = False) -> Report:
    """So many inputs; those that fail are written to `folder`."""
    report, generated = Report(), inputs(random.Random(seed))
    start = rss_bytes()
    began = time.monotonic()
    for number in range(num_inputs):
        one = next(generated)
        before = time.perf_counter()
        try:
            with _patience():
                outcome = await gateway.take(one)
        except Exception as exc:  # noqa: BLE001 - that is what is looked for
            outcome = type(exc).__name__
            _save(report, folder, one, number, traceback.format_exc())
        report.outcomes[outcome] += 1
        report.slowest_s = max(report.slowest_s, time.perf_counter() - before)
        if number == num_inputs // 10:
            start = rss_bytes()
        if is_shown and number % 20_000 == 19_999:
            rate = (number + 1) / (time.monotonic() - began)
            _show(f"{number + 1:,} of {num_inputs:,}, {rate:,.0f}/s, {len(report.failures)} failed, "
                  f"{rss_bytes() >> 20} MiB")  # fmt: skip
        if len(report.failures) >= 50:
            break
    report.growth_bytes = rss_bytes() - start
    return report


class _patience:  # noqa: N801 - reads as a function
    def __enter__(self) -> None:
        signal.signal(signal.SIGALRM, _hung)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _hung(*_: object) -> None:
    raise HungError(f"more than {PATIENCE_S} s")


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _save(report: Report, folder: Path, one: Input, number: int, why: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{one.dialect}-{number}{'-strict' * one.is_strict}.json"
    path.write_bytes(one.body)
    report.failures.append((path, why))


def _show(text: str) -> None:
    sys.stderr.write(text + "\n")


# Over HTTP


async def over_http(num_inputs: int, seed: int, folder: Path, url: str, *, is_shown: bool = False) -> Report:
    """So many inputs to a gateway, eight at a time; a status that its description does not have is a failure."""
    report, generated = Report(), enumerate(inputs(random.Random(seed)))
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as http:
        document = (await http.get("/openapi.json")).json()

        async def send() -> None:
            for number, one in generated:
                if number >= num_inputs or len(report.failures) >= 50:
                    return
                try:
                    response = await http.post(PATHS[one.dialect], content=_shortened(one.body))
                except httpx.HTTPError as exc:
                    _save(report, folder, one, number, repr(exc))
                    continue
                report.outcomes[str(response.status_code)] += 1
                known = document["paths"][PATHS[one.dialect]]["post"]["responses"]
                is_fault = response.status_code >= 500 and response.status_code not in (503, 504)
                if is_fault or str(response.status_code) not in known:
                    _save(report, folder, one, number, f"{response.status_code}: {response.text[:500]}")
                if is_shown and number % 2000 == 1999:
                    _show(f"{number + 1:,} of {num_inputs:,} over HTTP, {len(report.failures)} failed")

        async with asyncio.TaskGroup() as tasks:
            for _ in range(8):
                tasks.create_task(send())
    return report


async def _with_stack(num_inputs: int, seed: int, folder: Path) -> Report:
    async with stack("--engine", "sim", "--prefill", "1", "--decode", "1") as one:
        return await over_http(num_inputs, seed, folder, f"http://127.0.0.1:{one.port}", is_shown=True)


def _shortened(body: bytes) -> bytes:
    """With an answer's length that a test can wait for: the last of two equal fields counts."""
    end = body.rstrip()
    if not end.endswith(b"}") or len(end) < 3:
        return body
    return end[:-1] + b', "timeout_ms": 2000}'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("num_inputs", type=int, nargs="?", default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--stack", action="store_true", help="send them to a gateway with the simulated engine")
    parser.add_argument("--save", type=Path, default=Path("build/fuzz"), help="where failing bodies are written")
    arguments = parser.parse_args()
    _show(f"seed {arguments.seed}")
    run = (arguments.num_inputs, arguments.seed, arguments.save)
    if arguments.stack:
        report = asyncio.run(_with_stack(*run))
    else:
        report = asyncio.run(in_process(Gateway(), *run, is_shown=True))
    _show(f"{report.outcomes.total():,} inputs: {dict(report.outcomes.most_common())}")
    _show(f"slowest {report.slowest_s:.3f} s; memory grew by {report.growth_bytes / (1 << 20):.1f} MiB")
    for path, why in report.failures:
        _show(f"\nFAILED {path} (seed {arguments.seed})\n{why}")
    if report.growth_bytes > MOST_GROWTH_BYTES:
        _show(f"FAILED: memory grew by {report.growth_bytes} bytes and the limit is {MOST_GROWTH_BYTES}")
    return int(bool(report.failures) or report.growth_bytes > MOST_GROWTH_BYTES)


if __name__ == "__main__":
    sys.exit(main())
