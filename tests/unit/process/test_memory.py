import subprocess
import sys

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
