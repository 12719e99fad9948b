"""Where and when something was measured, for the head of a table."""

import datetime as dt
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from router import cost

_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Circumstances:
    """load: what else the machine did when it began, runnable processes on average over a minute."""

    cpu: str
    num_cores: int
    memory_gb: float
    system: str
    python: str
    commit: str
    date: str
    load: float
    is_compiled: bool
    """Whether the router is, as in a wheel."""

    def __str__(self) -> str:
        return (
            f"{self.cpu}, {self.num_cores} cores, {self.memory_gb:.0f} GB, Linux {self.system}, Python {self.python}, "
            f"commit {self.commit} ({'compiled' if self.is_compiled else 'interpreted'}), {self.date}, "
            f"load {self.load:.1f} at the start"
        )


def circumstances() -> Circumstances:
    """Of here and now."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return Circumstances(
        cpu=cpu[1] if cpu else platform.machine(),
        num_cores=len(os.sched_getaffinity(0)),
        memory_gb=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        system=platform.release(),
        python=platform.python_version(),
        commit=_commit(),
        date=dt.datetime.now(tz=dt.UTC).date().isoformat(),
        load=os.getloadavg()[0],
        is_compiled=cost.__file__.endswith(".so"),
    )


def _commit() -> str:
    asked = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"
