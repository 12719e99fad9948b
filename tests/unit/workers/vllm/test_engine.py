import pytest

from workers.vllm.engine import silent_s


@pytest.mark.parametrize(
    ("heard_at", "given_at", "expected"),
    [
        (0.0, [], 0.0),
        (0.0, [None, None], 0.0),
        (10.0, [None, 5.0], 90.0),
        (10.0, [None, 60.0, 40.0], 60.0),
        (70.0, [60.0, 40.0], 30.0),
    ],
    ids=["idle", "grammars are tried", "since its last step", "since its first request", "since a later step"],
)
def test_an_engine_is_silent_since_its_last_step_or_the_first_request_that_it_was_given(heard_at, given_at, expected):
    assert silent_s(heard_at, given_at, now=100.0) == expected
