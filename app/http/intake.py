"""From an HTTP request to a `GatewayRequest`: its body read, parsed and turned into tokens."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final, TypeVar

import msgspec
from starlette.requests import Request

from app.gateway import Gateway
from app.http.body import BodyLease, read_body, useful_bytes
from app.keys.tenant import Tenant
from app.openai.errors import ModelNotFound
from app.openai.request_headers import SCRIPT, parse_header_options
from app.openai.schema import Kind, ParsedRequest
from app.prompt.prepare import ModelEntry, Prepared
from app.prompt.script import scripted
from app.serving.request import GatewayRequest, Prewarm
from app.telemetry.trace_context import TRACEPARENT, TraceContext, parse_traceparent
from planes.wire.errors import InvalidRequest
from planes.wire.frames import Format, Parsing, Sampling
from planes.wire.messages import OWN_TOKENS, THINKING_BUDGET, RequestId
from router.request import SloSource

_EMBEDDING: Final = Kind.EMBEDDING  # bound once, see CONTRIBUTING.md
_BY_REQUEST, _BY_KEY = SloSource.REQUEST, SloSource.KEY
_ID_PREFIX: Final = {
    Kind.CHAT: "chatcmpl-",
    Kind.COMPLETION: "cmpl-",
    Kind.RESPONSE: "resp_",
    Kind.MESSAGE: "msg_",
    Kind.EMBEDDING: "embd-",
}

Parse = Callable[[bytes], ParsedRequest]
Result = TypeVar("Result")


async def read_request(
    gateway: Gateway,
    request: Request,
    *,
    headers: Mapping[str, str],
    tenant: Tenant,
    request_id: RequestId,
    parse: Parse,
) -> GatewayRequest:
    """Everything between the socket and the router, for a tenant whose key has been looked up.

    Args:  headers: of `request`, by their lower-case names.
    Raises:  HeadraceError.
    """
    arrived_at = gateway.clock()
    with gateway.bodies.lease() as lease:
        parsed, _ = await read_parsed(gateway, request, parse, lease, arrived_at=arrived_at)
        return await prepared_request(
            gateway, parsed, headers=headers, tenant=tenant, request_id=request_id, arrived_at=arrived_at
        )


async def read_parsed(
    gateway: Gateway, request: Request, parse: Callable[[bytes], Result], lease: BodyLease, *, arrived_at: float
) -> tuple[Result, int]:
    """What `parse` makes of the body, and the body's bytes, which `lease` has counted.  Raises:  HeadraceError."""
    body = await read_body(request, max_body_bytes(gateway), lease)
    deadline = arrived_at + gateway.settings.request_timeout_s
    return await gateway.preprocessor.parse(parse, body, deadline=deadline), len(body)


@asynccontextmanager
async def parsed_body(
    gateway: Gateway, request: Request, parse: Callable[[bytes], Result]
) -> AsyncIterator[tuple[Result, Tenant, float]]:
    """For routes that generate nothing: what `parse` makes of the body, who sent it, and the deadline.

    Raises:  HeadraceError.
    """
    tenant, arrived_at = gateway.keys.authenticate(request.headers), gateway.clock()
    with gateway.keys.admitted(tenant), gateway.bodies.lease() as lease:
        parsed, _ = await read_parsed(gateway, request, parse, lease, arrived_at=arrived_at)
        yield parsed, tenant, arrived_at + gateway.settings.request_timeout_s


def model_of(gateway: Gateway, tenant: Tenant, name: str) -> ModelEntry:
    """What prepares a request for a model. One that the key may not use is as one that is not there.

    Raises:  ModelNotFound, and others of `Models.entry`.
    """
    if not tenant.may_use(name):
        raise ModelNotFound(name)
    return gateway.models.entry(name)


