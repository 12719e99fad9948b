"""The control plane against a real etcd, and against one that goes away."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from app.cli.servers import etcd_server
from planes.control import (
    ControlPlaneUnavailable,
    Etcd,
    Registrar,
    WorkerDirectory,
    WorkerIdTaken,
    _mirror,
    check_id_is_free,
    get_workers,
    put_config,
    watch_config,
    workers_prefix,
)
from planes.role_wishes import put_role_wish, watch_role_wishes
from planes.streams.client import greets
from planes.streams.server import StreamServer
from planes.wire.messages import EngineFacts, Registration, Role, RoleWish, WorkerId, WorkerState
from tests.integration.conftest import ForgetfulEtcd

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

FACTS = EngineFacts(
    block_size=16, num_blocks=8, context_length=64, max_batch=2, max_step_tokens=32, bytes_per_block=1, vocab_size=9
)


def registration(
    worker: str, state: WorkerState = WorkerState.READY, *, epoch: int = 1, address: str = "127.0.0.1:1"
) -> Registration:
    return Registration(
        worker=WorkerId(worker),
        epoch=epoch,
        role=Role.BOTH,
        model="m",
        address=address,
        engine="sim",
        facts=FACTS,
        card_digest="0" * 64,
        state=state,
    )


class Seen:
    """What a directory reported, and a way to wait for more."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self._news = asyncio.Event()

    def add(self, what: str, who: str) -> None:
        self.events.append((what, who))
        self._news.set()

    async def until(self, is_true: Callable[[], bool]) -> None:
        while not is_true():
            self._news.clear()
            await self._news.wait()


@asynccontextmanager
async def directory(url: str, namespace: str, seen: Seen, grace_s: float = 5.0) -> AsyncIterator[WorkerDirectory]:
    made = WorkerDirectory(
        Etcd(url, timeout_s=1.0),
        namespace,
        on_up=lambda r: seen.add(r.state.value, r.worker),
        on_down=lambda w: seen.add("down", w),
        grace_s=grace_s,
    )
    task = asyncio.create_task(made.run())
    try:
        yield made
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def registered(url: str, namespace: str, worker: str, ttl_s: int = 60) -> AsyncIterator[Registrar]:
    made = Registrar(Etcd(url, timeout_s=1.0), namespace, registration(worker), is_running=greets, ttl_s=ttl_s)
    task = asyncio.create_task(made.run())
    try:
        yield made
    finally:
        await made.close()
        await task


async def test_a_worker_is_up_while_it_is_registered_and_down_at_once_after(etcd_url: str, namespace: str) -> None:
    seen = Seen()
    async with directory(etcd_url, namespace, seen):
        async with registered(etcd_url, namespace, "a", ttl_s=60) as registrar:
            await seen.until(lambda: seen.events == [("ready", "a")])
            registrar.update(registration("a", WorkerState.DRAINING))
            await seen.until(lambda: len(seen.events) == 2)
        await seen.until(lambda: len(seen.events) == 3)
    assert seen.events == [("ready", "a"), ("draining", "a"), ("down", "a")]


async def test_a_directory_that_starts_late_lists_who_is_there(etcd_url: str, namespace: str) -> None:
    early, late = Seen(), Seen()
    async with (
        directory(etcd_url, namespace, early),
        registered(etcd_url, namespace, "a"),
        registered(etcd_url, namespace, "b"),
    ):
        await early.until(lambda: len(early.events) == 2)
        async with directory(etcd_url, namespace, late) as second:
            await late.until(lambda: len(late.events) == 2)
            assert second.is_current
            assert set(second.workers) == {"a", "b"}


async def test_cancelling_the_registrar_removes_the_entry_too(etcd_url: str, namespace: str) -> None:
    seen = Seen()
    async with directory(etcd_url, namespace, seen):
        registrar = Registrar(Etcd(etcd_url), namespace, registration("a"), is_running=greets, ttl_s=60)
        task = asyncio.create_task(registrar.run())
        await seen.until(lambda: seen.events == [("ready", "a")])
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await seen.until(lambda: seen.events[-1] == ("down", "a"))
    await registrar.close()


async def test_a_registrar_closed_twice_or_before_it_ran_never_registers(etcd_url: str, namespace: str) -> None:
    registrar = Registrar(Etcd(etcd_url), namespace, registration("a"), is_running=greets)
    task = asyncio.create_task(registrar.run())
    await registrar.close()
    await registrar.close()
    await task
    async with Etcd(etcd_url).session() as client:
        assert not await client.get_prefix(workers_prefix(namespace))


