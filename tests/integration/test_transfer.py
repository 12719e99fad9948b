"""Real bytes over NIXL, between two agents of one process and between two processes."""

import asyncio
import contextlib
import itertools
import os
import sys
from asyncio.subprocess import PIPE

import numpy as np
import pytest

from planes.wire.errors import InvalidRequest
from planes.wire.frames import DecodeLeg, LocalLeg, PrefillLeg, Sampling
from planes.wire.messages import EngineFacts, HandoverEndpoint, HandoverMode, RequestId, WorkerId
from workers.engine.base import EngineRequest
from workers.nixl_wheel import installed_wheel
from workers.sim.counting_transfer import CountingTransfer
from workers.sim.engine import SimEngine, SimOptions
from workers.sim.kv_pool import KvPool
from workers.sim.side_channel import HandoverFailed
from workers.sim.transfer import NixlTransfer

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(installed_wheel() is None, reason="moves real bytes: needs NIXL"),
]
_ids = itertools.count()


def make(kind, mode, *, num_blocks=64, size=4096):
    pool = KvPool(num_blocks, size)
    return kind(pool, mode=mode, engine_id=f"engine-{next(_ids)}", host="127.0.0.1")


@pytest.fixture(params=[NixlTransfer, CountingTransfer])
def kind(request):
    return request.param


async def stop(*sides):
    for side in sides:
        await side.stop()


@pytest.fixture
async def pull(kind):
    sides = make(kind, HandoverMode.PULL), make(kind, HandoverMode.PULL)
    for side in sides:
        await side.start()
    yield sides
    await stop(*sides)


@pytest.fixture
async def push(kind):
    sides = make(kind, HandoverMode.PUSH), make(kind, HandoverMode.PUSH)
    for side in sides:
        await side.start()
    yield sides
    await stop(*sides)


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - nobody sets an event for it
            await asyncio.sleep(0.001)


def words(count, start=1000):
    return np.arange(start, start + count, dtype=np.uint64)


async def test_a_pull_brings_the_last_blocks_where_they_belong_and_ends_the_lease(pull):
    prefill, decode = pull
    prefill.pool.write([7, 3, 9], words(3))
    taken = asyncio.Event()
    params = prefill.offer("r", [7, 3, 9], taken.set)
    await decode.receive(decode.parse(params), "r", [40, 41], 3, timeout_s=60)
    assert decode.pool.read([40, 41]).tolist() == [1001, 1002]
    async with asyncio.timeout(60):
        await taken.wait()


async def test_a_pull_of_nothing_still_ends_the_lease(pull):
    prefill, decode = pull
    taken = asyncio.Event()
    params = prefill.offer("r", [7], taken.set)
    await decode.receive(decode.parse(params), "r", [], 1, timeout_s=60)
    async with asyncio.timeout(60):
        await taken.wait()


async def test_a_lease_ends_though_the_prefill_side_was_busy_when_it_should_have_met_its_peer():
    """Two agents that meet for the first time need several turns of each, and a notification leaves only then."""
    prefill, decode = make(NixlTransfer, HandoverMode.PULL), make(NixlTransfer, HandoverMode.PULL)
    async with contextlib.AsyncExitStack() as running:
        for side in (prefill, decode):
            await side.start()
            running.push_async_callback(side.stop)
        is_busy, advance = True, prefill._advance
        prefill._advance = lambda: not is_busy and advance()
        taken = asyncio.Event()
        params = prefill.offer("r", [7], taken.set)
        await decode.receive(decode.parse(params), "r", [], 1, timeout_s=60)
        ends = asyncio.get_running_loop().time() + 0.3
        await until(lambda: asyncio.get_running_loop().time() > ends)
        is_busy = False
        async with asyncio.timeout(60):
            await taken.wait()


@pytest.mark.parametrize("is_announced_first", [True, False])
async def test_a_push_writes_the_announced_blocks_whoever_comes_first(push, is_announced_first):
    prefill, decode = push
    prefill.pool.write([1, 2, 3], words(3))
    taken = asyncio.Event()

    async def announce():
        await decode.receive(prefill.endpoint, "r", [50, 51], 3, timeout_s=60)

    async with asyncio.TaskGroup() as group:
        if not is_announced_first:
            prefill.offer("r", [1, 2, 3], taken.set)
        group.create_task(announce())
        if is_announced_first:
            await until(lambda: prefill._announced)
            prefill.offer("r", [1, 2, 3], taken.set)
    assert decode.pool.read([50, 51]).tolist() == [1001, 1002]
    async with asyncio.timeout(60):
        await taken.wait()


