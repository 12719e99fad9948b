"""What a process keeps of the memory that it no longer uses."""

import ctypes


def return_freed_memory() -> None:
    """Give what has been freed back to the system, after something large has been built; takes milliseconds.

    The C library keeps it for what comes next, which in a gateway is small. Nothing happens where it has no such call.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
