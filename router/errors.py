"""Why a request was turned away before any worker saw it. `code` is the label of metrics and the edge's key."""

from planes.wire.errors import Expired, Rejected


class QueueFull(Rejected):
    """The gateway's queue is at its limit."""

    code = "queue_full"

    def __init__(self, waiting: int, limit: int, *, retry_after_s: float) -> None:
        super().__init__(
            f"{waiting} requests are waiting and the limit is {limit}; try again in {retry_after_s:.0f} s",
            retry_after_s=retry_after_s,
        )


class SloMissed(Rejected):
    """No worker is predicted to give the first token in time."""

    code = "slo_missed"

    def __init__(self, predicted_ttft_s: float, slo_ttft_s: float, *, retry_after_s: float | None) -> None:
        """`retry_after_s`: None if waiting would not help, because the prompt alone takes longer."""
        advice = (
            "send a shorter prompt or allow more" if retry_after_s is None else f"try again in {retry_after_s:.1f} s"
        )
        super().__init__(
            f"first token predicted after {predicted_ttft_s:.4g} s and the limit is {slo_ttft_s:.4g} s; {advice}",
            retry_after_s=retry_after_s,
        )


class NoWorker(Rejected):
    """No healthy worker can serve the model."""

    code = "no_worker"

    def __init__(self, model: str, *, num_workers: int, card_digest: str = "") -> None:
        super().__init__(
            f"none of {num_workers} registered workers can decode for model {model!r}{_of_card(card_digest)}; start "
            "one or wait for one",
            retry_after_s=2.0,
        )


class ContextTooLong(NoWorker):
    """Workers serve the model, and none of them has room for so many tokens: the one that had is gone."""

    code = "context_too_long"

    def __init__(self, model: str, max_context: int, *, longest: int, num_workers: int) -> None:
        Rejected.__init__(
            self,
            f"prompt and answer may take {max_context} tokens, and the longest context among {num_workers} workers "
            f"that decode for model {model!r} is {longest}; ask for fewer, or wait for a worker with more",
            retry_after_s=2.0,
        )


class NoPair(Rejected):
    """The client wants a handover and the fleet has no two workers for it."""

    code = "no_pair"

    def __init__(self, model: str, *, num_workers: int, card_digest: str = "") -> None:
        super().__init__(
            f"none of {num_workers} registered workers can hand a KV cache of model {model!r}{_of_card(card_digest)} "
            "over to another; start a prefill and a decode worker with the same handover mode and KV layout, or do not "
            "insist on a handover",
            retry_after_s=2.0,
        )


class DeadlineExceeded(Expired):
    """The request's deadline passed while it waited in the gateway's queue."""

    code = "deadline"

    def __init__(self, waited_s: float) -> None:
        super().__init__(f"the request's deadline passed after {waited_s:.2f} s in the queue; allow it more time")


class DuplicateRequest(Rejected):
    """Two live requests must not share one id: a release would free the other's reservation."""

    code = "duplicate_request"

    def __init__(self, request: str) -> None:
        super().__init__(f"request id {request!r} is already queued or running; send a new id")


class PolicyFailed(Rejected):
    """The policy raised, or its answer cannot be used. What it raised is the cause: for the log, not for clients."""

    code = "policy_failed"

    def __init__(self, policy: str, cause: BaseException) -> None:
        super().__init__(f"the routing policy {policy!r} raised {type(cause).__name__}; the log tells more")
        self.__cause__ = cause


def _of_card(digest: str) -> str:
    return f" with card {digest[:8]}" if digest else ""
