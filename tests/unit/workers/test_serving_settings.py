import pytest

from planes.wire.errors import UnusableSetting
from workers.adopted.settings import AdoptSettings
from workers.serving_settings import own_address
from workers.settings import WorkerSettings


def test_a_worker_without_a_name_gets_a_new_one_that_tells_its_role():
    settings = WorkerSettings(engine="sim", role="decode")
    assert settings.new_worker_id().startswith("decode-")
    assert settings.new_worker_id() != settings.new_worker_id()
    assert WorkerSettings(engine="sim", worker_id="d1").new_worker_id() == "d1"


def test_others_reach_a_worker_where_it_listens_unless_told_otherwise():
    assert WorkerSettings(engine="sim", host="10.0.0.1").public_host == "10.0.0.1"
    assert WorkerSettings(engine="sim", host="0.0.0.0", advertise_host="w1").public_host == "w1"


@pytest.mark.parametrize(
    ("name", "address"),
    [("10.1.2.3", "10.1.2.3"), ("localhost", None), ("127.0.1.1", None), ("::1", None), ("no such name", None)],
)
def test_the_name_of_a_machine_stands_for_an_address_that_others_can_use_or_for_none(name, address):
    assert own_address(lambda: name) == address


@pytest.mark.parametrize("make", [lambda **set_: WorkerSettings(engine="sim", **set_), AdoptSettings])
@pytest.mark.parametrize(
    ("name", "value"),
    [("port", 65_536), ("metrics_port", -1), ("worker_id", "a b"), ("max_queued", -1), ("heartbeat_s", 0.0)],
)
def test_what_all_workers_have_is_checked_as_they_are_told(make, name, value):
    with pytest.raises(UnusableSetting, match=f"--{name.replace('_', '-')}"):
        make(**{name: value})
