"""`POST /v1/embeddings`: OpenAI's, for models whose workers run with `--task embed`."""

from dataclasses import replace
from functools import partial

import msgspec
from starlette.routing import Route

from app.gateway import Gateway
from app.http.embedded import MOST_AT_ONCE, run_embedded
from app.http.intake import prepared_request, read_parsed
from app.http.response import StreamedResponse
from app.http.routes.generate import Admitted, served_route
from app.openai.embeddings import ToEmbed, parse_embedding
from app.prompt.prepare import ModelEntry
from app.serving.request import GatewayRequest
from planes.wire.errors import InvalidRequest
from router.request import HandoverPreference


def embedding_route(gateway: Gateway) -> Route:
    """The route."""
    parse = partial(parse_embedding, limits=gateway.settings.body_limits)

    async def serve(admitted: Admitted, response: StreamedResponse) -> None:
        arrived_at = gateway.clock()
        with gateway.bodies.lease() as lease:
            asked, _ = await read_parsed(gateway, admitted.request, parse, lease, arrived_at=arrived_at)
            job = await prepared_request(
                gateway,
                asked.parsed,
                headers=admitted.headers,
                tenant=admitted.tenant,
                request_id=admitted.request_id,
                arrived_at=arrived_at,
            )
        _check_dimensions(asked, gateway.models.entry(job.model))
        whole = [_whole(each) for each in (job, *job.beside)]
        jobs = await admitted.metered(gateway, whole, num_slots=min(MOST_AT_ONCE, len(whole)))
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
    allowed = model.matryoshka_dimensions
    if allowed and asked.dimensions not in allowed:
        raise InvalidRequest(
            f"Invalid 'dimensions': {asked.dimensions} is none of {', '.join(map(str, sorted(allowed)))}, to which the "
            f"vectors of '{model.model}' can be cut.",
            param="dimensions",
        )
    if asked.dimensions > model.embedding_size:
        raise InvalidRequest(
            f"Invalid 'dimensions': {asked.dimensions} is out of range; the vectors of '{model.model}' have "
            f"{model.embedding_size}.",
            param="dimensions",
        )
