from dataclasses import replace

import pytest

from loadtest.bench_streams import all_answered
from loadtest.closed_loop import Shape, row_of


def test_streams_that_were_refused_are_told_and_not_taken_for_cheap_ones():
    row = row_of("open", Shape(4, 200, 120), [], {}, 1.0)
    assert all_answered(row) is row
    with pytest.raises(RuntimeError, match=r"13,712 of the streams failed, the first with: queue_full"):
        all_answered(replace(row, errors=13_712, error="queue_full: 4096 requests wait"))
