"""One generating route: from an HTTP request to the relay that answers it, whatever the dialect."""

import structlog
from fastapi import Request
from starlette.routing import Route

from app.gateway import Gateway
from app.http.intake import Parse, read_request
from app.http.response import ErrorDialect, Streamed, StreamedResponse
from app.metrics import RequestSummary
from app.openai import errors as openai_errors
from app.openai.errors import code_of
from planes.wire.errors import HeadraceError, InvalidRequest

_log = structlog.get_logger()


def generating_route(
    gateway: Gateway, path: str, parse: Parse, *, summary: str, errors: ErrorDialect = openai_errors
) -> Route:
    """`POST path`.  parse: makes a request of its body.  summary: for the API's description."""

    async def generate(request: Request, response: StreamedResponse) -> None:
        await _serve(gateway, request, parse, response)

    generate.__doc__ = summary
    generate.__name__ = parse.__name__.removeprefix("parse_")
    streamed = Streamed(
        generate,
        max_unsent_bytes=gateway.settings.slow_client_bytes,
        on_cut_off=gateway.metrics.client_cut_off,
        errors=errors,
    )
    return Route(path, streamed, methods=["POST"])


def _why(exc: HeadraceError) -> dict[str, str | None]:
    """For the log: what is wrong with a request is told without its words, which are the client's."""
    return {"param": exc.param} if isinstance(exc, InvalidRequest) else {"reason": str(exc)}


async def _serve(gateway: Gateway, request: Request, parse: Parse, response: StreamedResponse) -> None:
    request_id = gateway.new_request_id()
    # A dictionary, because starlette's own headers are searched one by one for each that is not there.
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in request.scope["headers"]}
    try:
        tenant = gateway.keys.authenticate(headers)
        with gateway.keys.admitted(tenant) as slots:
            job = await read_request(
                gateway, request, headers=headers, tenant=tenant, request_id=request_id, parse=parse
            )
            slots.widen(job.sampling.n)
            if job.ignored:
                gateway.metrics.fields_ignored(len(job.ignored))
            await gateway.relay.run(job, response)
    except HeadraceError as exc:
        code = code_of(exc)
        gateway.metrics.ended(RequestSummary(model="", code=code))
        _log.info("request.finished", request_id=request_id, outcome=code, **_why(exc))
        response.fail(exc, [("x-request-id", request_id)])
    except Exception as exc:  # noqa: BLE001 - our own bug: it is logged, and the client gets an answer all the same
        _log.exception("request.bug", request_id=request_id)
        response.fail(exc, [("x-request-id", request_id)])
