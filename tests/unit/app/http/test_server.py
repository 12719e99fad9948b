import pytest
import uvicorn

from app.http.server import HttpServer


@pytest.fixture
def now():
    return [100.0]


@pytest.fixture
def server(now):
    return HttpServer(uvicorn.Config(None, timeout_graceful_shutdown=30), clock=lambda: now[0])


def test_what_ends_after_the_streams_has_what_they_left_of_the_drain_limit(server, now):
    server.stop()
    assert server.left_s() == 30
    now[0] = 112.5
    assert server.left_s() == 17.5
    now[0] = 131.0
    assert server.left_s() == 0


def test_nothing_is_left_for_who_asks_twice(server):
    server.stop()
    server.stop()
    assert server.left_s() == 0
