"""Parts of what a request and a token cost that need no fleet, each alone in this process."""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import msgspec
import numpy as np

from app.openai.chat import parse_chat
from app.prompt.prepare import ModelEntry, Preprocessor
from app.prompt.template import ChatTemplate
from app.prompt.tokenizer import Tokenizer
from loadtest.bench_index import apply_rates, fill, makers, match_us
from planes.streams.protocol import framed
from planes.wire.frames import Delta, FromWorker, Step, StreamId
from planes.wire.messages import HandoverMode
from workers.nixl_wheel import installed_wheel
from workers.settings import SIM_MODEL
from workers.sim.kv_pool import KvPool
from workers.sim.transfer import NixlTransfer

_STREAMS = 256
_BLOCKS, _BLOCK_BYTES = 4096, 16_384
"""Of a handover: 64 MiB."""


def measure_parts(*, rounds: int) -> dict[str, float]:
    """By name, with the unit in it; medians of `rounds`. Printed as they end."""
    found: dict[str, float] = {}
    for part in (frames, index, lambda: asyncio.run(prompts()), lambda: asyncio.run(handover())):
        runs: list[dict[str, float]] = [part() for _ in range(rounds)]
        for name in runs[0]:
            found[name] = statistics.median(run[name] for run in runs)
            print(f"{name}: {found[name]:,.2f}", flush=True)
    return found


def _cpu_us(work: Callable[[], object], times: int) -> float:
    begun = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - begun) / times * 1e6


def frames() -> dict[str, float]:
    """A step's frame with a token for each of many streams."""
    event = b'data: {"id":"chatcmpl-0","choices":[{"index":0,"delta":{"content":" a"},"finish_reason":null}]}\n\n'
    step = Step([Delta(StreamId(number), event, [number]) for number in range(_STREAMS)])
    decode = msgspec.msgpack.Decoder(FromWorker).decode
    frame = framed(step, 1 << 24)
    return {
        "frame written, µs per token": _cpu_us(lambda: framed(step, 1 << 24), 500) / _STREAMS,
        "frame read, µs per token": _cpu_us(lambda: decode(memoryview(frame)[4:]), 500) / _STREAMS,
    }


def index() -> dict[str, float]:
    """The fastest block index there is, 8 workers."""
    make = list(makers().items())
    name, maker = next((found for found in make if found[0] == "compiled"), make[0])
    rates = apply_rates(maker(2, 100_000), 100_000, 256)
    filled = maker(8, 100_000)
    matches = match_us(filled, fill(filled, 8, 100_000))
    return {
        f"index ({name}), million new blocks taken in a second": rates["new"],
        "index, µs to match 128 blocks that all hold": matches["all"],
        "index, µs to match 128 blocks that nobody holds": matches["nobody"],
    }


async def prompts() -> dict[str, float]:
    """A chat from its body to tokens and block names: one seen before, the next turn of one, and one that is new."""
    config = json.loads((SIM_MODEL / "tokenizer_config.json").read_text())
    tokenizer = Tokenizer((SIM_MODEL / "tokenizer.json").read_bytes(), config)
    template = ChatTemplate(config["chat_template"], tokenizer.special_tokens, variables=tokenizer.variables)
    size = tokenizer.vocab_size
    model = ModelEntry("sim", tokenizer, template, context_length=100_000, block_size=16, vocab_size=size)
    preprocessor = Preprocessor()
    rng = random.Random(1)

    def text(length: int) -> str:
        return "".join(rng.choices("abcdefgh ", k=length))

    def body(*said: str) -> bytes:
        messages = [{"role": "assistant" if n % 2 else "user", "content": each} for n, each in enumerate(said)]
        return json.dumps({"model": "sim", "messages": messages}).encode()

    async def prepare(body: bytes) -> None:
        await preprocessor.prepare(await preprocessor.parse(parse_chat, body), model, cache_salt="")

    found = {}
    for name, length in (("200", 200), ("8,000", 8000)):
        first, count = text(length), 50
        await prepare(body(first))
        cases = {
            "seen before": [body(first)] * count,
            "next turn": [body(first, text(40), text(40)) for _ in range(count)],
            "new": [body(text(length)) for _ in range(count)],
        }
        for case, bodies in cases.items():
            found[f"prompt of {name} characters, {case}, µs"] = await _each_us(prepare, bodies)
    preprocessor.close()
    return found


