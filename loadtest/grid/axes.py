"""The axes of the grid, and the sample of its cells."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

AXES: Final[Mapping[str, Sequence[Any]]] = {
    "prefill": (2_000, 8_000, 30_000, 100_000),
    "step_ms": (2, 10, 30),
    "prompts": ("100", "1k", "8k", "60k", "mixed"),
    "answers": (1, 16, 300, 2_000),
    "arrivals": ("poisson", "bursts", "closed", "diurnal"),
    "sharing": ("none", "half", "95%", "sessions"),
    "fleet": ("both", "3+1", "2+2", "1+3", "slow both", "slow 2+2", "2 gateways both", "2 gateways 2+2"),
    "load": (0.5, 0.9, 1.2),
    "order": ("in turn", "shortest first"),
}
"""Axis → its values. prefill: prompt tokens that an engine computes in a second.  step_ms: of an empty decode step.
prompts, answers: tokens about which lengths are drawn.  load: share of the estimated capacity.  order: in which engines
compute prompts.
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """One value of every axis; `number` is its place in the sample."""

    number: int
    prefill: int
    step_ms: int
    prompts: str
    answers: int
    arrivals: str
    sharing: str
    fleet: str
    load: float
    order: str

    @property
    def values(self) -> dict[str, Any]:
        """Value by axis."""
        return {axis: value for axis, value in asdict(self).items() if axis in AXES}

    def __str__(self) -> str:
        return (
            f"{self.prefill / 1000:g}k/s, {self.step_ms} ms, {self.prompts} in, {self.answers} out, {self.arrivals}, "
            f"{self.sharing} shared, {self.fleet}, x{self.load:g}, {self.order}"
        )


def sample(count: int, seed: int) -> list[Cell]:
    """Cells 0 to `count` - 1: every value of an axis is in them equally often, or once more.

    Each axis deals its values shuffled, round after round, so a smaller sample is the beginning of a larger one.
    """
    dealt = {axis: _dealt(values, random.Random(f"{seed}/{axis}")) for axis, values in AXES.items()}
    return [Cell(number, **{axis: next(values) for axis, values in dealt.items()}) for number in range(count)]


def _dealt(values: Sequence[Any], rng: random.Random) -> Iterator[Any]:
    while True:
        yield from rng.sample(values, len(values))


def wanted(text: str) -> tuple[str, str]:
    """`axis=value` as typed.  Raises:  ValueError."""
    axis, _, value = text.partition("=")
    if axis not in AXES:
        raise ValueError(f"there is no axis {axis!r}; there are {', '.join(AXES)}")
    allowed = [str(each) for each in AXES[axis]]
    if value not in allowed:
        raise ValueError(f"{axis} has no value {value!r}; it has {', '.join(allowed)}")
    return axis, value
