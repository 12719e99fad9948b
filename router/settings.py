"""What an operator may set about routing; changes while running through `Router.configure`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """Limits and time constants. Policies have none of their own to tune.

    Raises:  ValueError for a value outside its range.
    """

    queue_limit: int = 4096
    """Most requests that wait in the gateway, 1 or more."""
    slo_ttft_s: float | None = None
    """Refuse a request whose predicted time to first token is longer; None: never. A request's own limit wins."""
    aging: float = 4.0
    """Seconds of predicted prefill that one second of waiting makes up for, more than 0. Less lets short prompts pass
    long ones: beyond saturation more requests meet an SLO, and the longest wait for very long (`docs/routing.md`)."""
    promote_after_s: float = 30.0
    """After each such wait a request counts one priority class higher, more than 0."""
    quantum_tokens: int = 4096
    """Uncached tokens each tenant with waiting requests gets in one deficit round, 1 or more."""
    report_delay_s: float = 0.02
    """A dispatch older than this is taken to be counted in an arriving load report, 0 or more."""
    history: int = 1024
    """Most decisions kept for explain, 1 or more."""

    def __post_init__(self) -> None:
        for name in ("queue_limit", "quantum_tokens", "history"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} and must be at least 1")
        for name in ("aging", "promote_after_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)} and must be more than 0")
        if not self.report_delay_s >= 0:
            raise ValueError(f"report_delay_s is {self.report_delay_s} and must be at least 0")
        if self.slo_ttft_s is not None and not self.slo_ttft_s > 0:
            raise ValueError(f"slo_ttft_s is {self.slo_ttft_s} and must be more than 0, or absent")
