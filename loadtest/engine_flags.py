"""How fast the simulated engines are: the flags that commands of the simulator share."""

import math
from dataclasses import dataclass
from typing import Annotated, Final

from cyclopts import Parameter
from cyclopts.validators import Number

from loadtest.like import LiveFleet, live_fleet
from loadtest.simulator.scenario import engine_facts
from planes.wire.errors import UnusableSetting
from planes.wire.messages import EngineFacts

AT_LEAST_1: Final = Parameter(validator=Number(gte=1))
POSITIVE: Final = Parameter(validator=Number(gt=0, lt=math.inf))
RATE: Final = Parameter(validator=Number(gte=0.001, lte=1_000_000))
"""Requests a second, or how many times as fast they come. Slower ones are years of the simulated time."""
_STEP_MS: Final = Parameter(validator=Number(gt=0, lte=60_000))


def check_unused(where: str, **settings: object) -> None:
    """Raises:  UnusableSetting for one that is given, though it counts only `where`."""
    for setting, value in settings.items():
        if value is not None:
            raise UnusableSetting(setting, value, f"it counts only {where}")


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFlags:
    """Hardware, or the live fleet whose hardware is meant.

    Args:
        prefill_tokens_per_s: prompt tokens that an engine computes in a second, attention left out
        step_ms: a decode step without sequences; what sequences and their context take is longer in proportion
        max_step_tokens: most tokens that one step computes
        max_batch: most sequences running at once
        shortest_first: engines compute the shortest prompt first, as vLLM with our plug-in does; else in turn
        link_gbps: each worker's network, Gbit/s
        blocks: KV blocks per worker
        block_size: tokens per block; for a trace it must divide 512
        like: URL of a gateway: workers and links as fast as it has learned that its own are; in place of the flags
            above. An API key for it is in HEADRACE_API_KEY
        like_model: whose workers, where that gateway serves several models
    """

    prefill_tokens_per_s: Annotated[float, POSITIVE] = 8000.0
    step_ms: Annotated[float, _STEP_MS] = 8.0
    max_step_tokens: Annotated[int, AT_LEAST_1] = 2048
    max_batch: Annotated[int, AT_LEAST_1] = 128
    shortest_first: bool = False
    link_gbps: Annotated[float, POSITIVE] = 100.0
    blocks: Annotated[int, AT_LEAST_1] = 1000
    block_size: Annotated[int, AT_LEAST_1] = 512
    like: str | None = None
    like_model: str | None = None

    def read(self) -> tuple[EngineFacts, LiveFleet | None]:
        """An engine, and the live fleet that it is like.  Raises:  UnusableSetting; what `live_fleet` raises."""
        if self.max_step_tokens < self.max_batch:
            raise UnusableSetting(
                "max_step_tokens", self.max_step_tokens, f"it must be at least --max-batch, {self.max_batch}"
            )
        if self.like is not None:
            live = live_fleet(self.like, self.like_model or "")
            return live.facts, live
        check_unused("with --like", like_model=self.like_model)
        facts = engine_facts(
            block_size=self.block_size,
            num_blocks=self.blocks,
            link_gbps=self.link_gbps,
            prefill_tokens_per_s=self.prefill_tokens_per_s,
            step_s=self.step_ms / 1000,
            max_batch=self.max_batch,
            max_step_tokens=self.max_step_tokens,
            is_shortest_first=self.shortest_first,
        )
        return facts, None


STANDARD: Final = EngineFlags()
