"""Metrics of several processes as those of one.

| kind                                | all processes'                                              |
|-------------------------------------|-------------------------------------------------------------|
| counter, histogram                  | added                                                       |
| gauge of what a process has         | added (`_ADDED`)                                            |
| gauge of what all of them look at   | the greatest: they differ for a moment only (`_GREATEST`)    |
| any other gauge                     | each one's, told apart by the label `process`               |

A counter must not go back when a process dies. So whatever has been told of counters is kept in a file first, and the
process that takes the place goes on from there; what was counted and never told is lost, as with any process.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric

_ADDED: Final = frozenset({"headrace_requests_waiting", "headrace_requests_bound", "headrace_shadow_faster_seconds"})
_GREATEST: Final = frozenset(
    {
        "headrace_oldest_wait_seconds",
        "headrace_index_blocks",
        "headrace_index_pure_python",
        "headrace_inexact_workers",
        "headrace_workers",
        "headrace_workers_refused",
        "headrace_worker_blocks",
        "headrace_worker_running",
        "headrace_worker_waiting",
        "headrace_model_cards",
        "headrace_model_layouts",
        "headrace_config_refused",
        "headrace_prefill_queue_depth",
        "headrace_prefill_queue_in_progress",
        "headrace_prefill_queue_oldest_seconds",
        "headrace_autorole_elected",
    }
)
_COUNTING: Final = frozenset({"counter", "histogram"})


class Sample(msgspec.Struct, frozen=True, array_like=True):
    name: str
    labels: dict[str, str]
    value: float


class Family(msgspec.Struct, frozen=True, array_like=True):
    """All samples of one metric. kind: Prometheus's, such as `counter`."""

    name: str
    help: str
    kind: str
    samples: list[Sample]


_FAMILIES = msgspec.msgpack.Decoder(list[Family])


def families(registry: CollectorRegistry) -> list[Family]:
    """What is in a registry now."""
    return [
        Family(
            each.name, each.documentation, each.type, [Sample(s.name, s.labels, float(s.value)) for s in each.samples]
        )
        for each in registry.collect()
    ]


def added_up(parts: Iterable[tuple[int, list[Family]]]) -> list[Family]:
    """The parts of processes, by their numbers, as one. A process may come in several."""
    heads: dict[str, Family] = {}
    totals: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for process, part in parts:
        for family in part:
            heads.setdefault(family.name, family)
            values = totals.setdefault(family.name, {})
            own = _own_label(family, process)
            for sample in family.samples:
                key = sample.name, (*sample.labels.items(), *own)
                before = values.get(key)
                values[key] = sample.value if before is None else _merged(family, sample, before)
    return [
        Family(head.name, head.help, head.kind, [Sample(n, dict(labels), v) for (n, labels), v in totals[name].items()])
        for name, head in heads.items()
    ]


def _own_label(family: Family, process: int) -> tuple[tuple[str, str], ...]:
    is_shared = family.kind in _COUNTING or family.name in _ADDED or family.name in _GREATEST
    return () if is_shared else (("process", str(process)),)


def _merged(family: Family, sample: Sample, before: float) -> float:
    if family.kind in _COUNTING and sample.name.endswith("_created"):
        return min(before, sample.value)
    return max(before, sample.value) if family.name in _GREATEST else before + sample.value


def exposition(found: list[Family]) -> bytes:
    """The text that Prometheus scrapes."""
    return generate_latest(_Collected(found))  # all that it asks for is `collect`


class _Collected:
    def __init__(self, found: list[Family]) -> None:
        self._found = found

    def collect(self) -> Iterator[Metric]:
        for family in self._found:
            metric = Metric(family.name, family.help, family.kind)
            for sample in family.samples:
                metric.add_sample(sample.name, sample.labels, sample.value)
            yield metric


def encoded(found: list[Family]) -> bytes:
    return msgspec.msgpack.encode(found)


def decoded(data: bytes) -> list[Family]:
    return _FAMILIES.decode(data)


class Kept:
    """A process's counters, as they were told last, on disk. path: the same for those that follow each other."""

    def __init__(self, path: Path, process: int) -> None:
        self._path = path
        self._process = process
        self._before = kept(path)

    def told(self, own: list[Family]) -> list[Family]:
        """`own` and those of the processes before; kept, so it may be told."""
        found = added_up([(self._process, own), (self._process, self._before)])
        counted = [family for family in found if family.kind in _COUNTING]
        draft = self._path.with_suffix(".new")
        with contextlib.suppress(OSError):  # a disk that is full: told all the same, and kept the next time
            draft.write_bytes(encoded(counted))
            draft.replace(self._path)
        # Gauges as they are: whoever adds up knows whose they are.
        return [*counted, *(family for family in own if family.kind not in _COUNTING)]


def kept(path: Path) -> list[Family]:
    """What a process that does not answer has told last of its counters."""
    with contextlib.suppress(FileNotFoundError):
        return decoded(path.read_bytes())
    return []
