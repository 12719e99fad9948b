"""What a gateway records can be simulated: `--record`."""

import asyncio
import signal

import pytest

from loadtest.like import live_fleet
from loadtest.simulate import Case, Comparison
from loadtest.slo import Slo
from loadtest.workloads import read_trace

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def texts(folder):
    return [path.read_text() for path in folder.iterdir()]


async def test_a_recorded_load_is_served_again_by_the_simulator(site, reach, unique, tmp_path):
    folder = tmp_path / "recorded"
    await site.worker("prefill-1", speedup=50)
    await site.worker("decode-1", speedup=50)
    gateway = await site.gateway("--record", str(folder), num_workers=2)
    document = "".join(f"{unique} {number} " for number in range(20))
    async with reach(gateway) as api:
        lengths = []
        for question, max_tokens in (("why?", 5), ("how?", 9), ("when?", 7)):
            answer = await api.chat(document + question, max_tokens=max_tokens)
            assert answer.status_code == 200
            lengths.append((answer.json()["usage"]["prompt_tokens"], max_tokens))
        async with api.stream(unique, max_tokens=3) as stream:
            await stream.read()
        live = await asyncio.to_thread(live_fleet, gateway.url)
        refused = await api.chat(unique, max_tokens=0)
        assert refused.status_code == 400
        gateway.process.send(signal.SIGTERM)
        assert await gateway.process.ended() == 0
    workload = read_trace(folder, block_size=64, seed=0)
    turns = [session.turns[0] for session in workload.sessions]
    assert [(turn.prompt_tokens, turn.completion_tokens) for turn in turns[:3]] == lengths
    assert turns[3].completion_tokens == 3
    assert len(turns) == 4
    whole = len(document) // 512 * 512 // 64
    assert whole >= 8
    assert all((turn.blocks[:whole] == turns[0].blocks[:whole]).all() for turn in turns[1:3])
    assert turns[3].blocks[:1].tolist() != turns[0].blocks[:1].tolist()
    assert all(unique not in text for text in texts(folder))

    roles = {worker.worker: worker.role for worker in live.workers}
    assert roles == {"decode-1": "decode", "prefill-1": "prefill"}
    assert any(worker.num_samples for worker in live.workers)
    (row,) = Comparison(["headrace"], live.facts, 0, Slo(), live).run([Case(str(folder), 1.0, 1, 1)])
    assert (row.num_requests, row.num_finished) == (4, 4)
    assert row.hit_rate > 0.3
