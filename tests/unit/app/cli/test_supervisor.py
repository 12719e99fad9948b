"""Children of `headrace up`: when they count as ready, what is said of their end, and when they are started again."""

import asyncio
import signal

import pytest

from app.cli.supervisor import Child, ChildFailed, Supervisor, ending, keep_running, read_line

PATIENCE_S = 40.0
"""For machines with other things to do; less than the supervisor's for a child that ends, and than any child's life."""


class Clock:
    """Time passes where somebody runs or pauses."""

    def __init__(self):
        self.now = 0.0
        self.pauses = []

    def __call__(self):
        return self.now

    async def pause(self, seconds):
        self.pauses.append(seconds)


async def pauses_after(*lives_s):
    """How long each pause was after runs that lasted so long; the last run raises."""
    clock, left = Clock(), list(lives_s)

    async def run():
        if not left:
            raise EOFError
        clock.now += left.pop(0)
        return "the mill stopped"

    with pytest.raises(EOFError):
        await keep_running(run, clock=clock, pause=clock.pause)
    return clock.pauses


async def test_pauses_grow_with_every_quick_end_up_to_a_limit(capsys):
    assert await pauses_after(*[1.0] * 7) == [1.0, 2.0, 5.0, 10.0, 30.0, 30.0, 30.0]
    assert "the mill stopped; starting it again in 5 s\n" in capsys.readouterr().out


async def test_what_ran_for_long_is_started_again_soon():
    assert await pauses_after(1.0, 1.0, 61.0, 1.0) == [1.0, 2.0, 1.0, 2.0]


class Family:
    """A supervisor of small shell scripts."""

    def __init__(self, folder, *, ready_timeout_s=60.0):
        self.folder = folder
        self.stop, self.hurry = asyncio.Event(), asyncio.Event()
        self.supervisor = Supervisor(ready_timeout_s, self.stop, self.hurry)

    def child(self, name, script, *, probe=None):
        return Child(name, ["/bin/sh", "-c", script], self.folder / f"{name}.log", {"MILL": "turns"}, probe)


@pytest.fixture
async def family(tmp_path):
    made = Family(tmp_path)
    yield made
    made.hurry.set()
    await made.supervisor.stop_all()


async def nobody():
    return False


async def test_a_child_that_ends_before_all_are_ready_is_told_with_its_last_words(family):
    children = [
        family.child("gateway", "sleep 60", probe=nobody),
        family.child("both-1", "echo 'ts=1 level=error event=worker.failed reason=\"no room\"'; exit 3"),
    ]
    with pytest.raises(ChildFailed, match=r"both-1 ended with status 3: no room \(.*both-1\.log\)"):
        await family.supervisor.start(children)


async def test_a_start_that_takes_too_long_is_told_with_what_each_was_doing(tmp_path):
    family = Family(tmp_path, ready_timeout_s=0.0)
    try:
        with pytest.raises(ChildFailed, match=r"not ready after 0 s: gateway \(starting\); --ready-timeout-s"):
            await family.supervisor.start([family.child("gateway", "sleep 60", probe=nobody)])
    finally:
        await family.supervisor.stop_all()


async def test_only_children_with_a_probe_are_waited_for_and_their_output_is_kept(family, tmp_path):
    async def has_spoken():
        return "turns" in (tmp_path / "gateway.log").read_text() if (tmp_path / "gateway.log").exists() else False

    gateway = family.child("gateway", "echo mill $MILL; sleep 60", probe=has_spoken)
    await family.supervisor.start([gateway, family.child("both-1", "sleep 60")])
    assert (tmp_path / "gateway.log").read_text() == "mill turns\n"
    assert gateway.last_words[-1] == "mill turns"


@pytest.mark.parametrize(
    "line",
    [
        'ts=1 level=info event=worker.progress step="loading weights"',
        '{"event": "worker.progress", "step": "loading weights"}',
    ],
)
async def test_the_progress_of_a_start_is_shown_in_either_format_of_the_log(family, capsys, tmp_path, line):
    async def has_spoken():
        return worker.step == "loading weights"

    worker = family.child("both-1", f"echo '{line}'; sleep 60", probe=has_spoken)
    await family.supervisor.start([worker])
    assert "both-1: loading weights" in capsys.readouterr().out


async def test_the_gateway_ends_before_the_workers_do(family, tmp_path):
    script = "trap 'echo {0} >> " + str(tmp_path / "order") + "; exit 0' TERM; echo up; while :; do sleep 0.01; done"
    children = [family.child(name, script.format(name)) for name in ("both-1", "gateway")]

    async def are_up():
        return all("up" in child.last_words for child in children)

    children[0].probe = are_up
    await family.supervisor.start(children)
    await family.supervisor.stop_all()
    assert (tmp_path / "order").read_text().split() == ["gateway", "both-1"]


async def test_a_child_that_dies_later_is_started_again(family, tmp_path, capsys):
    mark = tmp_path / "again"
    child = family.child("both-1", f"test -e {mark} && echo again || touch {mark}; sleep 600")

    async def has_begun():
        return mark.exists()

    child.probe = has_begun
    await family.supervisor.start([child])
    watching = asyncio.create_task(family.supervisor.watch())
    child.process.kill()  # not the `sleep` that it has started, which could still write
    async with asyncio.timeout(PATIENCE_S):
        while "again" not in child.last_words:  # noqa: ASYNC110 - a process of its own writes it
            await asyncio.sleep(0.01)
        family.stop.set()
        await watching
    assert "both-1 was killed by SIGKILL" in capsys.readouterr().out


async def test_a_child_that_ends_while_it_starts_is_told_though_something_of_its_own_goes_on(family):
    child = family.child("both-1", "sleep 600 & echo no room; exit 3", probe=nobody)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(ChildFailed, match="both-1 ended with status 3: no room"):
            await family.supervisor.start([child])


async def test_what_has_left_a_child_s_group_is_not_waited_for(family):
    child = family.child("both-1", "setsid sleep 45 & echo no room; exit 3", probe=nobody)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(ChildFailed, match="both-1 ended with status 3: no room"):
            await family.supervisor.start([child])


async def test_a_child_that_has_ended_is_not_waited_for_though_something_of_its_own_goes_on(family, capsys):
    child = family.child("both-1", "sleep 600 & echo up; exec sleep 600")

    async def is_up():
        return "up" in child.last_words

    child.probe = is_up
    await family.supervisor.start([child])
    async with asyncio.timeout(PATIENCE_S):
        await family.supervisor.stop_all()
    assert child.process.returncode == -signal.SIGTERM
    assert "is killed" not in capsys.readouterr().out


def test_an_end_by_sigkill_is_explained():
    assert "memory runs out" in ending("both-1", -signal.SIGKILL, "")
    assert ending("both-1", 3, "no room") == "both-1 ended with status 3: no room"


async def test_a_line_without_an_end_does_not_stop_the_reading():
    stream = asyncio.StreamReader(limit=8)
    stream.feed_data(b"0123456789abcdef\nnext\nlast")
    stream.feed_eof()
    lines = []
    while line := await read_line(stream):
        lines.append(line)
    assert b"".join(lines) == b"0123456789abcdef\nnext\nlast"
    assert lines[-2:] == [b"next\n", b"last"]
