"""What an operator may set about routing; changes while running through `Router.configure`."""

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """Limits and time constants, each with its meaning. Policies have none of their own to tune.

    Raises:  ValueError for a value outside its range.
    """

    queue_limit: Annotated[int, "Most requests that wait in the gateway, 1 or more."] = 4096
    slo_ttft_s: Annotated[
        float | None,
        "Refuse a request whose predicted time to first token is longer; none: never. A request's own limit wins.",
    ] = None
    aging: Annotated[
        float,
        "Seconds of predicted prefill that one second of waiting makes up for, more than 0. Less lets short prompts "
        "pass long ones: beyond saturation more requests meet an SLO, and the longest wait for very long "
        "(docs/routing.md).",
    ] = 4.0
    promote_after_s: Annotated[
        float, "After each such wait a request counts one priority class higher, more than 0."
    ] = 30.0
    quantum_tokens: Annotated[
        int, "Uncached tokens each tenant with waiting requests gets in one deficit round, 1 or more."
    ] = 4096
    report_delay_s: Annotated[
        float, "A dispatch older than this is taken to be counted in an arriving load report, 0 or more."
    ] = 0.02
    history: Annotated[int, "Most decisions kept for explain, 1 or more."] = 1024

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
