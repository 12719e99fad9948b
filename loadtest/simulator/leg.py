"""One leg of an exchange on its way through a simulated worker."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from app.serving.events import Event, LegId
from loadtest.simulator.records import Record
from planes.wire.blocks import Hashes
from planes.wire.frames import Leg
from planes.wire.messages import RequestId
from workers.sim.core import SimRequest
from workers.sim.request import leg_of


class Connection(Protocol):
    """What a worker needs of `gateway.SimulatedConnection`, a hop after it spoke."""

    def receive(self, leg: "SimulatedLeg", event: Event) -> None: ...
    def note(self, leg: "SimulatedLeg", tokens: list[int]) -> None: ...


@dataclass(slots=True, eq=False)
class SimulatedLeg:
    """What a Generate frame says, and how far the worker is. Tokens have a number and no ids.

    receive, note: take what a `WorkerStream` tells its exchange, and the tokens that it passes by there.
    """

    id: LegId
    name: RequestId
    kind: Leg
    prompt_tokens: int
    max_tokens: int
    num_resumed: int
    """Tokens that the client has already."""
    blocks: Hashes
    """Names of the input's full blocks, and maybe of more."""
    record: Record
    connection: Connection
    receive: Callable[[Event], None]
    note: Callable[[list[int]], None]
    num_tokens: int = 0
    """Drawn here."""
    num_told: int = 0
    """Of these, told to the gateway."""

    def sim_request(self, block_size: int) -> SimRequest:
        num_input = self.prompt_tokens + self.num_resumed
        leg, remote_tokens = leg_of(self.kind, num_input)
        return SimRequest(
            request=self.name,
            prompt_tokens=self.prompt_tokens,
            names=self.blocks[: num_input // block_size],
            max_tokens=self.max_tokens,
            resume_tokens=self.num_resumed,
            leg=leg,
            remote_tokens=remote_tokens,
        )

    def untold(self) -> list[int]:
        """Tokens to tell now: all that were not told before."""
        count, self.num_told = self.num_tokens - self.num_told, self.num_tokens
        return [0] * count
