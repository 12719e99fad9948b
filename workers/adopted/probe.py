"""A few requests of our own, before the first of others: where a server hands KV caches over, and how fast it is.

A server tells neither of them otherwise, nor what each of its steps takes.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from planes.wire.messages import LatencyPrior
from planes.wire.unreadable import UNREADABLE
from workers.adopted.answer import END, Chunk, decode_chunk, events
from workers.adopted.examine import GENERATE
from workers.adopted.handover import KeptBlocks, kept_blocks
from workers.adopted.http import HttpClient, ServerGone
from workers.engine.base import EngineStartError
from workers.vllm.request import KEEP

_TIMEOUT_S = 300.0
"""The first request after a start may compile."""
_NUM_STEPS = 6
_MAX_TRIES = 3

_CONNECTOR = """--kv-transfer-config '{"kv_connector": "NixlConnector", "kv_role": "kv_producer"}' """
_CONNECTOR += "(kv_consumer for a decode worker, kv_both for either)"


@dataclass(frozen=True, slots=True)
class Probe:
    """kept: what the server said of a KV cache that it was to keep; None: nobody asked."""

    latency: LatencyPrior
    kept: KeptBlocks | None = None
    has_thinking_budget: bool = False


async def probed(
    client: HttpClient, *, num_tokens: int, vocab_size: int, has_handover: bool, draw: Callable[[int], int]
) -> Probe:
    """
    Args:  num_tokens: of the prompt.  draw: a number below its argument; nothing of the prompt shall be cached.
    Raises:  EngineStartError, ServerGone.
    """
    prompt = [draw(vocab_size) for _ in range(num_tokens)]
    await _asked(client, prompt[:1], {})
    began_at = time.monotonic()
    whole = await _asked(client, prompt, {"kv_transfer_params": KEEP} if has_handover else {})
    prefill_s = time.monotonic() - began_at
    step_s = await _step(client, prompt)
    latency = LatencyPrior(
        prefill_fixed_s=step_s,
        prefill_per_token_s=max(prefill_s - step_s, 1e-6) / num_tokens,
        step_fixed_s=step_s,
    )
    kept = _kept(client, whole, num_tokens) if has_handover else None
    return Probe(latency, kept, await _takes_budget(client, prompt[:1]))


def _kept(client: HttpClient, whole: Chunk, num_tokens: int) -> KeptBlocks:
    if not whole.kv_transfer_params:
        raise EngineStartError(
            f"the vLLM server at {client.address.netloc} hands no KV cache over and must be started with {_CONNECTOR}; "
            "or take --handover none"
        )
    try:
        kept = kept_blocks(whole.kv_transfer_params)
    except msgspec.ValidationError as exc:
        raise EngineStartError(f"this server's handover is none of NIXL's connector: {exc}; see --handover") from exc
    if kept.transfer_mode != "pull" or kept.remote_num_tokens != num_tokens:
        raise EngineStartError(
            f"the server moves KV caches by {kept.transfer_mode}, {kept.remote_num_tokens} of {num_tokens} tokens: "
            "NixlConnector (pull) is wanted; or take --handover none"
        )
    return kept


async def _asked(client: HttpClient, prompt: list[int], more: dict[str, Any]) -> Chunk:
    status, reply = await client.ask("POST", GENERATE, _body(prompt, 1, more), timeout_s=_TIMEOUT_S)
    whole = _chunk(reply)
    if status != 200:
        raise EngineStartError(f"{GENERATE} answers {status}: {whole.error.message if whole.error else ''}")
    return whole


def _chunk(reply: bytes) -> Chunk:
    try:
        return decode_chunk(reply)
    except UNREADABLE as exc:
        raise EngineStartError(f"{GENERATE} does not answer as vLLM does: {exc}") from exc


async def _takes_budget(client: HttpClient, prompt: list[int]) -> bool:
    """A server without a reasoning parser refuses every budget."""
    body = _body(prompt, 1, {}, thinking_token_budget=1)
    status, _ = await client.ask("POST", GENERATE, body, timeout_s=_TIMEOUT_S)
    return status == 200


async def _step(client: HttpClient, prompt: list[int]) -> float:
    """Seconds of a decode step, the median of some. Asked again if a busy server has sent all tokens at once."""
    for _ in range(_MAX_TRIES):
        instants: list[float] = []
        async with client.request("POST", GENERATE, _body(prompt, _NUM_STEPS, {"stream": True})) as response:
            async for event in events(response.body()):
                instants += [time.monotonic()] if event != END and _chunk(event).choices else []
        if len(instants) > 1:
            return statistics.median(after - before for before, after in itertools.pairwise(instants))
    raise ServerGone(f"{_MAX_TRIES} streams of {_NUM_STEPS} tokens came without a pause between any two of them")


def _body(prompt: list[int], max_tokens: int, more: dict[str, Any], **sampled: Any) -> bytes:
    sampling = {"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, "detokenize": False} | sampled
    return msgspec.json.encode({"token_ids": prompt, "sampling_params": sampling} | more)
