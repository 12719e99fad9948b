"""The relay's work between two engines: both legs of one request."""

import asyncio

import msgspec

from planes.wire.frames import DecodeLeg, PrefillLeg
from planes.wire.messages import HandoverMode


def tagged(leg):
    return msgspec.to_builtins(leg)


async def hand_over(pair, tokens, sampling=None, *, forward_first=False, name):
    """Returns the prefill leg's answer and the decode leg's."""
    mode, prefill, decode = pair
    leg = PrefillLeg(mode)
    if mode is HandoverMode.PUSH:
        decode_leg = DecodeLeg(source=prefill.endpoint)
        return await asyncio.gather(
            prefill.run(tokens, sampling, tagged(leg), name=name),
            decode.run(tokens, sampling, tagged(decode_leg), name=name),
        )
    first = await prefill.run(tokens, sampling, tagged(leg), name=name)
    resume = first.tokens if forward_first else []
    decode_leg = DecodeLeg(ticket=first.ticket)
    return first, await decode.run(tokens, sampling, tagged(decode_leg), resume=resume, name=name)
