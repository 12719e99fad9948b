"""`POST /tokenize` and `/detokenize`, as vLLM serves them: what a prompt is to the model, and back."""

from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.gateway import Gateway
from app.http.intake import model_of, parsed_body
from app.http.routes.replies import json_reply, with_ignored
from app.openai.tokenize import parse_detokenize, parse_tokenize
from app.prompt.prepare import ModelEntry, check_vocabulary
from planes.wire.blocks import Tokens


def token_routes(gateway: Gateway) -> list[Route]:
    """Both routes."""
    limits = gateway.settings.body_limits
    parse_asked = partial(parse_tokenize, limits=limits)
    parse_tokens = partial(parse_detokenize, limits=limits)

    async def tokenize(request: Request) -> Response:
        """The tokens of a prompt or of a conversation, as a request with it would have them."""
        async with parsed_body(gateway, request, parse_asked) as (asked, tenant, deadline):
            model = model_of(gateway, tenant, asked.parsed.model or gateway.models.only(tenant.may_use))
            prepare = gateway.preprocessor
            tokens = await prepare.tokenize(asked.parsed, model, is_plain=asked.is_plain, deadline=deadline)
            body = await prepare.run(tokenized_body, model, tokens, asked.has_strings, num_bytes=4 * len(tokens))
        return with_ignored(json_reply(body), asked.parsed.ignored, gateway.metrics)

    async def detokenize(request: Request) -> Response:
        """The text of tokens, control tokens included."""
        async with parsed_body(gateway, request, parse_tokens) as (asked, tenant, deadline):
            model = model_of(gateway, tenant, asked.model or gateway.models.only(tenant.may_use))
            text = await gateway.preprocessor.run(
                text_of, model, asked.tokens, num_bytes=asked.num_bytes, deadline=deadline
            )
        return with_ignored(json_reply({"prompt": text}), asked.ignored, gateway.metrics)

    return [
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
    ]


def tokenized_body(model: ModelEntry, tokens: Tokens, has_strings: bool) -> dict[str, object]:
    """What is answered."""
    return {
        "count": len(tokens),
        "max_model_len": model.context_length,
        "tokens": tokens.tolist(),
        "token_strs": model.tokenizer.spellings(tokens) if has_strings else None,
    }


def text_of(model: ModelEntry, tokens: Tokens) -> str:
    """Raises:  InvalidRequest for a token outside the vocabulary."""
    if len(tokens):
        check_vocabulary("tokens", int(tokens.max()), model)
    return model.tokenizer.decode(tokens)