async def prepared_request(
    gateway: Gateway,
    parsed: ParsedRequest,
    *,
    headers: Mapping[str, str],
    tenant: Tenant,
    request_id: RequestId,
    arrived_at: float,
) -> GatewayRequest:
    """What follows the parser.  Raises:  HeadraceError."""
    asked = _Asked(headers, tenant, arrived_at)
    job = await _prepared_prompt(gateway, parsed, asked, request_id)
    if not parsed.more_prompts:
        return job
    beside: list[GatewayRequest] = []
    for number, prompt in enumerate(parsed.more_prompts, start=1):
        other = msgspec.structs.replace(parsed, prompt=prompt)
        one = await _prepared_prompt(gateway, other, asked, RequestId(f"{request_id}-{number}"))
        answer = msgspec.structs.replace(job.format, echo=one.format.echo)
        beside.append(msgspec.structs.replace(one, format=answer, trace=job.trace))
    return msgspec.structs.replace(job, beside=tuple(beside))


class _Asked(msgspec.Struct, frozen=True):
    """What is known of a request beside its body."""

    headers: Mapping[str, str]
    tenant: Tenant
    arrived_at: float


class _Served(msgspec.Struct, frozen=True):
    """What serves it, and until when."""

    model: ModelEntry
    salt: str
    deadline: float


async def _prepared_prompt(
    gateway: Gateway, parsed: ParsedRequest, asked: _Asked, request_id: RequestId
) -> GatewayRequest:
    """The request for its first prompt."""
    prewarm = Prewarm(parsed.is_streaming, parsed.include_usage) if parsed.is_prewarm else None
    if prewarm is not None:
        parsed = _prompt_alone(parsed)
    served = _served(gateway, parsed, asked)
    prepared = await gateway.preprocessor.prepare(
        parsed, served.model, cache_salt=served.salt, deadline=served.deadline
    )
    job = _assembled(gateway, parsed, asked, served, prepared, request_id)
    return job if prewarm is None else msgspec.structs.replace(job, prewarm=prewarm)


def request_at_once(
    gateway: Gateway,
    parsed: ParsedRequest,
    *,
    headers: Mapping[str, str],
    tenant: Tenant,
    request_id: RequestId,
    arrived_at: float,
) -> GatewayRequest:
    """As `prepared_request`, of a short body with one prompt, whose answer is wanted.  Raises:  HeadraceError."""
    asked = _Asked(headers, tenant, arrived_at)
    served = _served(gateway, parsed, asked)
    prepared = gateway.preprocessor.prepared(parsed, served.model, cache_salt=served.salt)
    return _assembled(gateway, parsed, asked, served, prepared, request_id)


def _served(gateway: Gateway, parsed: ParsedRequest, asked: _Asked) -> _Served:
    """Raises:  HeadraceError."""
    limit_s = gateway.settings.request_timeout_s
    deadline = asked.arrived_at + min(limit_s, parsed.timeout_s or limit_s)
    model = model_of(gateway, asked.tenant, parsed.model)
    _check_task(parsed, model, gateway, asked.tenant)
    return _Served(model, asked.tenant.salted(parsed.cache_salt), deadline)


def _assembled(
    gateway: Gateway, parsed: ParsedRequest, asked: _Asked, served: _Served, prepared: Prepared, request_id: RequestId
) -> GatewayRequest:
    """Raises:  InvalidRequest for headers that ask for what there is not."""
    headers, tenant, model = asked.headers, asked.tenant, served.model
    sampling = prepared.sampling
    if SCRIPT in headers:
        sampling = msgspec.structs.replace(sampling, script=scripted(headers[SCRIPT], parsed.messages, model))
    if sampling.thinking_tokens is not None and not model.reasoning_parser:
        sampling = msgspec.structs.replace(sampling, thinking_tokens=None)  # a model without thoughts keeps any budget
    if sampling.thinking_tokens is not None and THINKING_BUDGET in model.lacks:
        raise InvalidRequest(
            f"The workers of '{model.model}' end no reasoning after so many tokens; leave the budget out.",
            param="thinking_token_budget",
            code="unsupported_parameter",
        )
    options = parse_header_options(headers, n=sampling.n, has_prompt_logprobs=sampling.prompt_logprobs is not None)
    slo_ttft_s, slo_ttft_from = _settled(parsed.slo_ttft_s or options.slo_ttft_s, tenant.slo_ttft_s)
    slo_itl_s, slo_itl_from = _settled(parsed.slo_itl_s or options.slo_itl_s, tenant.slo_itl_s)
    return GatewayRequest(
        request=request_id,
        model=model.model,
        prompt=prepared.tokens,
        blocks=prepared.blocks,
        block_size=model.block_size,
        sampling=sampling,
        format=Format(
            kind=parsed.kind.value,
            response_id=f"{_ID_PREFIX[parsed.kind]}{request_id}",
            model=parsed.model,
            created=int(gateway.wall_clock()),
            is_streaming=parsed.is_streaming,
            include_usage=parsed.include_usage,
            echo=prepared.echo,
            parsing=_parsing(parsed, model),
            has_continuous_usage=parsed.has_continuous_usage,
            has_token_ids=parsed.has_token_ids,
            repeated=parsed.repeated,
            is_context_bound=parsed.max_tokens is not None and prepared.sampling.max_tokens < parsed.max_tokens,
        ),
        arrived_at=asked.arrived_at,
        deadline=served.deadline,
        cache_salt=prepared.cache_salt,
        priority=tenant.priority_of(parsed.priority),
        tenant=tenant.name,
        slo_ttft_s=slo_ttft_s,
        slo_itl_s=slo_itl_s,
        slo_ttft_from=slo_ttft_from,
        slo_itl_from=slo_itl_from,
        options=options,
        has_own_tokens=OWN_TOKENS not in model.lacks,
        card_digest=model.digest,
        adapter=model.adapter,
        ignored=parsed.ignored,
        trace=_trace(gateway, headers),
    )


