import asyncio
import errno
import io

import structlog

from planes.wire.messages import Role
from process.logging import LineWriter, Logfmt, UnfailingFile


class File:
    """Keeps what each write wrote."""

    def __init__(self):
        self.writes = []
        self.written = asyncio.Event()

    def write(self, text):
        self.writes.append(text)
        self.written.set()

    def flush(self):
        pass


def line(level="info", **event):
    return Logfmt(lambda: 1_700_000_000.25)(None, level, event)


def test_a_line_begins_with_instant_level_and_event():
    assert line(event="worker.up", worker="d0") == "ts=2023-11-14T22:13:20.250000Z level=info event=worker.up worker=d0"


def test_fields_are_written_as_logfmt_has_them():
    fields = {"none": None, "yes": True, "no": False, "count": 3, "seconds": 0.25, "role": Role.BOTH, "empty": ""}
    assert (
        line(event="e", **fields).partition("event=e ")[2] == "none= yes no=false count=3 seconds=0.25 role=both empty="
    )


def test_a_value_cannot_pretend_to_be_another_field_or_line():
    written = line(event="e", reason='a b="c"\nts=1', path="C:\\x", tab="a\tb", zero=0)
    assert written.partition("event=e ")[2] == 'reason="a b=\\"c\\"\\nts=1" path="C:\\\\x" tab="a\\x09b" zero=0'


def test_the_stamp_follows_the_clock():
    instants = iter((0.5, 0.75, 1.0))
    logfmt = Logfmt(lambda: next(instants))
    stamps = [logfmt(None, "info", {"event": "e"}).split()[0] for _ in range(3)]
    assert stamps == [
        "ts=1970-01-01T00:00:00.500000Z",
        "ts=1970-01-01T00:00:00.750000Z",
        "ts=1970-01-01T00:00:01.000000Z",
    ]


def test_no_value_gives_orders_to_a_terminal():
    written = line(event="e", model="\x1b[2Jx\x07", c1="a\x9b1m", bell="\x7f", bidi="\u202eabc", fine="naïve 流")
    assert written.partition("event=e ")[2] == (
        'model="\\x1b[2Jx\\x07" c1="a\\x9b1m" bell="\\x7f" bidi="\\u202eabc" fine="naïve 流"'
    )
    assert written.isprintable()


def test_without_an_event_loop_every_line_is_written_at_once():
    lines = LineWriter(file := File())
    lines.info("a")
    lines.info("b")
    assert file.writes == ["a\n", "b\n"]


async def test_lines_that_only_inform_share_a_write():
    lines = LineWriter(file := File(), patience_s=0.0)
    for line in ("a", "b", "c"):
        lines.info(line)
    assert file.writes == []
    await file.written.wait()
    lines.info("d")
    assert file.writes == ["a\nb\nc\n"]
    lines.flush()
    assert file.writes[1:] == ["d\n"]


async def test_a_warning_takes_what_waits_along():
    lines = LineWriter(file := File(), patience_s=60)
    lines.info("a")
    lines.warning("b")
    lines.info("c")
    assert file.writes == ["a\nb\n"]


async def test_no_more_lines_wait_than_may():
    lines = LineWriter(file := File(), patience_s=60, max_lines=3)
    for line in "abcd":
        lines.info(line)
    assert file.writes == ["a\nb\nc\n"]


async def test_no_line_is_left_at_the_end():
    with LineWriter(file := File(), patience_s=60) as lines:
        lines.info("a")
    assert file.writes == ["a\n"]


class FullDisk:
    def write(self, _):
        raise OSError(errno.ENOSPC, "no space left")

    def flush(self):
        raise BrokenPipeError


def test_a_log_that_was_closed_costs_lines_and_nobody_else():
    file = io.StringIO()
    file.close()
    UnfailingFile(file).write("line")
    UnfailingFile(file).flush()


def test_a_disk_that_is_full_or_a_reader_that_is_gone_costs_lines_and_nobody_else():
    structlog.WriteLogger(UnfailingFile(FullDisk())).error("first")
    lines = LineWriter(FullDisk())
    lines.error("second")
    lines.flush()