async def test_a_push_of_nothing_is_answered(push):
    prefill, decode = push
    taken = asyncio.Event()
    prefill.offer("r", [1], taken.set)
    await decode.receive(prefill.endpoint, "r", [], 1, timeout_s=60)
    assert taken.is_set()


async def test_many_handovers_at_once_keep_apart(pull):
    prefill, decode = pull
    params = []
    for i in range(16):
        prefill.pool.write([i, 16 + i], words(2, start=10 * i))
        params.append(prefill.offer(f"r{i}", [i, 16 + i], lambda: None))
    async with asyncio.TaskGroup() as group:
        for i, offered in enumerate(params):
            group.create_task(decode.receive(decode.parse(offered), f"r{i}", [32 + 2 * i, 33 + 2 * i], 2, timeout_s=60))
    for i in range(16):
        assert decode.pool.read([32 + 2 * i, 33 + 2 * i]).tolist() == [10 * i, 10 * i + 1]


async def test_a_prefill_worker_that_has_gone_fails_a_push_at_once(push):
    prefill, decode = push
    await prefill.stop()
    with pytest.raises(HandoverFailed, match="cannot be reached"):
        await decode.receive(prefill.endpoint, "r", [1], 1, timeout_s=60)


async def test_a_prefill_worker_that_goes_away_meanwhile_fails_a_push_at_once(push):
    prefill, decode = push
    waiting = asyncio.ensure_future(decode.receive(prefill.endpoint, "r", [1], 1, timeout_s=60))
    await until(lambda: prefill._announced)
    await prefill.stop()
    with pytest.raises(HandoverFailed, match="stops"):
        await waiting


async def test_a_push_that_never_comes_times_out_with_the_request_in_the_message(push):
    prefill, decode = push
    with pytest.raises(HandoverFailed, match=r"request r .* within 0.05 s"):
        await decode.receive(prefill.endpoint, "r", [1], 1, timeout_s=0.05)


async def test_a_withdrawn_request_refuses_its_announcement(push):
    prefill, decode = push
    waiting = asyncio.ensure_future(decode.receive(prefill.endpoint, "r", [1], 1, timeout_s=60))
    await until(lambda: prefill._announced)
    assert prefill.withdraw("r")
    with pytest.raises(HandoverFailed, match="given up"):
        await waiting


async def test_a_restarted_engine_refuses_what_was_meant_for_the_one_before(push, kind):
    prefill, decode = push
    old = prefill.endpoint
    await prefill.stop()
    again = kind(KvPool(64, 4096), mode=HandoverMode.PUSH, engine_id="again", host=old.host, port=old.port)
    await again.start()
    try:
        with pytest.raises(HandoverFailed, match="is gone"):
            await decode.receive(old, "r", [1], 1, timeout_s=60)
    finally:
        await again.stop()


async def test_blocks_that_do_not_add_up_are_refused(push):
    prefill, decode = push
    prefill.offer("r", [1, 2, 3], lambda: None)
    with pytest.raises(HandoverFailed, match="the prompt has 3"):
        await decode.receive(prefill.endpoint, "r", [1], 2, timeout_s=60)


async def test_a_stopped_prefill_worker_fails_a_pull_with_a_clear_error(pull):
    prefill, decode = pull
    offer = decode.parse(prefill.offer("r", [1], lambda: None))
    await prefill.stop()
    del prefill
    with pytest.raises(HandoverFailed):
        await decode.receive(offer, "r", [1], 1, timeout_s=0.5)


async def test_malformed_params_are_the_clients_mistake(pull):
    prefill, decode = pull
    params = prefill.offer("r", [1], lambda: None)
    for broken in (b"", b"\xff", params[:-3], b"\x90"):
        with pytest.raises(InvalidRequest):
            decode.parse(broken)
    other = make(type(decode), HandoverMode.PULL, size=8192)
    with pytest.raises(InvalidRequest, match="4096 bytes; ours have 8192"):
        other.parse(params)


async def test_polling_ends_when_nothing_is_in_flight():
    side = make(NixlTransfer, HandoverMode.PULL)
    await side.start()
    side.offer("r", [1], lambda: None)
    assert side._timer is not None
    side.withdraw("r")
    await until(lambda: side._timer is None)
    await side.stop()


PREFILL_PROCESS = """
import asyncio, sys
import numpy as np
from planes.wire.messages import HandoverMode
from workers.sim.kv_pool import KvPool
from workers.sim.transfer import NixlTransfer

async def main():
    transfer = NixlTransfer(KvPool(512, 4096), mode=HandoverMode(sys.argv[1]), engine_id="child", host="127.0.0.1")
    await transfer.start()
    transfer.pool.write(list(range(512)), np.arange(512, dtype=np.uint64) + 7)
    taken = asyncio.Event()
    params = transfer.offer("r", list(range(300)), taken.set)
    print(transfer.endpoint.port, params.hex(), flush=True)
    await taken.wait()
    print("taken", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await transfer.stop()

asyncio.run(main())
"""


