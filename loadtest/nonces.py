"""What a line that is new in each request costs, and what dropping it saves.

    python -m loadtest.nonces [--conversations 200] [--turns 5]

Coding agents put a line for their maker's billing in front of their system prompt (`app/prompt/nonce.py`). The same
conversations are held three times, each time with a fleet of its own: without such a line, with one that the gateway
drops, and with one that it keeps (`--keep-prompt-nonces`). The hit rate is the share of all prompt tokens that `usage`
calls cached; a token of the simulated engine is one character.
"""

import asyncio
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import uvloop
from cyclopts import App

from loadtest.client import Client, Sample
from loadtest.stack import Stack, stack

SPEEDUP: Final = 20.0
SYSTEM_CHARS, QUESTION_CHARS, ANSWER_TOKENS = 4_000, 400, 64
app = App(help=__doc__, version_flags=[])


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to hold the conversations."""

    name: str
    has_line: bool
    environment: dict[str, str]


VARIANTS: Final = (
    Variant("no such line", has_line=False, environment={}),
    Variant("the line dropped (default)", has_line=True, environment={}),
    Variant("the line kept", has_line=True, environment={"HEADRACE_KEEP_PROMPT_NONCES": "1"}),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """hit_rate: cached of all prompt tokens, 0.0 to 1.0."""

    requests: int
    prompt_tokens: int
    hit_rate: float
    ttft_p50_s: float
    ttft_p95_s: float


def text(rng: random.Random, num_chars: int) -> str:
    """Words, as many as there is room for."""
    return " ".join("".join(rng.choices("aeioubdgklmnrst", k=6)) for _ in range(num_chars // 7))


def system_prompt(shared: str, rng: random.Random, *, has_line: bool) -> str:
    """With a line that is another one each time, if there is one."""
    line = f"x-anthropic-billing-header: cc_version=2.1.9; cch={rng.getrandbits(64):016x};\n"
    return line + shared if has_line else shared


def outcome(samples: list[Sample]) -> Outcome:
    """Raises:  RuntimeError if one of them failed."""
    failed = [sample.error or str(sample.status) for sample in samples if sample.error or sample.status != 200]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(samples)} requests failed, first with: {failed[0][:500]}")
    prompt_tokens = sum(sample.prompt_tokens for sample in samples)
    percentiles = statistics.quantiles([sample.ttft_s for sample in samples], n=20, method="inclusive")
    cached = sum(sample.cached_tokens for sample in samples)
    return Outcome(len(samples), prompt_tokens, cached / prompt_tokens, percentiles[9], percentiles[18])


async def hold(running: Stack, variant: Variant, conversations: int, turns: int, clients: int) -> Outcome:
    """All conversations, as many at a time as there are clients; the same texts for each variant."""
    shared, numbers = text(random.Random(0), SYSTEM_CHARS), iter(range(conversations))
    samples: list[Sample] = []
    async with asyncio.TaskGroup() as tasks:
        for _ in range(clients):
            tasks.create_task(_converse(running, variant, shared, numbers, turns, samples))
    return outcome(samples)


async def _converse(
    running: Stack, variant: Variant, shared: str, numbers: Iterator[int], turns: int, samples: list[Sample]
) -> None:
    client = Client("127.0.0.1", running.port, keeps_text=True)
    for number in numbers:
        rng = random.Random(number + 1)
        messages: list[dict[str, Any]] = []
        for _ in range(turns):
            messages.append({"role": "user", "content": text(rng, QUESTION_CHARS)})
            system = system_prompt(shared, rng, has_line=variant.has_line)
            body = {
                "model": running.model,
                "messages": [{"role": "system", "content": system}, *messages],
                "max_tokens": ANSWER_TOKENS,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            samples.append(await client.post("/v1/chat/completions", body))
            messages.append({"role": "assistant", "content": "".join(samples[-1].text)})
    client.close()


@app.default
def main(*, conversations: int = 200, turns: int = 5, clients: int = 16) -> None:
    """Print a table of the three."""
    print(
        "| system prompts with | requests | prompt tokens | hit rate | TTFT p50 | TTFT p95 |\n|---|--:|--:|--:|--:|--:|"
    )
    for variant in VARIANTS:
        found = uvloop.run(_run(variant, conversations, turns, clients))
        print(
            f"| {variant.name} | {found.requests:,} | {found.prompt_tokens:,} | {found.hit_rate:.1%} | "
            f"{1000 * found.ttft_p50_s:.0f} ms | {1000 * found.ttft_p95_s:.0f} ms |",
            flush=True,
        )


async def _run(variant: Variant, conversations: int, turns: int, clients: int) -> Outcome:
    environment = {"HEADRACE_SPEEDUP": str(SPEEDUP), **variant.environment}
    async with stack("--engine", "sim", "--prefill", "2", "--decode", "2", environment=environment) as running:
        return await hold(running, variant, conversations, turns, clients)


if __name__ == "__main__":
    app()
