"""`POST /v1/embeddings`: OpenAI's, for models whose workers run with `--task embed`."""

from dataclasses import replace

import msgspec
from starlette.routing import Route

from app.gateway import Gateway
from app.http.body import read_body
from app.http.embedded import MOST_AT_ONCE, run_embedded
from app.http.intake import max_body_bytes, prepared_request
from app.http.response import StreamedResponse
from app.http.routes.generate import Admitted, served_route
from app.openai.embeddings import ToEmbed, parse_embedding
from app.openai.schema import Limits
from app.prompt.prepare import ModelEntry
from app.serving.request import GatewayRequest
from planes.wire.errors import InvalidRequest
from router.request import HandoverPreference


def embedding_route(gateway: Gateway) -> Route:
    """The route."""
    limits = Limits(has_strict_fields=gateway.settings.strict_fields)

    async def serve(admitted: Admitted, response: StreamedResponse) -> None:
        arrived_at = gateway.clock()
        with gateway.bodies.lease() as lease:
            body = await read_body(admitted.request, max_body_bytes(gateway), lease)
            deadline = arrived_at + gateway.settings.request_timeout_s
            asked = await gateway.preprocessor.parse(
                lambda body: parse_embedding(body, limits), body, deadline=deadline
            )
            job = await prepared_request(
                gateway,
                asked.parsed,
                headers=admitted.headers,
                tenant=admitted.tenant,
                request_id=admitted.request_id,
                arrived_at=arrived_at,
            )
        _check_dimensions(asked, gateway.models.entry(job.model))
        jobs = [_whole(each) for each in (job, *job.beside)]
        admitted.slots.widen(min(MOST_AT_ONCE, len(jobs)))
        if job.ignored:
            gateway.metrics.fields_ignored(len(job.ignored))
        await run_embedded(gateway.relay, jobs, asked, response)

    return served_route(
        gateway, "/v1/embeddings", serve, name="embeddings", summary="Vectors of texts (OpenAI's embeddings)."
    )


def _whole(job: GatewayRequest) -> GatewayRequest:
    """By one worker: there is no KV cache to hand over."""
    options = replace(job.options, handover=HandoverPreference.NEVER)
    return msgspec.structs.replace(job, beside=(), options=options)


def _check_dimensions(asked: ToEmbed, model: ModelEntry) -> None:
    if asked.dimensions is None or asked.dimensions == model.embedding_size:
        return
    if not model.is_matryoshka:
        raise InvalidRequest(
            f"Invalid 'dimensions': the vectors of '{model.model}' have {model.embedding_size}, which cannot be cut.",
            param="dimensions",
        )
    if asked.dimensions > model.embedding_size:
        raise InvalidRequest(
            f"Invalid 'dimensions': {asked.dimensions} is out of range; the vectors of '{model.model}' have "
            f"{model.embedding_size}.",
            param="dimensions",
        )
