"""What the simulated model has been told to say."""

import msgspec

from planes.wire.frames import Sampling, StructuredOutput, unpack_tokens
from workers.sim.instance import NoInstance, instance_of
from workers.sim.tokens import VOCAB_SIZE
from workers.structured import unusable


def script_of(sampling: Sampling, *, vocab_size: int) -> tuple[int, ...] | None:
    """Tokens that it says before it ends, None if it may say what it likes.

    A script is said as it is; what must match something becomes the smallest text that does.  Raises:  InvalidRequest.
    """
    if sampling.script:
        return tuple(unpack_tokens(sampling.script))
    if sampling.structured is None:
        return None
    if vocab_size != VOCAB_SIZE:
        raise unusable(f"the simulated engine says bytes, and this model has {vocab_size} tokens, not {VOCAB_SIZE}")
    return tuple(_text(sampling.structured).encode())


def _text(structured: StructuredOutput) -> str:
    if structured.choice:
        return structured.choice[0]
    if not structured.json_schema:
        (name,) = (name for name in ("regex", "grammar", "structural_tag") if getattr(structured, name))
        raise unusable(f"the simulated engine makes up no text for a {name}; tell it by x-headrace-script what to say")
    try:
        return msgspec.json.encode(instance_of(msgspec.json.decode(structured.json_schema))).decode()
    except NoInstance as exc:
        raise unusable(str(exc)) from exc
