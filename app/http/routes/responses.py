"""OpenAI's responses, made: `POST /v1/responses` and `/v1/responses/input_tokens`."""

import asyncio
import functools
from typing import Final

import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.gateway import Gateway
from app.http.conversation import Conversation, load_conversation, prepared_response
from app.http.intake import model_of, read_parsed
from app.http.prewarmed import PrewarmedResponse
from app.http.response import StreamedResponse
from app.http.routes.generate import Admitted, served_route
from app.http.routes.replies import json_reply, with_ignored
from app.http.routes.stored_responses import JSON, send_stream
from app.keys.tenant import Tenant
from app.openai.request_headers import overhead_header
from app.openai.responses.request import ResponseRequest, parse_response
from app.responses.keeping import KeepingResponse
from app.responses.store import NotKept, StoredResponse
from app.serving.request import GatewayRequest
from planes.keyed import ValueTooLarge
from planes.wire.errors import InvalidRequest
from planes.wire.response_object import response_object

_log = structlog.get_logger()

UNSTORED: Final = "x-headrace-unstored"
_KEEP_S: Final = 2.0
"""So long the end of an answer waits for the store."""


def response_routes(gateway: Gateway) -> list[Route]:
    """The routes of one gateway."""
    parse = functools.partial(parse_response, limits=gateway.settings.body_limits)

    async def create(admitted: Admitted, response: StreamedResponse) -> None:
        arrived_at = gateway.clock()
        with gateway.bodies.lease() as lease:
            asked, num_bytes = await read_parsed(gateway, admitted.request, parse, lease, arrived_at=arrived_at)
            unstored = await _unstored(gateway, asked)
            conversation = await load_conversation(
                gateway, asked, admitted.tenant, lease, num_bytes, is_stored=asked.is_stored and not unstored
            )
            job = await prepared_response(gateway, asked, conversation.parsed, admitted, arrived_at)
        (job,) = await admitted.metered(gateway, [job], num_slots=1)
        if job.ignored:
            gateway.metrics.fields_ignored(len(job.ignored))
        if asked.is_background:
            await _start(gateway, job, conversation, admitted)
            await _begun(gateway, job, response)
            return
        keep = None
        if asked.is_stored and not unstored:
            keep = functools.partial(_keep, gateway, job, conversation)
        headers = [(UNSTORED, unstored)] if unstored else []
        kept = KeepingResponse(response, job.format, headers=headers, keep=keep)
        await gateway.relay.run(job, kept if job.prewarm is None else PrewarmedResponse(kept, job.prewarm))
        await kept.settle()

    async def input_tokens(request: Request) -> Response:
        """How many tokens the prompt of such a request has."""
        tenant, arrived_at = gateway.keys.authenticate(request.headers), gateway.clock()
        with gateway.keys.admitted(tenant), gateway.bodies.lease() as lease:
            asked, num_bytes = await read_parsed(gateway, request, parse, lease, arrived_at=arrived_at)
            conversation = await load_conversation(gateway, asked, tenant, lease, num_bytes, is_stored=False)
            model = model_of(gateway, tenant, conversation.parsed.model)
            deadline = arrived_at + gateway.settings.request_timeout_s
            tokens = await gateway.preprocessor.tokenize(conversation.parsed, model, deadline=deadline)
        told = {"object": "response.input_tokens", "input_tokens": len(tokens)}
        return with_ignored(json_reply(told), asked.parsed.ignored, gateway.metrics)

    return [
        served_route(
            gateway, "/v1/responses", create, name="create_response", summary="Answer items (OpenAI's responses)."
        ),
        Route("/v1/responses/input_tokens", input_tokens, methods=["POST"]),
    ]


async def _unstored(gateway: Gateway, asked: ResponseRequest) -> str:
    """Why a response that should be kept cannot be: a code; empty if it can, or need not.

    Raises:  NotKept where it must be.
    """
    if not asked.is_stored:
        return ""
    try:
        await gateway.responses.check("'background'")
    except NotKept as exc:
        if asked.is_background:
            raise
        return exc.code
    return ""


async def _keep(gateway: Gateway, job: GatewayRequest, conversation: Conversation, body: bytes) -> None:
    record = StoredResponse(body, chain=conversation.chain, num_bytes=conversation.num_bytes + len(body))
    try:
        async with asyncio.timeout(_KEEP_S):
            await gateway.responses.save(job.tenant, job.format.response_id, record, conversation.items)
    except (NotKept, ValueTooLarge, TimeoutError) as exc:
        reason = str(exc) or f"not within {_KEEP_S} s"
        _log.warning("response.not_saved", response=job.format.response_id, reason=reason)


async def _start(gateway: Gateway, job: GatewayRequest, conversation: Conversation, admitted: Admitted) -> None:
    record = StoredResponse(
        response_object(job.format, "in_progress"),
        chain=conversation.chain,
        num_bytes=conversation.num_bytes,
        gateway=gateway.background.gateway,
        is_background=True,
        is_streamed=job.format.is_streaming,
    )
    try:
        await gateway.background.start(job, record, conversation.items, admitted.held.pop_all())
    except ValueTooLarge as exc:
        raise InvalidRequest(f"The response cannot be kept: {exc}.", param="input") from exc


async def _begun(gateway: Gateway, job: GatewayRequest, response: StreamedResponse) -> None:
    headers = [("x-request-id", str(job.request)), overhead_header(gateway.clock() - job.arrived_at)]
    if job.format.is_streaming:
        await send_stream(gateway, Tenant(job.tenant), job.format.response_id, -1, response, headers)
    else:
        response.whole(200, [JSON, *headers], response_object(job.format, "queued"))
