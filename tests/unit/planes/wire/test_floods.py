from planes.wire.floods import is_notable


def test_a_flood_is_logged_at_powers_of_two():
    assert [count for count in range(100) if is_notable(count)] == [1, 2, 4, 8, 16, 32, 64]
