"""What a request's parts have used, told to all that count it."""

from app.keys.ledger import Headers, Reservation
from app.keys.tenant import Tenant
from app.keys.usage import Counts, UsageBook


class RequestMeter:
    """Of one HTTP request, however many jobs it is served by. `app.serving.request.Meter`."""

    __slots__ = ("_model", "_reservation", "_tenant", "_usage")

    def __init__(self, reservation: Reservation | None, usage: UsageBook, tenant: Tenant, model: str) -> None:
        self._reservation = reservation
        self._usage, self._tenant, self._model = usage, tenant, model
        usage.add(tenant, model, Counts(requests=1))

    def spent(self, *, prompt_tokens: int, completion_tokens: int) -> None:
        """More has been used; of a cancelled stream also after `close`."""
        self._usage.add(self._tenant, self._model, Counts(0, prompt_tokens, completion_tokens))
        if self._reservation is not None:
            self._reservation.spent(prompt_tokens + completion_tokens)

    def headers(self) -> Headers:
        """For the answer's head."""
        return [] if self._reservation is None else self._reservation.headers()

    def close(self) -> None:
        """The request has ended."""
        if self._reservation is not None:
            self._reservation.close()