async def test_closing_without_etcd_does_not_wait_for_it(namespace: str) -> None:
    registrar = Registrar(Etcd("http://127.0.0.1:9"), namespace, registration("a"), is_running=greets)
    task = asyncio.create_task(registrar.run())
    await asyncio.sleep(0.5)
    await registrar.close()
    await task


KILLED = """
import asyncio, sys
import msgspec
from planes.control import Etcd, Registrar
from planes.streams.client import greets
from planes.wire.messages import Registration
url, namespace, entry = sys.argv[1:]
entry = msgspec.json.decode(entry, type=Registration)
asyncio.run(Registrar(Etcd(url), namespace, entry, is_running=greets, ttl_s=2).run())
"""


async def test_a_killed_worker_disappears_with_its_lease(etcd_url: str, namespace: str) -> None:
    seen = Seen()
    entry = msgspec.json.encode(registration("a")).decode()
    async with directory(etcd_url, namespace, seen):
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", KILLED, etcd_url, namespace, entry)
        await seen.until(lambda: seen.events == [("ready", "a")])
        process.send_signal(signal.SIGKILL)
        await process.wait()
        await seen.until(lambda: seen.events[-1] == ("down", "a"))


async def test_a_worker_whose_first_registration_was_not_answered_knows_that_it_is_there(
    etcd_url: str, namespace: str
) -> None:
    etcd = ForgetfulEtcd(etcd_url)
    registrar = Registrar(etcd, namespace, registration("a"), is_running=greets)
    task = asyncio.create_task(registrar.run())
    await registrar.registered.wait()
    await registrar.until_told()
    assert etcd.has_forgotten
    await registrar.close()
    await task


async def test_an_expired_lease_is_replaced(etcd_url: str, namespace: str) -> None:
    seen = Seen()
    async with directory(etcd_url, namespace, seen), registered(etcd_url, namespace, "a", ttl_s=6) as registrar:
        await seen.until(lambda: seen.events == [("ready", "a")])
        async with Etcd(etcd_url).session() as client:
            await client.revoke_lease(registrar._lease)
        await seen.until(lambda: len(seen.events) >= 3)
    assert seen.events[:3] == [("ready", "a"), ("down", "a"), ("ready", "a")]


class Deaf:
    """A worker's side of streams on which nothing is asked."""

    def generate(self, connection, request) -> None: ...

    def cancel(self, connection, stream) -> None: ...

    def release(self, connection, request) -> None: ...

    def gone(self, connection) -> None: ...


@asynccontextmanager
async def answering(worker: str, epoch: int) -> AsyncIterator[Registration]:
    """The registration of a worker that gateways could connect to."""
    server = StreamServer(Deaf(), worker=WorkerId(worker), epoch=epoch)
    port = await server.listen("127.0.0.1", 0)
    try:
        yield registration(worker, epoch=epoch, address=f"127.0.0.1:{port}")
    finally:
        await server.stop()


async def held(url: str, namespace: str, worker: str) -> Registration | None:
    """What etcd has under this id."""
    async with Etcd(url).session() as client:
        found = await client.get_range(workers_prefix(namespace) + worker.encode(), None)
        return next((msgspec.json.decode(entry.value, type=Registration) for entry in found), None)


async def test_the_id_of_a_running_worker_is_refused_and_stays_with_it(etcd_url: str, namespace: str) -> None:
    async with answering("a", 1) as first, answering("a", 2) as second:
        registrar = Registrar(Etcd(etcd_url), namespace, first, is_running=greets)
        task = asyncio.create_task(registrar.run())
        await registrar.registered.wait()
        with pytest.raises(WorkerIdTaken, match=rf"--worker-id is 'a'.*{first.address}"):
            await check_id_is_free(Etcd(etcd_url), namespace, WorkerId("a"), is_running=greets)
        with pytest.raises(WorkerIdTaken, match=rf"--worker-id is 'a'.*{first.address}"):
            await Registrar(Etcd(etcd_url), namespace, second, is_running=greets).run()
        assert await held(etcd_url, namespace, "a") == first
        await registrar.close()
        await task
        assert await held(etcd_url, namespace, "a") is None


