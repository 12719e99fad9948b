import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planes.streams.protocol import Beat, FrameBuffer, Heartbeat, ProtocolError, StreamLimits
from planes.wire.frames import (
    Delta,
    FromWorker,
    Pong,
    Step,
    StreamId,
)
from tests.streams import DONE, LIMITS, frame


@given(st.lists(st.binary(max_size=40), max_size=8), st.data())
def test_frames_split_anywhere_are_the_same_frames(payloads, data):
    stream = b"".join(len(payload).to_bytes(4, "little") + payload for payload in payloads)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    frames = FrameBuffer(1000)
    got = [
        bytes(frame)
        for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)
        for frame in frames.feed(stream[start:end])
    ]
    assert got == payloads


def test_frames_split_at_every_byte_decode_equally():
    step = Step([Delta(StreamId(3), b"data: {}\n\n", [1, 2])], [DONE])
    stream, frames = frame(step) + frame(Pong()), FrameBuffer(1000)
    got = [f for at in range(len(stream)) for f in frames.feed(stream[at : at + 1])]
    assert [msgspec.msgpack.decode(f, type=FromWorker) for f in got] == [step, Pong()]


def test_an_announced_frame_beyond_the_limit_is_refused_before_it_arrives():
    with pytest.raises(ProtocolError, match="101 bytes; the limit is 100"):
        FrameBuffer(100).feed((101).to_bytes(4, "little"))


@pytest.mark.parametrize(("ping_s", "dead_s"), [(0.0, 3.0), (3.0, 3.0), (-1.0, 2.0)])
def test_a_heartbeat_that_cannot_work_is_refused(ping_s, dead_s):
    with pytest.raises(ValueError, match="0 < ping_s < dead_s"):
        StreamLimits(ping_s=ping_s, dead_s=dead_s)


def test_a_peer_that_is_heard_between_beats_is_left_in_peace():
    heart = Heartbeat(LIMITS)
    for _ in range(5):
        assert heart.beat() is Beat.NOTHING
        heart.was_heard = True


def test_a_silent_peer_is_pinged_and_given_up_after_three_beats_in_a_row():
    heart = Heartbeat(LIMITS)
    assert [heart.beat() for _ in range(4)] == [Beat.NOTHING, Beat.PING, Beat.PING, Beat.GIVE_UP]


def test_one_sign_of_life_starts_the_count_anew():
    heart = Heartbeat(LIMITS)
    assert [heart.beat() for _ in range(3)] == [Beat.NOTHING, Beat.PING, Beat.PING]
    heart.was_heard = True
    assert [heart.beat() for _ in range(4)] == [Beat.NOTHING, Beat.PING, Beat.PING, Beat.GIVE_UP]
