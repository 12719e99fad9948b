"""What others send without end, as often as they like."""


def is_notable(count: int) -> bool:
    """True for 1, 2, 4, 8 …: a flood is logged with its number, and does not flood the log."""
    return count.bit_count() == 1
