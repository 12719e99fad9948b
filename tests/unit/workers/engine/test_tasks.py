import asyncio

import numpy as np
import pytest

from planes.wire.errors import InvalidRequest
from planes.wire.frames import FinishReason, Sampling
from planes.wire.messages import RequestId
from workers.engine.base import EngineRequest
from workers.engine.tasks import ActiveRequest, ActiveRequests, LastingWork, cancelled


def active(name="r", *, n=2, script=()):
    sampling = Sampling(max_tokens=4, n=n, script=list(script))
    request = EngineRequest(RequestId(name), np.zeros(3, np.uint32), sampling)
    outputs = []
    return ActiveRequest(request=request, on_output=outputs.append, unfinished=set(range(n))), outputs


async def forever():
    await asyncio.Event().wait()


async def test_a_request_that_runs_already_or_says_what_to_say_is_refused():
    requests = ActiveRequests()
    one, _ = active()
    requests.begin(one, forever())
    with pytest.raises(InvalidRequest, match="runs here already"):
        requests.check(one.request)
    with pytest.raises(InvalidRequest, match="simulated"):
        requests.check(active("s", script=[1])[0].request)
    await cancelled(requests.tasks)


async def test_a_failure_is_said_for_each_choice_that_has_not_ended_and_once():
    requests = ActiveRequests()
    one, outputs = active(n=3)
    requests.begin(one, forever())
    one.unfinished.discard(1)
    requests.fail(one, "gone")
    requests.fail(one, "gone again")
    assert [(output.index, output.finish, output.error) for output in outputs] == [
        (0, FinishReason.ERROR, "gone"),
        (2, FinishReason.ERROR, "gone"),
    ]
    assert one not in requests
    await cancelled([one.task])


async def test_what_is_aborted_is_silent_and_its_task_is_waited_for_at_the_end():
    requests = ActiveRequests()
    one, outputs = active()
    requests.begin(one, forever())
    assert requests.abort(one.request.request) is one
    assert requests.abort(one.request.request) is None
    assert (len(requests), requests.tasks) == (0, [one.task])
    await cancelled(requests.tasks)
    requests.fail(one, "too late")
    assert outputs == []
    assert requests.tasks == []


async def test_the_end_of_one_does_not_end_another_of_its_name():
    requests = ActiveRequests()
    first, second = active()[0], active()[0]
    requests.begin(first, forever())
    requests.abort(first.request.request)
    requests.begin(second, forever())
    requests.ended(first)
    assert requests.get(second.request.request) is second
    requests.ended(second)
    assert len(requests) == 0
    await cancelled([first.task, second.task])


async def test_the_first_failure_of_lasting_work_is_the_engines_death():
    deaths = []
    work = LastingWork(deaths.append)

    async def fail():
        raise OSError("no")

    work.keep(fail())
    work.keep(fail())
    await asyncio.wait(work.tasks)
    await asyncio.sleep(0)
    assert deaths == ["OSError: no"]
    assert work.is_ending


async def test_what_ends_while_the_engine_stops_is_no_death():
    deaths = []
    work = LastingWork(deaths.append)
    work.keep(forever())
    work.is_ending = True
    await cancelled(work.tasks)
    work.died("late")
    assert deaths == []
