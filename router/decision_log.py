"""The router's recent decisions, in full, and what became of the requests."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import islice
from operator import attrgetter
from typing import Protocol, TypeVar

from planes.wire.messages import RequestId
from router.request import Explanation
from router.timeline import Timeline

_MAX_CANDIDATES = 32
_MAX_EARLIER = 8


class _Priced(Protocol):
    @property
    def total_s(self) -> float: ...


_Option = TypeVar("_Option", bound=_Priced)


def worth_keeping(options: Sequence[_Option]) -> tuple[_Option, ...]:
    """All, or the cheapest ones: with hundreds of workers the others would fill the memory."""
    if len(options) <= _MAX_CANDIDATES:
        return tuple(options)
    most_s = sorted([option.total_s for option in options])[_MAX_CANDIDATES - 1]  # half of what `nsmallest` takes
    near = [option for option in options if option.total_s <= most_s]
    return tuple(sorted(near, key=attrgetter("total_s"))[:_MAX_CANDIDATES])


class History:
    """The explanations of the last `limit` requests."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._explanations: OrderedDict[RequestId, Explanation] = OrderedDict()
        self._timelines: dict[RequestId, Callable[[], Timeline]] = {}
        """Of those that have ended since anybody looked: few are ever asked about."""

    def __len__(self) -> int:
        return len(self._explanations)

    def add(self, explanation: Explanation) -> None:
        """An id that is known already is the same request's next attempt."""
        before = self._explanations.pop(explanation.request, None)
        if before is not None:
            self._complete(before)
            explanation.attempt = before.attempt + 1
            explanation.earlier = (*before.earlier, before)[-_MAX_EARLIER:]
            before.earlier = ()
        self._explanations[explanation.request] = explanation
        self.trim(self.limit)

    def trim(self, limit: int) -> None:
        self.limit = limit
        while len(self._explanations) > limit:
            request, _ = self._explanations.popitem(last=False)
            self._timelines.pop(request, None)

    def close(self, request: RequestId, timeline: Callable[[], Timeline]) -> None:
        """The request has ended. One that is not remembered (any more) is nobody's question."""
        if request in self._explanations:
            self._timelines[request] = timeline

    def ended(self, tenant: str | None, limit: int) -> list[Explanation]:
        """Of requests that have a timeline, the latest first.  tenant: whose; None: everybody's."""
        of_tenant = (each for each in reversed(self._explanations.values()) if tenant in (None, each.tenant))
        found = (each for each in map(self._complete, of_tenant) if each.timeline is not None)
        return list(islice(found, limit))

    def get(self, request: RequestId) -> Explanation | None:
        explanation = self._explanations.get(request)
        return None if explanation is None else self._complete(explanation)

    def _complete(self, explanation: Explanation) -> Explanation:
        timeline = self._timelines.pop(explanation.request, None)
        if timeline is not None:
            explanation.timeline = timeline()
        return explanation
