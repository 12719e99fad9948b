"""What a process keeps of the memory that it no longer uses."""

import ctypes

_M_ARENA_MAX = -8  # of malloc.h


def return_freed_memory() -> None:
    """Give what has been freed back to the system, after something large has been built; takes milliseconds.

    The C library keeps it for what comes next, which in a gateway is small. Nothing happens where it has no such call.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def share_one_heap() -> None:
    """Let all threads allocate from one heap, so that what they free can be used again, or given back.

    Each thread of glibc's has its own otherwise, and keeps what lies between what stays. To be called before there are
    threads; nothing happens where the C library has no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
