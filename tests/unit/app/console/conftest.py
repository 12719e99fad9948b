import pytest

from tests.console.fake_gateway import FakeFleet, make_gateway


@pytest.fixture
async def gateway(tmp_path):
    made = make_gateway(tmp_path)
    yield made
    made.dispatcher.stop()
    made.preprocessor.close()


@pytest.fixture
def fleet(gateway):
    """Four workers that are registered and report when they are told to."""
    fleet = FakeFleet(gateway, 4)
    fleet.register()
    return fleet