async def test_a_crashed_workers_successor_does_not_wait_for_its_lease(etcd_url: str, namespace: str) -> None:
    async with answering("a", 1) as crashed:
        pass
    async with Etcd(etcd_url).session() as client:
        lease = await client.lease(600)
        await client.put(workers_prefix(namespace) + b"a", msgspec.json.encode(crashed), lease=lease)
    await check_id_is_free(Etcd(etcd_url), namespace, WorkerId("a"), is_running=greets)
    # It may well listen where its predecessor did: its own greeting is not the other's.
    async with answering("a", 2) as there:
        for successor in (there, msgspec.structs.replace(there, epoch=3)):
            registrar = Registrar(Etcd(etcd_url), namespace, successor, is_running=greets)
            task = asyncio.create_task(registrar.run())
            await registrar.registered.wait()
            assert await held(etcd_url, namespace, "a") == successor
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_of_two_that_start_at_once_with_one_id_only_one_gets_it(etcd_url: str, namespace: str) -> None:
    async with answering("a", 1) as one, answering("a", 2) as two:
        registrars = {each.epoch: Registrar(Etcd(etcd_url), namespace, each, is_running=greets) for each in (one, two)}
        tasks = {epoch: asyncio.create_task(each.run()) for epoch, each in registrars.items()}
        (ended,), (running,) = await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_COMPLETED)
        assert isinstance(ended.exception(), WorkerIdTaken)
        winner = next(epoch for epoch, task in tasks.items() if task is running)
        entry = await held(etcd_url, namespace, "a")
        assert entry is not None
        assert entry.epoch == winner
        await registrars[winner].close()
        await running


async def test_a_serving_worker_whose_entry_is_anothers_waits_until_that_is_gone(etcd_url: str, namespace: str) -> None:
    other = registration("a", epoch=2)
    async with registered(etcd_url, namespace, "a", ttl_s=1) as registrar, Etcd(etcd_url).session() as client:
        await registrar.registered.wait()
        lease = await client.lease(60)
        await client.put(workers_prefix(namespace) + b"a", msgspec.json.encode(other), lease=lease)
        registrar.update(registration("a", WorkerState.DRAINING))
        await asyncio.sleep(1)
        assert await held(etcd_url, namespace, "a") == other
        await client.revoke_lease(lease.id)
        async with asyncio.timeout(60):
            while await held(etcd_url, namespace, "a") != registration("a", WorkerState.DRAINING):  # noqa: ASYNC110 - etcd
                await asyncio.sleep(0.05)
        await client.put(workers_prefix(namespace) + b"a", msgspec.json.encode(other))
    assert await held(etcd_url, namespace, "a") == other


async def test_a_deleted_entry_is_written_again(etcd_url: str, namespace: str) -> None:
    seen = Seen()
    async with directory(etcd_url, namespace, seen), registered(etcd_url, namespace, "a", ttl_s=6):
        await seen.until(lambda: seen.events == [("ready", "a")])
        async with Etcd(etcd_url).session() as client:
            await client.delete(workers_prefix(namespace) + b"a")
        await seen.until(lambda: len(seen.events) >= 3)
    assert seen.events[:3] == [("ready", "a"), ("down", "a"), ("ready", "a")]


async def test_a_malformed_entry_disturbs_nobody(etcd_url: str, namespace: str) -> None:
    seen = Seen()
    async with directory(etcd_url, namespace, seen):
        async with Etcd(etcd_url).session() as client:
            await client.put(workers_prefix(namespace) + b"bad", b"{")
        async with registered(etcd_url, namespace, "a"):
            await seen.until(lambda: bool(seen.events))
    assert seen.events[0] == ("ready", "a")


async def test_etcd_restarts_and_nobody_was_ever_down(tmp_path: Path, namespace: str) -> None:
    seen = Seen()
    async with etcd_server(tmp_path / "etcd") as first:
        port, url = first.port, first.url
        stack = contextlib.AsyncExitStack()
        known = await stack.enter_async_context(directory(url, namespace, seen))
        registrar = await stack.enter_async_context(registered(url, namespace, "a"))
        await seen.until(lambda: seen.events == [("ready", "a")])
    async with stack:
        async with asyncio.timeout(60):
            while known.is_current:  # noqa: ASYNC110 - a plain attribute, on purpose
                await asyncio.sleep(0.02)
        assert set(known.workers) == {"a"}
        registrar.update(registration("a", WorkerState.DRAINING))  # said while nobody hears it
        async with etcd_server(tmp_path / "etcd", port):
            await seen.until(lambda: len(seen.events) == 2)
            assert seen.events == [("ready", "a"), ("draining", "a")]
            await registrar.close()
            await seen.until(lambda: len(seen.events) == 3)
            assert seen.events[-1] == ("down", "a")


