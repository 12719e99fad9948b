"""CPU seconds and memory of the processes of a stack, read from /proc; ports and open files for them."""

import os
import resource
from dataclasses import dataclass
from pathlib import Path

from app.cli import servers

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Process:
    """One process. name: `gateway`, a worker's id (and `engine of …` for its children), `etcd`, `nats`."""

    pid: int
    name: str

    def cpu_s(self) -> float:
        """User and system seconds of all threads so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def rss_bytes(self) -> int:
        """Resident memory, pages shared with others included."""
        return self._status("VmRSS") * 1024

    def peak_bytes(self) -> int:
        """The most resident memory that it ever had."""
        return self._status("VmHWM") * 1024

    def pss_bytes(self) -> int:
        """Resident memory, each page divided by the number of processes that share it."""
        rollup = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) * 1024

    def age_s(self) -> float:
        """Seconds since it was started."""
        started = int(Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[19]) / _TICKS
        return float(Path("/proc/uptime").read_text().split()[0]) - started

    def private_bytes(self) -> int:
        """Memory that would be free without this process."""
        rollup = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        lines = (line.split() for line in rollup.splitlines())
        return sum(int(words[1]) for words in lines if words[0].startswith("Private_")) * 1024

    def _status(self, name: str) -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
        return 0


def descendants(root: int) -> list[Process]:
    """All processes below `root`, named by their command lines."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    found = []
    names = {root: "headrace up"}
    pending = [root]
    while pending:
        parent = pending.pop()
        for pid in sorted(child for child, of in parents.items() if of == parent):
            names[pid] = _name(pid, names[parent])
            found.append(Process(pid, names[pid]))
            pending.append(pid)
    return found


def _name(pid: int, parent: str) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    program = Path(words[0]).name
    if "gateway" in words:
        return "gateway"
    if "--worker-id" in words:
        return words[words.index("--worker-id") + 1]
    if program in ("etcd", "nats-server"):
        return program.removesuffix("-server")
    return parent if parent.startswith("engine of ") else f"engine of {parent}"


_given_ports: set[int] = set()


def free_port() -> int:
    """Below the ports that the system gives to whoever asks for any, and given once: it may be bound much later."""
    port = servers.free_port("a process", 0, but=_given_ports)
    _given_ports.add(port)
    return port


def allow_files(count: int) -> None:
    """For this process and what it starts.  Raises:  SystemExit if the system does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise SystemExit(f"{count} open files are needed and the limit is {hard}: ulimit -Hn {count}, as root")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))
