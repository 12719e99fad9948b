import msgspec
import pytest

from app.cli.role import RoleRefused, RoleSettings, checked, progress, until_changed
from planes.control import ControlPlaneUnavailable
from planes.wire.errors import UnusableSetting
from planes.wire.messages import Role, WorkerId, WorkerState
from tests.fakes import registration

PREFILL, DECODE, BOTH = Role.PREFILL, Role.DECODE, Role.BOTH


def worker(name, role=DECODE, *, roles=tuple(Role), becoming=None, **fields):
    return msgspec.structs.replace(registration(name, role, **fields), roles=roles, becoming=becoming)


def fleet(*workers):
    return {each.worker: each for each in workers}


def test_a_worker_that_can_take_the_role_is_told_as_it_stands():
    own = worker("d0", epoch=7)
    assert checked(fleet(own, worker("d1")), WorkerId("d0"), PREFILL) is own
    assert checked(fleet(own), WorkerId("d0"), BOTH) is own
    assert checked(fleet(own), WorkerId("d0"), PREFILL, is_forced=True) is own
    bound = worker("v", BOTH, roles=())
    assert checked(fleet(bound), WorkerId("v"), BOTH) is bound, "what it is, it may be asked to be"


@pytest.mark.parametrize(
    ("name", "role", "workers", "words"),
    [
        ("d9", PREFILL, [worker("d0"), worker("a")], "no worker 'd9' is registered; there are: a, d0"),
        ("d9", PREFILL, [], "there are: none"),
        ("d0", PREFILL, [worker("d0", state=WorkerState.DRAINING), worker("d1")], "is draining: it stops"),
        ("p0", DECODE, [worker("p0", PREFILL, roles=())], "its sim engine was started as prefill and can be nothing"),
        ("d0", PREFILL, [worker("d0")], "no other worker of model 'sim' decodes"),
        ("d0", PREFILL, [worker("d0"), worker("d1", model="other")], "no other worker of model 'sim' decodes"),
        ("d0", PREFILL, [worker("d0"), worker("d1", state=WorkerState.DRAINING)], "no other worker"),
        ("d0", PREFILL, [worker("d0"), worker("d1", becoming=PREFILL), worker("p0", PREFILL)], "no other worker"),
    ],
)
def test_what_a_worker_cannot_or_should_not_become_is_refused_by_name(name, role, workers, words):
    with pytest.raises(RoleRefused, match=words):
        checked(fleet(*workers), WorkerId(name), role)


def test_progress_is_what_the_registration_says():
    before = worker("d0", epoch=7)
    assert progress(before, before, PREFILL) == (False, "d0 is decode and has not answered the wish to become prefill")
    changing = worker("d0", epoch=7, becoming=PREFILL)
    assert progress(before, changing, PREFILL)[1].startswith("d0 is decode and becomes prefill when it has ended")
    assert progress(before, worker("d0", PREFILL, epoch=7), PREFILL) == (True, "d0 is prefill; it was decode")
    assert progress(before, before, DECODE) == (True, "d0 is decode")
    assert not progress(before, changing, DECODE)[0], "it has not answered yet that it stays what it is"


def test_a_worker_that_left_or_was_started_anew_will_not_answer():
    before = worker("d0", epoch=7)
    with pytest.raises(RoleRefused, match="d0 has left before it became prefill"):
        progress(before, None, PREFILL)
    with pytest.raises(RoleRefused, match="d0 was started anew before it became prefill; it is decode: ask it again"):
        progress(before, worker("d0", epoch=8), PREFILL)


@pytest.mark.parametrize("name", ["wait_s", "migrate_after_s"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), 1e9])
def test_seconds_that_are_none_are_refused(name, value):
    with pytest.raises(UnusableSetting, match=f"--{name.replace('_', '-')}"):
        RoleSettings(**{name: value})


async def test_etcd_that_does_not_answer_once_does_not_end_the_wait_for_a_worker():
    answers = [(False, "not yet"), ControlPlaneUnavailable("slow"), (False, "not yet"), (True, "it is")]

    async def look():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert await until_changed(look, 600.0, poll_s=0.0) == (True, "it is")
    answers += [(False, "not yet"), ControlPlaneUnavailable("away")]
    assert await until_changed(look, 0.0, poll_s=0.0) == (False, "not yet")
    with pytest.raises(ControlPlaneUnavailable):
        await until_changed(look, 0.0, poll_s=0.0)