async def _each_us(work: Callable[[bytes], Awaitable[None]], bodies: Iterable[bytes]) -> float:
    """CPU of this process, threads included."""
    bodies = list(bodies)
    begun = time.process_time()
    for body in bodies:
        await work(body)
    return (time.process_time() - begun) / len(bodies) * 1e6


async def handover() -> dict[str, float]:
    """64 MiB from one pool of blocks to another: as engines hand it over, with NIXL's bare calls, and copied."""
    ours, theirs = KvPool(_BLOCKS, _BLOCK_BYTES), KvPool(_BLOCKS, _BLOCK_BYTES)
    theirs.data[:] = 7
    size_gb = ours.data.nbytes / 1e9
    np.copyto(ours.data, theirs.data)  # pages that were never touched would be counted in
    copied_s = await _seconds(_copied(ours, theirs))
    found = {"memcpy of 64 MiB, GB/s": size_gb / copied_s}
    if installed_wheel() is None:
        return found
    prefill, decode = (
        NixlTransfer(pool, mode=HandoverMode.PULL, engine_id=name, host="127.0.0.1")
        for pool, name in ((theirs, f"prefill-{time.time_ns()}"), (ours, f"decode-{time.time_ns()}"))
    )
    await prefill.start()
    await decode.start()
    try:
        blocks = list(range(_BLOCKS))

        async def hand_over(number: int) -> None:
            taken = asyncio.Event()
            offer = decode.parse(prefill.offer(f"r{number}", blocks, taken.set))
            await decode.receive(offer, f"r{number}", blocks, _BLOCKS, timeout_s=60)

        await hand_over(0)  # they meet
        found["handover of 64 MiB, GB/s"] = size_gb / min([await _seconds(hand_over(n)) for n in range(1, 6)])
        found["handover with NIXL's bare calls, GB/s"] = size_gb / min([_bare(prefill, decode) for _ in range(5)])
        found["handover, times NIXL's bare calls"] = (
            found["handover of 64 MiB, GB/s"] / found["handover with NIXL's bare calls, GB/s"]
        )
    finally:
        await decode.stop()
        await prefill.stop()
    return found


async def _copied(ours: KvPool, theirs: KvPool) -> None:
    np.copyto(ours.data, theirs.data)


async def _seconds(work: Awaitable[None]) -> float:
    begun = time.perf_counter()
    await work
    return time.perf_counter() - begun


def _bare(prefill: NixlTransfer, decode: NixlTransfer) -> float:
    """Seconds of one READ between the two agents, polled without a pause."""
    offer = decode.parse(prefill.offer("bare", list(range(_BLOCKS)), lambda: None))
    prefill.withdraw("bare")
    if offer.peer is None:
        raise RuntimeError("the offer tells no peer")
    agent: Any = decode._agent  # noqa: SLF001 - what is beneath is what is measured
    peer: Any = prefill._agent  # noqa: SLF001
    name = decode._connect(offer.engine_id, offer.peer)  # noqa: SLF001
    rows = np.arange(_BLOCKS, dtype=np.uint64)
    begun = time.perf_counter()
    local = decode._descriptors(decode._base, rows)  # noqa: SLF001
    remote = decode._descriptors(offer.peer.base, rows)  # noqa: SLF001
    handle = agent.initialize_xfer("READ", local, remote, name, b"")
    state = agent.transfer(handle)
    while state == "PROC":
        peer.get_new_notifs()  # neither has a thread of its own: both must be asked
        state = agent.check_xfer_state(handle)
    seconds = time.perf_counter() - begun
    agent.release_xfer_handle(handle)
    if state != "DONE":
        raise RuntimeError(f"NIXL says {state}")
    return seconds
