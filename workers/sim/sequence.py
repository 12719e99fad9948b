"""One request inside the simulated engine's core: its blocks, its progress, its token chain."""

from enum import Enum, auto

import numpy as np

from planes.wire.blocks import Hashes
from planes.wire.frames import FinishReason
from workers.sim.request import SimLeg, SimReport, SimRequest
from workers.sim.tokens import EOS, advance, advance_all, draw, is_end


class State(Enum):
    """Where a sequence is.

    | state     | holds blocks | moves on when                                                                |
    |-----------|--------------|------------------------------------------------------------------------------|
    | WAITING   | no           | admitted → RUNNING, or a decode leg → REMOTE                                 |
    | REMOTE    | yes          | its KV cache arrived → ARRIVED                                               |
    | ARRIVED   | yes          | the batch has room → RUNNING                                                 |
    | RUNNING   | yes          | last token → GONE (a prefill leg leaves a lease); out of blocks → WAITING    |
    | GONE      | no           |                                                                              |
    """

    WAITING = auto()
    REMOTE = auto()
    ARRIVED = auto()
    RUNNING = auto()
    GONE = auto()


class Sequence:
    """Mutable, owned by one core. Tokens are counted, and kept only back to the last full block."""

    __slots__ = (
        "arrived_at",
        "blocks",
        "cached_tokens",
        "capacity",
        "chain",
        "computed",
        "corruption",
        "entropy",
        "first_token_at",
        "handover_blocks",
        "has_arrived",
        "has_ended_early",
        "has_stops",
        "has_tokens",
        "is_scripted",
        "key",
        "left",
        "length",
        "names",
        "needs_remote",
        "num_preemptions",
        "order",
        "request",
        "scheduled_at",
        "state",
        "submitted_at",
        "tail",
    )

    def __init__(self, request: SimRequest, order: int, *, left: int, key: int, now: float) -> None:
        self.request = request
        self.order = order
        self.key = key
        self.left = left
        self.length = request.prompt_tokens + request.resume_tokens
        self.computed = 0
        self.names: list[int] = request.names.tolist()
        self.blocks: list[int] = []
        self.capacity = 0
        self.state = State.WAITING
        self.needs_remote = request.leg is SimLeg.DECODE
        self.has_arrived = False
        self.has_ended_early = False
        self.has_tokens = request.tokens is not None
        self.is_scripted = request.script is not None
        self.has_stops = bool(request.stop_tokens or request.natural_tokens or self.is_scripted)
        self.tail: list[int] = []
        self.chain: int | None = None
        self.corruption = 0
        self.entropy = 0
        self.cached_tokens = -1
        self.handover_blocks = 0
        self.num_preemptions = 0
        self.submitted_at = self.arrived_at = now
        self.scheduled_at = self.first_token_at = -1.0

    def filled_by(self, tokens: int, block_size: int) -> tuple[list[int], list[int]]:
        """Blocks that computing so many more tokens of the input fills, and their names, as far as it has names."""
        first, end = self.computed // block_size, (self.computed + tokens) // block_size
        names = self.names[first:end]
        return self.blocks[first : first + len(names)], names

    def state_at(self, count: int, block_size: int) -> int:
        """The token chain's state after the first `count` input tokens."""
        full = count // block_size
        if self.request.tokens is None:
            raise ValueError("a sequence without token ids has no token chain")
        base = self.names[full - 1] if full else self.request.root
        return advance_all(base, self.request.tokens[full * block_size : count].tolist())

    def start_chain(self, block_size: int) -> None:
        """The input is computed: be ready to draw."""
        tokens = self.request.tokens
        if tokens is not None:
            self.chain = self.state_at(self.length, block_size) ^ self.corruption
            self.tail = tokens[self.length // block_size * block_size :].tolist()

    def next_token(self) -> tuple[int]:
        """Draw the next token and go on behind it."""
        chain = self.chain or 0
        self.entropy, tokens = draw(chain, self.key)
        if self.has_stops:
            tokens = self._scripted() if self.is_scripted else tokens
            if self._ends_naturally(self.entropy):
                tokens = (EOS,)
        self.chain = advance(chain, tokens[0])
        self.tail.append(tokens[0])
        return tokens

    def _scripted(self) -> tuple[int]:
        """The token being drawn, which is counted already."""
        script, place = self.request.script or (), self.length - self.request.prompt_tokens - 1
        return (script[place] if place < len(script) else EOS,)

    def _ends_naturally(self, bits: int) -> bool:
        mean = self.request.natural_tokens
        return bool(mean) and not self.is_scripted and not self._is_too_short(1) and is_end(bits, mean)

    def _is_too_short(self, more: int) -> bool:
        return self.length + more - self.request.prompt_tokens < self.request.min_tokens

    def finish_after(self, token: int) -> FinishReason | None:
        """Why the sequence ends with this token, just drawn and counted; None if it goes on."""
        if self.has_stops and not self._is_too_short(0):
            is_eos = token == EOS and (self.request.natural_tokens or self.is_scripted)
            if is_eos or token in self.request.stop_tokens:
                return FinishReason.STOP
        return None if self.left else FinishReason.LENGTH

    def named(self, name: int) -> None:
        """The tokens drawn so far fill a block, which got this name."""
        self.names.append(name)
        self.tail = []
        self.chain = name ^ self.corruption

    def report(self, now: float) -> SimReport:
        is_handover = self.request.leg is SimLeg.DECODE
        return SimReport(
            cached_tokens=max(0, self.cached_tokens),
            queue_s=self.scheduled_at - self.arrived_at,
            prefill_s=0.0 if is_handover else self.first_token_at - self.scheduled_at,
            decode_s=now - self.first_token_at,
            handover_s=self.arrived_at - self.submitted_at if is_handover else 0.0,
            handover_blocks=self.handover_blocks,
            num_preemptions=self.num_preemptions,
        )


def corruption(words: Hashes, expected: Hashes) -> int:
    """0 if the KV bytes are what they should be, else a number that depends on which are not and how."""
    weights = 2 * np.arange(len(words), dtype=np.uint64) + np.uint64(1)
    return int(((words ^ expected) * weights).sum(dtype=np.uint64))