def _trace(gateway: Gateway, headers: Mapping[str, str]) -> TraceContext | None:
    """The client's; else a new one where requests are traced."""
    trace = parse_traceparent(headers[TRACEPARENT]) if TRACEPARENT in headers else None
    return gateway.tracer.started() if trace is None and gateway.tracer is not None else trace


def _settled(by_request: float | None, by_key: float | None) -> tuple[float | None, SloSource]:
    """An SLO and who says so; what neither says the router settles, by model and for all."""
    return (by_key, _BY_KEY) if by_request is None else (by_request, _BY_REQUEST)


def _prompt_alone(parsed: ParsedRequest) -> ParsedRequest:
    """The same request for one token, of which nothing is asked."""
    return msgspec.structs.replace(
        parsed,
        sampling=Sampling(max_tokens=0),
        max_tokens=1,
        is_streaming=False,
        echo=False,
        parsing=None,
        bad_words=(),
        has_token_ids=False,
    )


def _check_task(parsed: ParsedRequest, model: ModelEntry, gateway: Gateway, tenant: Tenant) -> None:
    """Raises:  InvalidRequest."""
    is_embedding = parsed.kind is _EMBEDDING
    if is_embedding == (model.embedding_size > 0):
        return
    does = "generates and embeds nothing" if is_embedding else "makes embeddings, which are at /v1/embeddings"
    names = filter(tenant.may_use, gateway.models.for_task(is_embedding=is_embedding))
    others = ", ".join(map(repr, names))[:500] or "none"
    raise InvalidRequest(
        f"The model '{model.model}' {does}. Models here that {'embed' if is_embedding else 'generate'}: {others}.",
        param="model",
        code="wrong_task",
    )


def _parsing(parsed: ParsedRequest, model: ModelEntry) -> Parsing | None:
    """With what the template was given, which tells some parsers whether the model thinks.

    Raises:  InvalidRequest if calls are to be found where nothing finds them.
    """
    if not parsed.kind.is_conversation:
        return None
    parsing = parsed.parsing
    if parsing is not None and parsing.tool_choice == "auto" and not model.tool_parser:
        raise InvalidRequest(
            f"The workers of '{model.model}' read no tool calls in its answers; leave 'tools' out, require a call with "
            "'tool_choice', or start them with --tool-parser.",
            param="tools",
            code="unsupported_parameter",
        )
    if model.reasoning_parser:
        parsing = msgspec.structs.replace(parsing or Parsing(), has_reasoning=True)
    if parsing is None or not parsed.template_kwargs:
        return parsing
    return msgspec.structs.replace(parsing, template_kwargs=msgspec.json.encode(parsed.template_kwargs))


def max_body_bytes(gateway: Gateway) -> int:
    """No longer than is allowed, and than the longest context that anybody serves can need."""
    limit, context_length = gateway.settings.max_body_bytes, gateway.models.longest_context
    return min(limit, useful_bytes(context_length)) if context_length else limit
