"""The router's recent decisions, in full, and what became of the requests."""

from collections import OrderedDict
from heapq import nsmallest
from itertools import islice
from operator import attrgetter

from planes.wire.messages import RequestId
from router.request import Candidate, Explanation

MAX_CANDIDATES = 32
_MAX_EARLIER = 8


def worth_keeping(candidates: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    """All, or the cheapest ones: with hundreds of workers the others would fill the memory."""
    if len(candidates) <= MAX_CANDIDATES:
        return candidates
    return tuple(nsmallest(MAX_CANDIDATES, candidates, key=attrgetter("total_s")))


class History:
    """The explanations of the last `limit` requests."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._explanations: OrderedDict[RequestId, Explanation] = OrderedDict()

    def __len__(self) -> int:
        return len(self._explanations)

    def add(self, explanation: Explanation) -> None:
        """An id that is known already is the same request's next attempt."""
        before = self._explanations.pop(explanation.request, None)
        if before is not None:
            explanation.attempt = before.attempt + 1
            explanation.earlier = (*before.earlier, before)[-_MAX_EARLIER:]
            before.earlier = ()
        self._explanations[explanation.request] = explanation
        self.trim(self.limit)

    def trim(self, limit: int) -> None:
        self.limit = limit
        while len(self._explanations) > limit:
            self._explanations.popitem(last=False)

    def ended(self, tenant: str | None, limit: int) -> list[Explanation]:
        """Of requests that have a timeline, the latest first.  tenant: whose; None: everybody's."""
        found = (
            each
            for each in reversed(self._explanations.values())
            if each.timeline is not None and tenant in (None, each.tenant)
        )
        return list(islice(found, limit))

    def get(self, request: RequestId) -> Explanation | None:
        return self._explanations.get(request)
