"""Values by key in real JetStream: long ones, replaced ones, old ones, and servers that are small or were emptied."""

import json

import pytest

from planes.bucket import NoJetStream, ObjectMissing
from planes.keyed import KeyedStore, ValueTooLarge
from tests.nats_servers import call, client_of, own_nats, plane_to

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

STREAM = "KV_headrace-ns-things"


def store(plane, *, ttl_s=60.0, max_bytes=8 << 20, max_value_bytes=4 << 20):
    return KeyedStore(plane, "things", ttl_s=ttl_s, max_bytes=max_bytes, max_value_bytes=max_value_bytes)


@pytest.mark.parametrize("limit", [2048, 1 << 20])
async def test_a_value_longer_than_a_message_comes_back_whole(tmp_path, limit):
    value = bytes(range(256)) * 3000
    async with own_nats(tmp_path / "nats", f"JS\nmax_payload: {limit}\n") as url, plane_to(url) as plane:
        await store(plane).put("a.b", value)
        await store(plane).put("a.short", b"")
        assert await store(plane).get("a.b") == value
        assert await store(plane).get("a.short") == b""


async def test_a_value_is_replaced_whole_and_deleted_with_its_prefix(tmp_path):
    async with own_nats(tmp_path / "nats", "JS\n") as url, plane_to(url) as plane:
        kept = store(plane)
        await kept.put("a.b", b"x" * 700_000)
        await kept.put("a.b", b"short")
        await kept.put("ab.c", b"other")
        assert await kept.get("a.b") == b"short"
        await kept.delete("a")
        with pytest.raises(ObjectMissing):
            await kept.get("a.b")
        assert await kept.get("ab.c") == b"other"


async def test_what_is_too_long_is_refused_with_the_limit(tmp_path):
    async with own_nats(tmp_path / "nats", "JS\n") as url, plane_to(url) as plane:
        with pytest.raises(ValueTooLarge, match="11 bytes; the limit for one is 10"):
            await store(plane, max_value_bytes=10).put("a.b", b"x" * 11)


async def test_the_oldest_values_make_room_and_what_lost_a_piece_is_missing_as_a_whole(tmp_path):
    async with own_nats(tmp_path / "nats", "JS\n") as url, plane_to(url) as plane:
        kept = store(plane, max_bytes=2 << 20)
        for number in range(8):
            await kept.put(f"a{number}.v", bytes([number]) * 600_000)
        assert await kept.get("a7.v") == bytes([7]) * 600_000
        for number in range(5):
            with pytest.raises(ObjectMissing):
                await kept.get(f"a{number}.v")


async def test_the_values_of_a_prefix_are_read_in_the_order_they_were_written(tmp_path):
    async with own_nats(tmp_path / "nats", "JS\n") as url, plane_to(url) as plane:
        kept = store(plane)
        async with kept.changes("a") as changes:
            for key in ("a.e.1", "b.e.1", "a.e.0", "a.e.1"):
                await kept.put(key, key.encode())
            assert [(await changes.next(5.0)).data for _ in range(3)] == [b"a.e.1", b"a.e.0", b"a.e.1"]
        first, number = await kept.next("a.e")
        second, number = await kept.next("a.e", number)
        assert (first, second) == (b"a.e.0", b"a.e.1")
        with pytest.raises(ObjectMissing):
            await kept.next("a.e", number)


async def test_an_emptied_server_is_used_at_once(tmp_path):
    async with own_nats(tmp_path / "nats", "JS\n") as url, client_of(url) as client, plane_to(url) as plane:
        kept = store(plane)
        await kept.put("a.b", b"1")
        await call(client, f"STREAM.DELETE.{STREAM}")
        with pytest.raises(ObjectMissing):
            await kept.get("a.b")
        await call(client, f"STREAM.DELETE.{STREAM}")
        await kept.put("a.b", b"2")
        assert await kept.get("a.b") == b"2"


async def test_a_server_with_little_room_is_asked_for_less(tmp_path):
    config = f'jetstream {{ store_dir: "{tmp_path}/js", max_file_store: 5MB }}\n'
    async with own_nats(tmp_path / "nats", config) as url, client_of(url) as client, plane_to(url) as plane:
        await store(plane, max_bytes=256 << 20).put("a.b", b"1")
        assert (await call(client, f"STREAM.INFO.{STREAM}"))["config"]["max_bytes"] == 4 << 20


async def test_our_own_stream_follows_our_settings_and_somebody_elses_is_left_alone(tmp_path):
    async with own_nats(tmp_path / "nats", "JS\n") as url, client_of(url) as client, plane_to(url) as plane:
        await store(plane, ttl_s=60).check()
        await store(plane, ttl_s=3600).check()
        config = (await call(client, f"STREAM.INFO.{STREAM}"))["config"]
        assert config["max_age"] == 3600 * 10**9
        await call(client, f"STREAM.DELETE.{STREAM}")
        own = {"name": STREAM, "subjects": ["$KV.headrace-ns-things.>"], "storage": "memory", "max_bytes": 1 << 20}
        before = await call(client, f"STREAM.CREATE.{STREAM}", own)
        kept = store(plane)
        await kept.put("a.b", b"x" * 500_000)
        assert await kept.get("a.b") == b"x" * 500_000
        assert json.dumps((await call(client, f"STREAM.INFO.{STREAM}"))["config"]) == json.dumps(before["config"])


async def test_without_jetstream_it_says_what_is_missing(tmp_path):
    async with own_nats(tmp_path / "nats", "") as url, plane_to(url) as plane:
        with pytest.raises(NoJetStream, match="without JetStream, where things are kept"):
            await store(plane).check()
