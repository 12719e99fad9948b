from collections import Counter

import pytest

from loadtest.grid.axes import AXES, sample, wanted


@pytest.mark.parametrize("count", [40, 120, 300])
def test_every_value_of_every_axis_is_in_a_sample_equally_often(count):
    for axis, values in AXES.items():
        found = Counter(cell.values[axis] for cell in sample(count, 7))
        assert set(found) == set(values)
        assert max(found.values()) - min(found.values()) <= 1


def test_a_seed_gives_one_sample_and_a_smaller_one_is_its_beginning():
    assert sample(300, 7)[:40] == sample(40, 7)
    assert sample(40, 7) != sample(40, 8)


def test_axes_do_not_go_along_with_each_other():
    pairs = Counter((cell.answers, cell.arrivals) for cell in sample(300, 0))
    assert len(pairs) == 16
    assert max(pairs.values()) < 40


def test_cells_know_their_numbers():
    assert [cell.number for cell in sample(5, 0)] == list(range(5))


def test_a_filter_is_an_axis_and_one_of_its_values():
    assert wanted("answers=2000") == ("answers", "2000")
    assert wanted("fleet=2 gateways both") == ("fleet", "2 gateways both")


@pytest.mark.parametrize(("text", "words"), [("size=3", "no axis 'size'"), ("answers=3", "no value '3'.* 300")])
def test_a_filter_that_fits_nothing_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        wanted(text)
