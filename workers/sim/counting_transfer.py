"""Handover without NIXL: bytes of KV cache are counted, not moved."""

from collections.abc import Sequence

import numpy as np

from planes.wire.errors import InvalidRequest
from planes.wire.messages import HandoverEndpoint
from workers.sim.handover import Handovers, Offer
from workers.sim.side_channel import Announcement, Caller, HandoverFailed, Taken, Written, answer_from, asking


class CountingTransfer(Handovers):
    """The words that say what the blocks hold travel in tickets and on the side channel, the bytes do not."""

    def _describe(self, request: str, blocks: Sequence[int]) -> Offer:
        words = self._pool.read(blocks).tobytes()
        packed = np.asarray(blocks, dtype="<u4").tobytes()
        return Offer(*self._address(), request, packed, self._pool.bytes_per_block, words=words)

    def _check_offer(self, offer: Offer) -> None:
        if len(offer.words) != 8 * offer.num_blocks:
            raise InvalidRequest(
                f"the ticket has {len(offer.words)} bytes of words for {offer.num_blocks} blocks; the prefill worker "
                f"hands over with NIXL, which is not installed here",
                param="ticket",
            )

    async def _pull(self, offer: Offer, blocks: Sequence[int]) -> None:
        async with asking(offer.host, offer.port, Taken(offer.engine_id, offer.request)) as reader:
            await answer_from(reader)
        words = np.frombuffer(offer.words, dtype="<u8")
        self._pool.write(blocks, words[len(words) - len(blocks) :])

    def _write(
        self,
        request: str,
        blocks: list[int],
        announcement: Announcement,  # noqa: ARG002 - the words go back where it came from
        caller: Caller,
    ) -> None:
        caller.answer(Written(self._pool.read(blocks).tobytes()))
        self._done(request)

    async def _await_push(self, source: HandoverEndpoint, question: Announcement) -> None:
        blocks = np.frombuffer(question.blocks, dtype="<u4")
        async with asking(source.host, source.port, question) as reader:
            words = np.frombuffer((await answer_from(reader)).words, dtype="<u8")
        if len(words) != len(blocks):
            raise HandoverFailed(f"{len(words)} of {len(blocks)} blocks came from engine {source.engine_id}")
        self._pool.write(blocks.tolist(), words)
