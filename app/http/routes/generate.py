"""One generating route: from an HTTP request to the relay that answers it, whatever the dialect."""

import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec
import structlog
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Scope

from app.auth import TenantSlots
from app.gateway import Gateway
from app.http.intake import Parse, max_body_bytes, read_request, request_at_once
from app.http.merged import run_merged
from app.http.prewarmed import PrewarmedResponse
from app.http.response import AtOnce, ErrorDialect, Leave, Streamed, StreamedResponse
from app.keys.ledger import is_limited
from app.keys.meter import RequestMeter
from app.keys.tenant import ANYBODY, Tenant
from app.metrics import RequestSummary
from app.openai import errors as openai_errors
from app.openai.errors import code_of
from app.openai.request_headers import overhead_header
from app.openai.schema import ParsedRequest
from app.serving.request import GatewayRequest
from planes.wire.errors import HeadraceError, InvalidRequest
from planes.wire.messages import RequestId

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request whose key has been looked up. headers: by lower-case names.  held: what is given back at its end."""

    request: Request
    headers: Mapping[str, str]
    tenant: Tenant
    request_id: RequestId
    slots: TenantSlots
    held: contextlib.ExitStack

    async def metered(
        self, gateway: Gateway, jobs: Sequence[GatewayRequest], *, num_slots: int
    ) -> list[GatewayRequest]:
        """The same jobs, let in within the key's limits; what they use is counted.

        Args:  num_slots: sequences of all at once.  Raises:  TooManyConcurrent, TooManyChoices, RateLimited, …
        """
        self.slots.widen(num_slots)
        prompt_tokens = sum([len(job.prompt) for job in jobs])
        answer_tokens = sum([job.answer_tokens for job in jobs])
        reservation = await gateway.ledger.reserve(
            self.tenant, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens, slots=num_slots
        )
        meter = RequestMeter(reservation, gateway.usage, self.tenant, jobs[0].format.model)
        self.held.callback(meter.close)
        return [msgspec.structs.replace(job, meter=meter) for job in jobs]


Serve = Callable[[Admitted, StreamedResponse], Awaitable[None]]


def generating_route(
    gateway: Gateway,
    path: str,
    parse: Callable[..., ParsedRequest],
    *,
    summary: str,
    errors: ErrorDialect = openai_errors,
) -> Route:
    """`POST path`.  parse: makes a request of its body.  summary: for the API's description."""
    parse_limited = partial(parse, limits=gateway.settings.body_limits)

    async def serve(admitted: Admitted, response: StreamedResponse) -> None:
        job = await read_request(
            gateway,
            admitted.request,
            headers=admitted.headers,
            tenant=admitted.tenant,
            request_id=admitted.request_id,
            parse=parse_limited,
        )
        asked = (job, *job.beside)
        job, *beside = await admitted.metered(gateway, asked, num_slots=job.sampling.n * len(asked))
        if job.ignored:
            gateway.metrics.fields_ignored(len(job.ignored))
        if job.prewarm is not None:
            await gateway.relay.run(job, PrewarmedResponse(response, job.prewarm))
        elif beside:
            await run_merged(gateway.relay, (job, *beside), response)
        else:
            await gateway.relay.run(job, response)

    def at_once(scope: Scope, body: bytes, response: StreamedResponse) -> Leave | None:
        if not gateway.preprocessor.is_short(len(body)) or gateway.relay.prefills is not None:
            return None
        return _answered_at_once(gateway, scope, body, response, parse=parse_limited)

    name = parse.__name__.removeprefix("parse_")
    return served_route(gateway, path, serve, name=name, summary=summary, errors=errors, at_once=at_once)


def served_route(
    gateway: Gateway,
    path: str,
    serve: Serve,
    *,
    name: str,
    summary: str,
    errors: ErrorDialect = openai_errors,
    at_once: AtOnce | None = None,
) -> Route:
    """`POST path` for whoever has a key and is within its limits.  serve: answers, or raises."""

    async def generate(request: Request, response: StreamedResponse) -> None:
        await _admit(gateway, request, serve, response)

    generate.__doc__ = summary
    generate.__name__ = name
    streamed = Streamed(
        generate,
        max_unsent_bytes=gateway.settings.slow_client_bytes,
        on_cut_off=gateway.metrics.client_cut_off,
        errors=errors,
        at_once=at_once,
    )
    return Route(path, streamed, methods=["POST"])


def _why(exc: HeadraceError) -> dict[str, str | None]:
    """For the log: what is wrong with a request is told without its words, which are the client's."""
    return {"param": exc.param} if isinstance(exc, InvalidRequest) else {"reason": str(exc)}


async def _admit(gateway: Gateway, request: Request, serve: Serve, response: StreamedResponse) -> None:
    request_id, came_at = gateway.new_request_id(), gateway.clock()
    headers, tenant = _fields(request.scope), ANYBODY
    try:
        tenant = gateway.keys.authenticate(headers)
        with contextlib.ExitStack() as held:
            slots = held.enter_context(gateway.keys.admitted(tenant))
            await serve(Admitted(request, headers, tenant, request_id, slots, held), response)
    except Exception as exc:  # noqa: BLE001 - our own bug: it is logged, and the client gets an answer all the same
        _refuse(gateway, response, exc, request_id=request_id, tenant=tenant, came_at=came_at)


def _answered_at_once(
    gateway: Gateway, scope: Scope, body: bytes, response: StreamedResponse, *, parse: Parse
) -> Leave | None:
    """What `_admit` does for one short prompt of a key without limits: nothing in it has to wait for anything."""
    request_id, came_at = gateway.new_request_id(), gateway.clock()
    headers, tenant = _fields(scope), ANYBODY
    slots: TenantSlots | None = None
    try:
        tenant = gateway.keys.authenticate(headers)
        if is_limited(tenant) or len(body) > max_body_bytes(gateway) or "content-encoding" in headers:
            return None
        parsed = parse(body)
        if parsed.more_prompts or parsed.is_prewarm:
            return None
        job = request_at_once(
            gateway, parsed, headers=headers, tenant=tenant, request_id=request_id, arrived_at=came_at
        )
        slots = gateway.keys.admitted(tenant)
        slots.widen(job.sampling.n)
        meter = RequestMeter(None, gateway.usage, tenant, job.model)
        if job.ignored:
            gateway.metrics.fields_ignored(len(job.ignored))
        return gateway.relay.begin(msgspec.structs.replace(job, meter=meter), response, slots.close).leave
    except Exception as exc:  # noqa: BLE001 - as above
        if slots is not None:
            slots.close()
        _refuse(gateway, response, exc, request_id=request_id, tenant=tenant, came_at=came_at)
        return _nothing


def _nothing() -> None:
    """Who is answered already is not left."""


def _fields(scope: Scope) -> dict[str, str]:
    """A dictionary, because starlette's own headers are searched one by one for each that is not there."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def _refuse(
    gateway: Gateway,
    response: StreamedResponse,
    exc: Exception,
    *,
    request_id: RequestId,
    tenant: Tenant,
    came_at: float,
) -> None:
    """Tell the client of what kept its request from being served. To be called while it is handled."""
    told = [("x-request-id", request_id), overhead_header(gateway.clock() - came_at)]
    if isinstance(exc, HeadraceError):
        code = code_of(exc)
        gateway.metrics.ended(RequestSummary(model="", code=code))
        _log.info("request.finished", request_id=request_id, outcome=code, **_why(exc))
        told += gateway.ledger.headers(tenant)
    else:
        _log.exception("request.bug", request_id=request_id)
    response.fail(exc, told)
