from typing import get_args

import numpy as np
import pytest

from app.serving import effects as do
from app.serving.effects import Effect, Noted
from app.serving.events import LegId, TimeUp
from loadtest.simulator.driver import SimulatedDriver, gateway_request
from loadtest.simulator.records import Ending, Record
from loadtest.simulator.scenario import Scenario, engine_facts
from loadtest.simulator.simulation import Simulation
from loadtest.workloads import Turn, Workload, segment_names
from planes.streams.client import WorkerLost
from planes.wire.frames import LocalLeg, PrefillLeg
from planes.wire.messages import HandoverMode, RequestId, WorkerId
from router.request import Observed, Outcome

FACTS = engine_facts(block_size=512, num_blocks=1000, link_gbps=100)
TURN = Turn(0.0, 1000, 5, segment_names([(0, 1000)], 512))
NAME, WORKER = RequestId("r"), WorkerId("both-000")


def make_driver(until):
    """Of one request, alone with one worker: routed after 0 s, has its first token after 0.14 s, ends soon after."""
    simulation = Simulation(Scenario("round_robin", 0, 0, 1, FACTS), Workload("none", 512, ()))
    simulation.start_workers()
    request = gateway_request(NAME, TURN, block_size=512, now=0.0)
    driver = SimulatedDriver(simulation.gateways[0], request, TURN, Record(0.0, 1000, 5), lambda: None)
    driver.start()
    if until:
        simulation.clock.run(until=until)
    return simulation, driver


def test_a_request_has_length_and_no_tokens():
    request = gateway_request(NAME, TURN, block_size=512, now=2.0)
    assert (len(request.prompt), request.prompt.strides, len(request.blocks)) == (1000, (0,), 1)
    assert (request.is_first_token_early, request.is_resumable) == (True, True)
    assert np.array_equal(request.blocks, TURN.blocks)


ROUTABLE = gateway_request(RequestId("other"), TURN, block_size=512, now=0.0).routable(
    num_tokens=0, excluded=frozenset(), is_retry=False
)
OBSERVED = Observed(outcome=Outcome.CANCELLED)


KEPT = RequestId("kept")


def num_waiting(simulation, _):
    return simulation.gateways[0].dispatcher.num_waiting


def num_bound(simulation, _):
    return simulation.gateways[0].router.stats(now=simulation.clock.now).bound


def prompt_tokens_ahead(simulation, _):
    return simulation.gateways[0].router.workers(now=simulation.clock.now)[0].queue_s > 0


def num_at_worker(simulation, _):
    # What is cancelled holds its blocks until the step in progress has ended.
    simulation.clock.run(until=simulation.clock.now + 0.05)
    load = simulation.lives[WORKER].core.load()
    return load.num_running + load.num_waiting


def is_kept(simulation, _):
    simulation.clock.run(until=simulation.clock.now + 0.01)
    return simulation.lives[WORKER].keeps(KEPT)


def has_first_token(_, driver):
    return driver.record.first_at is not None


def recorded(name):
    return lambda _, driver: getattr(driver.record, name)


PERFORMED = {
    do.Submit: (do.Submit(ROUTABLE), 0.1, num_waiting, 0, 1),
    do.Withdraw: (do.Withdraw(), 0.0, num_waiting, 1, 0),
    do.MarkPrefilled: (do.MarkPrefilled(), 0.05, prompt_tokens_ahead, True, False),
    do.ReleaseReservation: (do.ReleaseReservation(OBSERVED), 0.1, num_bound, 1, 0),
    do.StartLeg: (do.StartLeg(LegId(9), WORKER, RequestId("r.2"), LocalLeg()), 0.05, num_at_worker, 1, 2),
    do.CancelLeg: (do.CancelLeg(LegId(1)), 0.05, num_at_worker, 1, 0),
    do.ReleaseTicket: (do.ReleaseTicket(WORKER, KEPT), 0.1, is_kept, True, False),
    do.Write: (do.Write(b"."), 0.1, has_first_token, False, True),
    do.Finish: (do.Finish(b"."), 0.1, recorded("ending"), None, Ending.FINISHED),
    do.Reply: (do.Reply(b".", []), 0.1, recorded("ending"), None, Ending.FINISHED),
    do.Fail: (do.Fail(WorkerLost(WORKER, "gone"), []), 0.1, recorded("ending"), None, Ending.FAILED),
    do.Note: (do.Note(Noted.MIGRATED, "worker_lost"), 0.1, recorded("num_migrations"), 0, 1),
}
"""Effect → one of it, when it is performed, what to look at, and that before and after."""
UNSEEN = {do.Head, do.EnqueuePrefill, do.WaitUntil}
"""Headers are no token; the others have tests of their own."""


def test_every_effect_is_performed():
    assert set(SimulatedDriver.PERFORM) == set(PERFORMED) | UNSEEN == set(get_args(Effect))


@pytest.mark.parametrize("effect", PERFORMED)
def test_an_effect_changes_what_it_says(effect):
    told, at_s, look, before, after = PERFORMED[effect]
    simulation, driver = make_driver(at_s)
    simulation.lives[WORKER].keep(KEPT)
    assert look(simulation, driver) == before
    driver.perform([told])
    assert look(simulation, driver) == after


def test_headers_are_no_token():
    _, driver = make_driver(0.1)
    driver.perform([do.Head([])])
    assert driver.record.first_at is None


def test_a_fleet_without_a_queue_says_so_of_every_queued_prompt():
    _, driver = make_driver(0.1)
    with pytest.raises(TypeError, match="QueueRefused in state DECODING"):  # it asks for the queue nowhere else
        driver.perform([do.EnqueuePrefill(LegId(1), NAME, PrefillLeg(HandoverMode.PULL))])


def test_the_last_instant_asked_for_is_told():
    told = []

    class Listening(SimulatedDriver):
        def receive(self, event):
            told.append((simulation.clock.now, event))

    simulation, driver = make_driver(0.1)
    driver.__class__ = Listening
    driver.perform([do.WaitUntil(0.11), do.WaitUntil(0.12)])
    simulation.clock.run(until=0.13)
    assert told == [(0.12, TimeUp())]


def test_nothing_ends_twice():
    _, driver = make_driver(10.0)
    assert (driver.record.ending, driver.record.num_received) == (Ending.FINISHED, 5)
    with pytest.raises(RuntimeError, match="ended twice"):
        driver.perform([do.Fail(WorkerLost(WORKER, "gone"), [])])