async def test_an_etcd_that_comes_back_empty_takes_nobody_down_who_registers_again(
    tmp_path: Path, namespace: str
) -> None:
    seen = Seen()
    async with contextlib.AsyncExitStack() as stack:
        async with etcd_server(tmp_path / "one") as first:
            port, url = first.port, first.url
            known = await stack.enter_async_context(directory(url, namespace, seen, grace_s=10.0))
            staying = await stack.enter_async_context(registered(url, namespace, "a"))
            gone = await stack.enter_async_context(registered(url, namespace, "b"))
            await seen.until(lambda: len(seen.events) == 2)
        await gone.close()
        staying.update(registration("a"))  # or it would look again after a third of its lease
        async with etcd_server(tmp_path / "two", port):
            await seen.until(lambda: len(seen.events) == 3)
            assert seen.events[2] == ("down", "b")
            assert set(known.workers) == {"a"}


async def test_a_watch_from_before_a_compaction_ends_the_session(etcd_url: str, namespace: str) -> None:
    async with Etcd(etcd_url).session() as client:
        old = await client.get_range(b"/elsewhere", None)
        await client.put(b"/elsewhere", b"1")
        await client.compact((await client.put(b"/elsewhere", b"2")).header.revision)

    async def list_as_it_was(start: bytes, end: bytes | None) -> object:
        return old

    async def watch_from_there() -> None:
        async with Etcd(etcd_url).session() as client:
            client.get_range = list_as_it_was
            await _mirror(client, workers_prefix(namespace), None, lambda _: None, lambda _key, _value: None)

    with pytest.raises(ControlPlaneUnavailable, match="compacted"):
        await watch_from_there()


async def test_the_next_endpoint_is_used_when_one_is_dead(etcd_url: str, namespace: str) -> None:
    seen = Seen()
    urls = "http://127.0.0.1:9," + etcd_url.removeprefix("http://")
    async with directory(urls, namespace, seen), registered(urls, namespace, "a"):
        await seen.until(lambda: seen.events == [("ready", "a")])


async def test_config_is_told_now_and_on_each_change(etcd_url: str, namespace: str) -> None:
    told: asyncio.Queue[bytes | None] = asyncio.Queue()
    etcd = Etcd(etcd_url)
    await put_config(etcd, namespace, b"1")
    task = asyncio.create_task(watch_config(etcd, namespace, told.put_nowait))
    assert await told.get() == b"1"
    await put_config(etcd, namespace, b"1")
    await put_config(etcd, namespace, b"2")
    assert await told.get() == b"2"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_wish_for_a_role_is_told_to_whoever_watches_now_or_later(etcd_url: str, namespace: str) -> None:
    told: asyncio.Queue[tuple[str, RoleWish | None]] = asyncio.Queue()
    etcd, wish, other = Etcd(etcd_url), RoleWish(7, Role.PREFILL, 2.5), RoleWish(8, Role.BOTH)

    def tell(worker: WorkerId, told_of: RoleWish | None) -> None:
        told.put_nowait((worker, told_of))

    await put_role_wish(etcd, namespace, WorkerId("a"), wish)
    await put_role_wish(etcd, namespace, WorkerId("ab"), other)
    async with asyncio.TaskGroup() as group:
        one = group.create_task(watch_role_wishes(etcd, namespace, tell, worker=WorkerId("a")))
        assert await told.get() == ("a", wish)
        await put_role_wish(etcd, namespace, WorkerId("a"), other)
        assert await told.get() == ("a", other)
        one.cancel()
        every = group.create_task(watch_role_wishes(etcd, namespace, tell))
        listed = [await told.get() for _ in range(2)]
        assert sorted(listed) == [("a", other), ("ab", other)]
        every.cancel()


async def test_what_a_registrar_was_given_last_is_told_once_etcd_has_it(etcd_url: str, namespace: str) -> None:
    async with registered(etcd_url, namespace, "a", ttl_s=60) as registrar:
        changed = msgspec.structs.replace(registration("a"), becoming=Role.DECODE)
        registrar.update(registration("a", WorkerState.DRAINING))
        registrar.update(changed)
        await registrar.until_told()
        assert await get_workers(Etcd(etcd_url), namespace) == {"a": changed}


async def test_config_without_etcd_says_so(namespace: str) -> None:
    with pytest.raises(ControlPlaneUnavailable, match=r"127\.0\.0\.1:9"):
        await put_config(Etcd("http://127.0.0.1:9", timeout_s=1.0), namespace, b"{}")
