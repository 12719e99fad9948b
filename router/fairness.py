"""How evenly tenants were served, whatever the policy and wherever they waited.

For each window of time, and of those who ask for one model in one priority class: what each tenant got over what it
would have got if the same tokens had been shared evenly, nobody getting more than it asked for (max-min). Of these
ratios Jain's index, (sum x)^2 / (n * sum x^2): 1 if all are equal, 1 / n if one of n got everything (Jain, Chiu, Hawe:
A quantitative measure of fairness and discrimination, DEC TR-301, 1984). The shortfall is the most that one lacked, in
tokens: what a fair queue bounds by about the longest request (Sheng et al.: Fairness in serving large language models,
OSDI 2024).

Tokens are the prompts' uncached ones, which the queue shares out, and count as got when they have been computed. Of
what comes in a window and is not served in it nothing counts yet. So a wait is seen that outlasts a window, and a
prompt that is computed for longer than that looks like one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from planes.wire.messages import RequestId

WINDOW_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Fairness:
    """Of the last window; of several models and classes the worst."""

    index: float = 1.0
    """Jain's; 1 where fewer than two tenants asked."""
    shortfall_tokens: float = 0.0
    num_windows: int = 0
    """In which several tenants asked, since the start …"""
    mean_index: float = 1.0
    """… and the mean of theirs."""


class _Group(NamedTuple):
    model: str
    priority: int


@dataclass(slots=True)
class _Tenant:
    """Tokens. due: asked for before this window began, or served in it.  waiting: asked for and not yet served."""

    due: int = 0
    served: int = 0
    waiting: int = 0


@dataclass(slots=True)
class _Asked:
    group: _Group
    tenant: str
    tokens: int
    window: int


@dataclass(slots=True)
class ServiceMeter:
    """Of one gateway. Each call O(1), a window's end O(tenants)."""

    window_s: float = WINDOW_S
    _ends_at: float | None = None
    _window: int = 0
    _asked: dict[RequestId, _Asked] = field(default_factory=dict)
    _groups: dict[_Group, dict[str, _Tenant]] = field(default_factory=dict)
    _last: Fairness = Fairness()
    _sum: float = 0.0

    def asks(
        self, request: RequestId, tenant: str, uncached_tokens: int, *, model: str, priority: int, now: float
    ) -> None:
        self.advance(now)
        group = _Group(model, priority)
        tenants = self._groups.setdefault(group, {})
        tenants.setdefault(tenant, _Tenant()).waiting += uncached_tokens
        self._asked[request] = _Asked(group, tenant, uncached_tokens, self._window)

    def served(self, request: RequestId, *, now: float) -> None:
        """Its prompt has been computed; nothing happens if that was known."""
        self.advance(now)
        asked = self._asked.pop(request, None)
        if asked is None:
            return
        tenant = self._groups[asked.group][asked.tenant]
        tenant.waiting -= asked.tokens
        tenant.served += asked.tokens
        if asked.window == self._window:
            tenant.due += asked.tokens

    def gave_up(self, request: RequestId, *, now: float) -> None:
        """It will not be served; nothing happens if it was."""
        self.advance(now)
        asked = self._asked.pop(request, None)
        if asked is None:
            return
        tenant = self._groups[asked.group][asked.tenant]
        tenant.waiting -= asked.tokens
        if asked.window != self._window:
            tenant.due -= asked.tokens

    def fairness(self, *, now: float) -> Fairness:
        self.advance(now)
        return self._last

    def advance(self, now: float) -> None:
        """End the windows that have passed: the first with all that happened, any other with nothing."""
        if self._ends_at is None:
            self._ends_at = now + self.window_s
        if now < self._ends_at:
            return
        self._end_window()
        passed = (now - self._ends_at) // self.window_s
        if passed:
            self._end_window()
        self._ends_at += (passed + 1) * self.window_s

    def _end_window(self) -> None:
        found = [
            fairness_of([(each.served, each.due) for each in tenants.values() if each.due])
            for tenants in self._groups.values()
        ]
        contended = [each for each in found if each is not None]
        if contended:
            index = min(index for index, _ in contended)
            self._sum += index
            count = self._last.num_windows + 1
            self._last = Fairness(index, max(lack for _, lack in contended), count, self._sum / count)
        else:
            self._last = Fairness(1.0, 0.0, self._last.num_windows, self._last.mean_index)
        self._window += 1
        for group, tenants in list(self._groups.items()):
            left = {name: _Tenant(each.waiting, 0, each.waiting) for name, each in tenants.items() if each.waiting}
            if left:
                self._groups[group] = left
            else:
                del self._groups[group]


def fairness_of(tenants: Sequence[tuple[int, int]]) -> tuple[float, float] | None:
    """Of `(tokens got, tokens asked for)`: Jain's index, and the largest shortfall in tokens.

    None if there is nothing to compare: fewer than two tenants, or nothing was given.
    """
    total = sum(got for got, _ in tenants)
    if len(tenants) < 2 or not total:
        return None
    fair = even_shares(total, [asked for _, asked in tenants])
    ratios = [got / share for (got, _), share in zip(tenants, fair, strict=True)]
    lack = max(share - got for (got, _), share in zip(tenants, fair, strict=True))
    return jain(ratios), max(0.0, lack)


def even_shares(total: float, asked: Sequence[int]) -> list[float]:
    """Parts of `total`, in the order of `asked`: equal ones, but nobody gets more than it asked for (max-min)."""
    shares, left = [0.0] * len(asked), total
    for number, index in enumerate(sorted(range(len(asked)), key=asked.__getitem__)):
        shares[index] = min(asked[index], left / (len(asked) - number))
        left -= shares[index]
    return shares


def jain(ratios: Iterable[float]) -> float:
    """1 / n to 1. At least one ratio must be more than 0."""
    values = list(ratios)
    return sum(values) ** 2 / (len(values) * sum((value * value for value in values), start=0.0))
