from planes.wire.messages import Role
from process.logging import Logfmt


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
