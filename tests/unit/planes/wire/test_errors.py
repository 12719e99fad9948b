import pickle

import pytest

from planes.wire.errors import InvalidRequest, Rejected, UnusableSetting


@pytest.mark.parametrize(
    "error",
    [
        UnusableSetting("max_batch", 9000, "it may be 128 at most"),
        InvalidRequest("no such model", param="model", code="model_not_found"),
        Rejected("it is full", retry_after_s=2.5),
    ],
)
def test_an_error_reaches_another_process_as_it_was_raised(error):
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert (str(arrived), arrived.code, vars(arrived)) == (str(error), error.code, vars(error))
