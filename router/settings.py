"""What an operator may set about routing; changes while running through `Router.configure`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import msgspec


class ModelSlos(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is other for one model than for all; None: nothing is."""

    slo_ttft_s: Annotated[float | None, "`slo_ttft_s` of one model, in place of the one for all."] = None
    slo_itl_s: Annotated[float | None, "`slo_itl_s` of one model, in place of the one for all."] = None


_LIKE_ALL = ModelSlos()


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """Limits and time constants, each with its meaning. Policies have none of their own to tune.

    Raises:  ValueError for a value outside its range.
    """

    queue_limit: Annotated[int, "Most requests that wait in the gateway, 1 or more."] = 4096
    slo_ttft_s: Annotated[
        float | None,
        "By when, in seconds, a first token shall come: routing keeps to it where it can. None: no such limit. "
        "A request's own goes first, then its key's, then its model's.",
    ] = None
    slo_itl_s: Annotated[
        float | None,
        "Mean seconds between a stream's tokens that routing keeps to, before all else. None: streams on workers kept "
        "for decoding never stand still for long. A request's own goes first, then its key's, then its model's.",
    ] = None
    models: Annotated[Mapping[str, ModelSlos], "SLOs of single models, by name."] = field(default_factory=dict)
    refuse_late: Annotated[
        bool, "Refuse a request whose first token is predicted to come later than its `slo_ttft_s`; else serve it late."
    ] = True
    late_s: Annotated[
        float,
        "A request that can no longer be in time counts as if it were due so much later, 0 or more: those that can be "
        "in time go first. Room to decode it leaves to them for so long, and as long as its answer may take.",
    ] = 60.0
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
        for name in ("report_delay_s", "late_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)} and must be at least 0")
        for prefix, slos in (("", self), *((f"models.{model}.", slos) for model, slos in self.models.items())):
            for name in ModelSlos.__struct_fields__:
                value = getattr(slos, name)
                if value is not None and not value > 0:
                    raise ValueError(f"{prefix}{name} is {value} and must be more than 0, or absent")

    def slos_of(self, model: str) -> ModelSlos:
        """What is said of this model alone."""
        return self.models.get(model, _LIKE_ALL)
