"""One request's conversation with a server, from the first byte to the end of its answer."""

import time
from collections.abc import Callable
from typing import Any

import msgspec

from planes.wire.errors import UNSUPPORTED, InvalidRequest
from workers.adopted.answer import END, Answer, Chunk, decode_chunk, events
from workers.adopted.examine import GENERATE
from workers.adopted.http import HttpClient, ServerGone
from workers.adopted.request import is_streamed
from workers.engine.base import EngineOutput, EngineRequest
from workers.structured import unusable

OnOutputs = Callable[[list[EngineOutput], dict[str, Any] | None], None]
"""Takes what came, and the server's `kv_transfer_params` if it said any."""


async def converse(
    client: HttpClient, request: EngineRequest, body: dict[str, Any], on_outputs: OnOutputs, *, skipped: int | None
) -> None:
    """Cancelling it closes the connection, and the server aborts.

    Args:  body: from `generate_body`.  skipped: a first token that the client has got already.
    Raises:  OtherToken, InvalidRequest, ServerGone, msgspec.DecodeError for what vLLM does not say.
    """
    answer = Answer(request, started_at=time.monotonic(), skipped=skipped)
    async with client.request("POST", GENERATE, msgspec.json.encode(body)) as response:
        if response.status != 200 or not is_streamed(request):
            whole = decode_chunk(await response.read())
            if response.status != 200 or whole.error is not None:
                raise _refusal(request, response.status, whole)
            outputs = answer.feed(whole, now=time.monotonic())
            on_outputs([*outputs, *answer.ended()], whole.kv_transfer_params)
            return
        async for event in events(response.body()):
            if event == END:
                on_outputs(answer.ended(), None)
                return
            chunk = decode_chunk(event)
            if chunk.error is not None:
                raise _refusal(request, None if answer.has_begun else chunk.error.code, chunk)
            on_outputs(answer.feed(chunk, now=time.monotonic()), None)


def _refusal(request: EngineRequest, status: int | str | None, whole: Chunk) -> Exception:
    """What an answer other than tokens stands for.

    status: None amid an answer.  vLLM says 400 of whatever goes wrong with a value, of its own, too; of the client's it
    names the parameter.
    """
    message, param = ("", None) if whole.error is None else (whole.error.message, whole.error.param)
    if status == 400 and request.sampling.structured is not None:
        return unusable(message)
    if status == 400:
        return InvalidRequest(message, param=param, code=None if param is None else UNSUPPORTED)
    return ServerGone(f"vLLM's answer is an error {status}: {message}")
