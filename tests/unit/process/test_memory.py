import ctypes
import subprocess
import sys

import pytest

CODE = """
from pathlib import Path
from process.memory import return_freed_memory

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

pieces = [bytes(2000) for _ in range(60_000)]
above = bytes(2000)  # what is freed below it does not go back by itself
del pieces
before = resident_mb()
return_freed_memory()
print(before - resident_mb())
"""


def test_what_has_been_freed_goes_back_to_the_system():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 60, "of 120 MB"


HEAPS = """
import ctypes, threading
from process.memory import share_one_heap

share_one_heap()
libc = ctypes.CDLL(None)
threads = [threading.Thread(target=lambda: libc.malloc(1000)) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
out = ctypes.c_void_p.in_dll(libc, "stdout")
libc.malloc_info(0, out)
libc.fflush(out)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="another C library than glibc")
def test_all_threads_allocate_from_one_heap():
    heaps = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.count(
            "<heap nr="
        )
        for code in (HEAPS, HEAPS.replace("\nshare_one_heap()", ""))
    ]
    assert heaps[0] == 1 < heaps[1]
