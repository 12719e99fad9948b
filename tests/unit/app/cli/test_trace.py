"""What `headrace trace` prints of what a gateway tells."""

import msgspec
from rich.console import Console

from app.cli.trace import listed, traced
from planes.wire.messages import RequestId, WorkerId
from router.request import Explanation
from router.timeline import Interruption, Stage, StageKind, Timeline
from tests.fakes import candidate


def printed(what):
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        console.print(what)
    return capture.get()


def explanation(**changed):
    ways = (candidate("d0"), candidate("d1", "p0", total_s=0.07, cached_tokens=48))
    told = Explanation(RequestId("r"), "headrace", 64, 0.0, ways, ways[1])
    for name, value in changed.items():
        setattr(told, name, value)
    return msgspec.to_builtins(told)


STAGES = (
    Stage(StageKind.PREPARE, 1, 0.0, 0.002),
    Stage(StageKind.PREFILL, 1, 0.002, 0.5, WorkerId("p0"), tokens=16, cached_tokens=48),
    Stage(StageKind.HANDOVER, 1, 0.5, 0.75, WorkerId("d1"), WorkerId("p0"), num_bytes=23_592_960),
    Stage(StageKind.DECODE, 1, 0.75, 2.0, WorkerId("d1"), tokens=7),
)
LOST = Interruption(1, 2.0, "worker_lost", WorkerId("d1"), is_migration=True)


def timeline(**more):
    return Timeline(RequestId("r"), "sim", 0.0, 2.0, "ok", prompt_tokens=64, ttft_s=0.5, stages=STAGES, **more)


def test_every_stage_has_its_worker_its_seconds_and_its_place():
    lines = printed(traced(explanation(timeline=timeline(interruptions=(LOST,))))).splitlines()
    (prefill,) = [line for line in lines if " prefill " in line and "computed" in line]
    assert "p0" in prefill
    assert "498.0 ms" in prefill
    assert "16 tokens computed, 48 cached" in prefill
    assert "████████························" in prefill
    (handover,) = [line for line in lines if "23,592,960 bytes" in line]
    assert "p0 → d1" in handover
    assert any("at 2.00 s attempt 1 failed: worker_lost (d1); its answer went on elsewhere" in line for line in lines)


def test_the_chosen_way_comes_first():
    lines = printed(traced(explanation(timeline=timeline()))).splitlines()
    ways = [line.split() for line in lines if line.rstrip().endswith("ms") and ("d0" in line or "d1" in line)]
    assert [way[:3] for way in ways] == [["→", "p0", "d1"], ["(same)", "d0", "0"]]


def test_attempts_before_are_told_and_a_request_that_runs_has_no_timeline():
    before = explanation(refused_because="too late")
    text = printed(traced(explanation(attempt=2) | {"earlier": [before]}))
    assert text.index("r: it has not ended") < text.index("attempt 1") < text.index("refused: too late")
    assert text.index("refused: too late") < text.index("attempt 2")


def test_names_from_outside_are_text():
    told = explanation(timeline=timeline())
    told["timeline"]["model"] = "[bold]\x1b[31mred"
    assert "[bold]\\x1b[31mred" in printed(traced(told))


def test_the_last_requests_are_a_line_each():
    text = printed(listed([msgspec.to_builtins(timeline())]))
    assert "500.0 ms" in text
    assert printed(listed([])).strip() == "no request has ended yet"
