"""What `headrace doctor` makes of what it sees."""

from datetime import UTC, datetime

import msgspec
import pytest

from app.cli import findings
from app.cli.findings import Level
from planes.wire.messages import LoadReport, Role, WorkerId, WorkerState
from tests.fakes import registration

NOW = 1_700_000_000.0
EPOCH = int(NOW * 1e9)


def report(worker):
    return LoadReport(WorkerId(worker), EPOCH, WorkerState.READY, 0, 0, 0, 8, 0, 7, 0, 0)


def fleet(*workers, reports=None, greeted=None, snapshots=None):
    names = [each.worker for each in workers]
    reports = {name: report(name) for name in names} if reports is None else reports
    greeted = frozenset(names) if greeted is None else greeted
    return list(findings.fleet(workers, reports, greeted, snapshots or {}, wall_now=NOW))


def wrong(found):
    return {each.what: each.told for each in found if each.level is Level.WRONG}


def worker(name="d0", role=Role.DECODE, **changed):
    return registration(name, role, **{"epoch": EPOCH, **changed})


def test_a_sound_fleet_has_nothing_wrong_and_tells_how_far_its_events_are():
    found = fleet(worker("p0", Role.PREFILL), worker("d0"))
    assert wrong(found) == {}
    assert [each.what for each in found] == ["worker d0", "worker p0"]
    assert "KV events up to 7" in found[0].told


def test_everything_wrong_with_a_worker_is_told_with_what_to_do():
    assert "does not answer at" in wrong(fleet(worker(), greeted=frozenset()))["worker d0"]
    assert wrong(fleet(worker(), reports={})) == {"worker d0": "no load report over NATS"}
    assert "no snapshot" in wrong(fleet(worker(), snapshots={WorkerId("d0"): "no snapshot"}))["worker d0"]
    assert all(each.advice for each in fleet(worker(), reports={}) if each.level is not Level.OK)


def test_a_fleet_that_cannot_serve_is_wrong():
    assert wrong(fleet()) == {"workers": "none is registered"}
    assert wrong(fleet(worker("p0", Role.PREFILL))) == {"roles": "nobody decodes sim"}


def test_workers_that_do_not_fit_together_are_told():
    found = wrong(fleet(worker("d0"), worker("d1", card_digest="1" * 64)))
    assert "2 different cards" in found["compatibility"]


def test_a_worker_from_the_future_has_another_clock():
    assert "clocks" in wrong(fleet(worker(epoch=EPOCH + 60 * 10**9)))
    assert "clocks" not in wrong(fleet(worker(epoch=EPOCH - 60 * 10**9)))


@pytest.mark.parametrize(
    ("ports", "ucx_tls", "level", "words"),
    [
        ({}, None, Level.OK, "shared memory or TCP"),
        ({"mlx5_0:1": "1: DOWN"}, None, Level.WRONG, "no port is active"),
        ({"mlx5_0:1": "4: ACTIVE"}, None, Level.OK, "UCX may use it"),
        ({"mlx5_0:1": "4: ACTIVE"}, "tcp,sm", Level.WRONG, "leaves RDMA out"),
        ({"mlx5_0:1": "4: ACTIVE"}, "rc,sm", Level.OK, "UCX may use it"),
        ({"mlx5_0:1": "4: ACTIVE"}, "^rc", Level.WRONG, "leaves RDMA out"),
    ],
)
def test_rdma_that_is_there_and_not_used_is_wrong(ports, ucx_tls, level, words):
    rdma = list(findings.nixl("nixl_cu13", ports, ucx_tls))[-1]
    assert (rdma.level, rdma.what) == (level, "RDMA")
    assert words in rdma.told


def test_without_nixl_nothing_is_handed_over_here():
    (found,) = findings.nixl(None, {}, None)
    assert found.level is Level.ODD


@pytest.mark.parametrize(("version", "level"), [("3.5.1", Level.ODD), ("3.5.17", Level.OK), (None, Level.ODD)])
def test_an_etcd_unfit_for_production_is_odd(version, level):
    assert findings.etcd_version(version).level is level


def test_few_open_files_are_odd():
    assert [findings.file_limit(soft).level for soft in (1024, 65536)] == [Level.ODD, Level.OK]


def gateway(*workers, metrics="headrace_inexact_workers 0.0\n", skew_s=0.0, refused=None, links=()):
    told = {"workers": list(workers), "routing": {"refused_because": refused or {}}, "links": list(links)}
    return list(findings.gateway(told, metrics, skew_s=skew_s))


def seen(worker="d0", *, is_connected=True, refused_because=""):
    return {"worker": worker, "is_connected": is_connected, "refused_because": refused_because}


@pytest.mark.parametrize(
    ("ahead_s", "took_s", "age_s", "told_s"),
    [
        (0.0, 0.0, 0.0, 0.0),
        (0.0, 0.1, 1.9, 0.0),
        (0.0, 9.0, 0.0, 0.0),
        (30.0, 0.0, 0.0, 30.0),
        (-30.0, 1.0, 1.0, -28.0),
    ],
)
def test_a_header_that_is_cut_to_seconds_and_old_tells_of_clocks_that_must_differ_alone(ahead_s, took_s, age_s, told_s):
    date = datetime.fromtimestamp(int(NOW + took_s + ahead_s - age_s), UTC)
    assert findings.skew_s(date, NOW, NOW + took_s) == pytest.approx(told_s, abs=1.0)
    assert (findings.skew_s(date, NOW, NOW + took_s) == 0.0) is (ahead_s == 0.0)


def test_a_gateway_tells_what_it_lacks():
    assert wrong(gateway(seen())) == {}
    assert wrong(gateway(seen(is_connected=False))) == {"gateway": "connected to 0 of 1 workers"}
    assert "gateway and d0" in wrong(gateway(seen(refused_because="renders another prompt")))
    assert "routing settings" in wrong(gateway(seen(), refused={"policy": "unknown"}))
    assert "clocks" in wrong(gateway(seen(), skew_s=-5.0))
    (lost,) = [each for each in gateway(seen(), metrics="headrace_inexact_workers 2.0\n") if each.what == "KV events"]
    assert (lost.level, "2.0 workers" in lost.told) == (Level.ODD, True)


def test_measured_handovers_are_told():
    link = {"prefill": "p0", "decode": "d0", "bytes_per_s": 12.5e9}
    assert gateway(seen(), links=[link])[-1].told == "p0 → d0: 12.50 GB/s measured"


def test_load_reports_are_what_workers_send():
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(report("d0")), type=LoadReport).seq == 7
