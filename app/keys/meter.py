"""What a request's parts have used, told to all that count it."""

from app.keys.ledger import Headers, Reservation


class RequestMeter:
    """Of one HTTP request, however many jobs it is served by. `app.serving.request.Meter`."""

    __slots__ = ("_reservation",)

    def __init__(self, reservation: Reservation | None) -> None:
        self._reservation = reservation

    def spent(self, *, prompt_tokens: int, completion_tokens: int) -> None:
        """More has been used; of a cancelled stream also after `close`."""
        if self._reservation is not None:
            self._reservation.spent(prompt_tokens + completion_tokens)

    def headers(self) -> Headers:
        """For the answer's head."""
        return [] if self._reservation is None else self._reservation.headers()

    def close(self) -> None:
        """The request has ended."""
        if self._reservation is not None:
            self._reservation.close()
