"""Addresses of etcd and NATS, and that no text shows what stands before their @."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planes.control import Etcd
from planes.events import EventPlane
from planes.wire.errors import UnusableSetting
from planes.wire.urls import Login, parse_etcd, parse_nats, redacted

SECRET = "s3cr3t"


def test_endpoints_of_an_etcd_list() -> None:
    address = parse_etcd("http://a:1,b:2,http://[::1]:3, c")
    assert address.endpoints == (("a", 1), ("b", 2), ("[::1]", 3), ("c", 2379))
    assert address.login is None


def test_an_etcd_url_says_whether_it_is_tls() -> None:
    assert parse_etcd("https://a:1,b:2,https://c").is_tls
    assert parse_etcd("https://a:1,b:2").endpoints == (("a", 1), ("b", 2))
    assert not parse_etcd("a:1").is_tls


def test_one_server_with_tls_means_all() -> None:
    assert parse_nats("nats://a:1,tls://b:2").is_tls
    assert not parse_nats("nats://a:1").is_tls


@pytest.mark.parametrize(
    ("host", "is_local"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("[::1]", True), ("localhost", True), ("10.0.0.1", False), ("x", False)],
)
def test_an_address_says_whether_it_is_this_machine_alone(host: str, is_local: bool) -> None:
    assert parse_etcd(f"http://{host}:1").is_local is is_local
    assert parse_etcd(f"http://127.0.0.1:1,{host}:1").is_local is is_local
    assert parse_nats(f"nats://{host}:1").is_local is is_local


def test_servers_of_a_nats_list() -> None:
    address = parse_nats("nats://a:1, tls://b:2")
    assert address.servers == ("nats://a:1", "tls://b:2")
    assert (address.login, address.token) == (None, None)


def test_credentials_are_kept_apart_from_addresses_and_decoded() -> None:
    etcd = parse_etcd("http://u%40x:p%2Fw@a:1,b:2")
    assert (etcd.endpoints, etcd.login) == ((("a", 1), ("b", 2)), Login("u@x", "p/w"))
    nats = parse_nats("nats://u:p%40w@a:1,nats://b:2")
    assert (nats.servers, nats.login) == (("nats://a:1", "nats://b:2"), Login("u", "p@w"))
    assert parse_nats("nats://tok%3Aen@a:1").token == "tok:en"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://a:1",
        "http://a:1,https://b:2",
        "http://",
        "http://a:1/path",
        "http://a:x",
        "http://a:99999",
        "http://a:1?user=u",
        "http://u@a:1",
        "http://:p@a:1",
        "http://u:p@a:1,http://u:q@b:1",
    ],
)
def test_an_unusable_etcd_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="etcd url"):
        parse_etcd(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "a:4222",
        "http://a:1",
        "nats://",
        "nats://a:1,b:2",
        "nats://a:x",
        "nats://a:0",
        "nats://a:1/x",
        "nats://u:@a:1",
        "nats://u:p@a:1,nats://v:p@b:1",
    ],
)
def test_an_unusable_nats_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="NATS url"):
        parse_nats(url)


@pytest.mark.parametrize(
    "url",
    [
        f"://u:{SECRET}@",
        f"nats://u:{SECRET}@h:port",
        f"http://u:{SECRET}@h:1/path",
        f"ftp://u:{SECRET}@h:1",
        f"nats://{SECRET}@h:0",
        f"nats://u:{SECRET}/x@h:1",
        f"nats://u:x/{SECRET}@h:1",
        f"nats://u:a@{SECRET}@h:x",
        f"nats://u:a {SECRET}@h:x",
        f"nats://u:{SECRET}@h:1,nats://v:{SECRET}@i:1",
        f"http://u:{SECRET}@h:1,v:{SECRET}@i:1",
    ],
)
@pytest.mark.parametrize("parse", [parse_etcd, parse_nats])
def test_no_refusal_shows_a_secret(parse, url) -> None:
    with pytest.raises(ValueError, match="url") as refused:
        parse(url)
    assert SECRET not in str(refused.value)
    assert SECRET not in str(UnusableSetting("nats", url, str(refused.value)))


def test_what_is_parsed_shows_no_secret() -> None:
    parsed = (parse_etcd(f"http://u:{SECRET}@h"), parse_nats(f"nats://u:{SECRET}@h"), parse_nats(f"nats://{SECRET}@h"))
    assert SECRET not in repr(parsed)


async def test_an_unreachable_plane_is_named_without_its_secret() -> None:
    events = EventPlane(f"nats://u:{SECRET}@127.0.0.1:9", "ns")
    with pytest.raises(Exception, match=r"nats://127\.0\.0\.1:9") as refused:
        await events.send("subject")
    assert SECRET not in str(refused.value)
    with pytest.raises(Exception, match=r"etcd at 127\.0\.0\.1:9") as refused:
        async with Etcd(f"http://u:{SECRET}@127.0.0.1:9", timeout_s=1.0).session():
            pass
    assert SECRET not in str(refused.value)


def test_addresses_stay_readable_when_secrets_go() -> None:
    assert redacted("no url, but me@x") == "no url, but me@x"
    assert redacted(f"nats://u:{SECRET}@a:1,nats://v:{SECRET}@b:2") == "nats://***@a:1,nats://***@b:2"


@given(st.text(st.characters(codec="utf-8")))
def test_nothing_before_an_at_is_left(password: str) -> None:
    assert redacted(f"nats://u:{password}@h:1").endswith("***@h:1")
