import io

import msgspec
import pytest
from rich.console import Console

from app.cli.fleet import FleetTable, NoAnswer
from planes.wire.messages import LoadReport, Role, RoleWish, WorkerId, WorkerState
from tests.fakes import registration


def printed(fleet):
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(fleet.shown("ns"))
    return console.export_text()


def test_workers_are_listed_with_card_and_layout_and_what_they_last_said():
    fleet = FleetTable()
    fleet.up(msgspec.structs.replace(registration("d0", card_digest="ab" * 32), layout="0123456789abcdef"))
    fleet.reported(LoadReport(WorkerId("d0"), 1, WorkerState.READY, 2, 1, 100, 50, 70, 3, 4, 0))
    fleet.reported(LoadReport(WorkerId("stranger"), 1, WorkerState.READY, 2, 1, 100, 50, 70, 3, 4, 0))
    text = printed(fleet)
    assert "abababab" in text
    assert "01234567" in text
    assert "50/1000" in text
    assert "warning" not in text
    assert set(fleet.reports) == {"d0"}


def test_a_fleet_that_disagrees_is_warned_of():
    fleet = FleetTable()
    fleet.up(registration("d0"))
    fleet.up(registration("d1", card_digest="1" * 64))
    assert "warning: model 'sim' has 2 different cards" in printed(fleet)
    fleet.down(WorkerId("d1"))
    assert "warning" not in printed(fleet)


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("address", "[fe80::1]:8000", "[fe80::1]:8000"),
        ("model", "m[red]", "m[red]"),
        ("model", "m[/b]", "m[/b]"),
        ("model", "m\u202ex", "m\\u202ex"),
    ],
)
def test_whatever_a_worker_says_of_itself_is_shown_as_it_is(field, value, shown):
    fleet = FleetTable()
    fleet.up(msgspec.structs.replace(registration("d0"), **{field: value}))
    fleet.up(msgspec.structs.replace(registration("d1", card_digest="1" * 64), **{field: value}))
    text = printed(fleet)
    assert text.count(shown) >= 2
    assert "\u202e" not in text


def test_an_etcd_that_does_not_answer_is_named_without_its_password():
    assert str(NoAnswer("http://u:s3cr3t@e:1", 5.0)) == "etcd at http://***@e:1 did not answer within 5 s"


def test_a_worker_s_role_is_shown_with_what_it_becomes_and_what_it_was_asked_to_be():
    fleet, worker = FleetTable(), registration("d0", Role.DECODE, epoch=7)
    fleet.up(worker)
    fleet.wished(WorkerId("d0"), RoleWish(6, Role.PREFILL))
    assert fleet.role(worker) == "decode"
    fleet.wished(WorkerId("d0"), RoleWish(7, Role.PREFILL))
    assert "decode (asked: prefill)" in printed(fleet)
    fleet.up(msgspec.structs.replace(worker, becoming=Role.PREFILL))
    assert "decode → prefill" in printed(fleet)
    assert fleet.role(msgspec.structs.replace(worker, role=Role.PREFILL)) == "prefill"
    fleet.wished(WorkerId("d0"), None)
    assert fleet.role(worker) == "decode"