@contextlib.asynccontextmanager
async def prefill_process(mode, transports):
    env = os.environ | ({"UCX_TLS": transports} if transports else {})
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PREFILL_PROCESS, mode, stdin=PIPE, stdout=PIPE, env=env, limit=1 << 20
    )
    try:
        async with asyncio.timeout(60):
            port, params = (await process.stdout.readline()).split()
        yield process, HandoverEndpoint(mode, "child", "127.0.0.1", int(port)), bytes.fromhex(params.decode())
    finally:
        if process.returncode is None:
            process.stdin.close()
            async with asyncio.timeout(60):
                assert await process.wait() == 0
        process._transport.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", list(HandoverMode))
@pytest.mark.parametrize("transports", ["", "tcp,self"])
async def test_real_bytes_cross_between_processes(mode, transports):
    decode = make(NixlTransfer, mode, num_blocks=400)
    await decode.start()
    async with prefill_process(mode, transports) as (process, endpoint, params):
        source = decode.parse(params) if mode is HandoverMode.PULL else endpoint
        await decode.receive(source, "r", list(range(100, 390)), 300, timeout_s=60)
        assert decode.pool.read(list(range(100, 390))).tolist() == list(range(17, 307))
        async with asyncio.timeout(60):
            assert await process.stdout.readline() == b"taken\n"
    await decode.stop()


@pytest.mark.parametrize("mode", list(HandoverMode))
async def test_a_killed_prefill_process_fails_the_handover(mode):
    decode = make(NixlTransfer, mode, num_blocks=400)
    await decode.start()
    async with prefill_process(mode, "") as (process, endpoint, params):
        source = decode.parse(params) if mode is HandoverMode.PULL else endpoint
        process.kill()
        await process.wait()
        with pytest.raises(HandoverFailed):
            await decode.receive(source, "r", list(range(300)), 300, timeout_s=5)
    await decode.stop()


# --- whole engines -----------------------------------------------------------------------------------------------

FACTS = EngineFacts(
    block_size=4,
    num_blocks=256,
    context_length=256,
    max_batch=32,
    max_step_tokens=256,
    bytes_per_block=4096,
    vocab_size=320,
)


class Observer:
    def kv_changed(self, events):
        pass

    def stepped(self, sample):
        pass

    def died(self, reason):
        pytest.fail(reason)


async def run(engine, request, prompt, leg):
    ended = asyncio.get_running_loop().create_future()
    tokens = []

    def take(output):
        tokens.extend(output.tokens)
        if output.finish is not None:
            ended.set_result(output)

    sampling = Sampling(max_tokens=10, ignore_eos=True)
    engine.submit(EngineRequest(RequestId(request), prompt, sampling, leg), take)
    async with asyncio.timeout(60):
        return tokens, await ended


@pytest.mark.parametrize("mode", list(HandoverMode))
async def test_disaggregated_answers_equal_local_ones_over_real_nixl(mode):
    prefill, decode = (
        SimEngine(SimOptions(worker=WorkerId(name), model="m", facts=FACTS, handover=mode, speedup=100.0))
        for name in ("p", "d")
    )
    for engine in (prefill, decode):
        await engine.start(Observer(), progress=lambda _: None)
    rng = np.random.default_rng(1)

    async def one(i):
        prompt = rng.integers(97, 123, 3 + 2 * i).astype(np.uint32)
        if mode is HandoverMode.PULL:
            first, last = await run(prefill, f"r{i}", prompt, PrefillLeg(mode))
            second, done = await run(decode, f"r{i}", prompt, DecodeLeg(ticket=last.ticket))
        else:
            (first, _), (second, done) = await asyncio.gather(
                run(prefill, f"r{i}", prompt, PrefillLeg(mode)),
                run(decode, f"r{i}", prompt, DecodeLeg(source=prefill.endpoint)),
            )
        alone, _ = await run(prefill, f"alone{i}", prompt, LocalLeg())
        assert second == alone
        assert first == alone[:1]
        assert done.handover_bytes == -(-len(prompt) // 4) * 4096

    await asyncio.gather(*(one(i) for i in range(20)))
    await prefill.stop()  # waits until every lease is taken
    await decode.stop()
    assert prefill.load().free_blocks == FACTS.num_blocks
    assert decode.load().free_blocks == FACTS.num_blocks
