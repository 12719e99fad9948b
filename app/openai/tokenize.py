"""Bodies of POST /tokenize and /detokenize, in vLLM's shape."""

from typing import Final

import msgspec
import numpy as np

from app.openai.bodies import Message
from app.openai.chat import parse_documents, parse_is_reply, parse_template_kwargs
from app.openai.chat_tools import parse_chat_tools
from app.openai.decode import decode_known
from app.openai.messages import check_number, template_messages
from app.openai.prompt import parse_token_ids
from app.openai.sampling import Unsupported
from app.openai.schema import NULL, Json, Kind, Limits, ParsedRequest
from planes.wire.blocks import Tokens
from planes.wire.errors import InvalidRequest
from planes.wire.frames import Sampling

_DEFAULT_LIMITS: Final = Limits()


class TokenizeBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: msgspec.Raw = NULL
    documents: list[dict[str, Json]] | None = None
    chat_template_kwargs: msgspec.Raw = NULL

    # unsupported
    chat_template: msgspec.Raw = NULL
    media_io_kwargs: msgspec.Raw = NULL
    mm_processor_kwargs: msgspec.Raw = NULL


class DetokenizeBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Token ids, which may have millions of entries."""

    tokens: msgspec.Raw
    model: str | None = None


class ToTokenize(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """parsed: its `model` is "" where the client named none.  is_plain: without what a model puts around a prompt."""

    parsed: ParsedRequest
    is_plain: bool = False
    has_strings: bool = False


class ToDetokenize(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """tokens: shape (n,), uint32, n >= 0.  model: "" where the client named none."""

    model: str
    tokens: Tokens
    num_bytes: int
    ignored: tuple[str, ...] = ()


_TOKENIZE: Final = msgspec.json.Decoder(TokenizeBody)
_DETOKENIZE: Final = msgspec.json.Decoder(DetokenizeBody)
UNSUPPORTED_TOKENIZE: Final[dict[str, tuple[Json, ...]]] = {
    "chat_template": (),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
}
_UNSUPPORTED: Final = Unsupported(UNSUPPORTED_TOKENIZE)


def parse_tokenize(body: bytes, limits: Limits = _DEFAULT_LIMITS) -> ToTokenize:
    """Raises:  InvalidRequest."""
    asked, ignored = decode_known(body, _TOKENIZE, {}, is_strict=limits.has_strict_fields)
    _UNSUPPORTED.check(asked)
    if (asked.prompt is None) == (asked.messages is None):
        raise InvalidRequest("Send either 'prompt' or 'messages'.", param="prompt", code="missing_required_parameter")
    return ToTokenize(
        parsed=_conversation(asked, asked.messages, limits, body, ignored)
        if asked.messages is not None
        else ParsedRequest(
            kind=Kind.COMPLETION,
            model=asked.model or "",
            sampling=Sampling(max_tokens=0),
            max_tokens=None,
            prompt=asked.prompt or "",
            num_bytes=len(body),
            ignored=ignored,
        ),
        is_plain=asked.messages is None and asked.add_special_tokens is False,
        has_strings=bool(asked.return_token_strs),
    )


def parse_detokenize(body: bytes, limits: Limits = _DEFAULT_LIMITS) -> ToDetokenize:
    """Raises:  InvalidRequest."""
    asked, ignored = decode_known(body, _DETOKENIZE, {}, is_strict=limits.has_strict_fields)
    text = bytes(asked.tokens)
    is_empty = text.startswith(b"[") and not text[1:-1].strip()
    return ToDetokenize(
        model=asked.model or "",
        tokens=np.empty(0, dtype=np.uint32) if is_empty else parse_token_ids(asked.tokens, name="tokens"),
        num_bytes=len(body),
        ignored=ignored,
    )


def _conversation(
    asked: TokenizeBody, messages: list[Message], limits: Limits, body: bytes, ignored: tuple[str, ...]
) -> ParsedRequest:
    check_number(messages, limits)
    documents = parse_documents(asked.documents, limits)
    if asked.add_special_tokens:
        raise InvalidRequest(
            "'add_special_tokens' is not supported with 'messages': the chat template writes what the model needs.",
            param="add_special_tokens",
            code="unsupported_parameter",
        )
    is_continued = bool(asked.continue_final_message)
    return ParsedRequest(
        kind=Kind.CHAT,
        model=asked.model or "",
        sampling=Sampling(max_tokens=0),
        max_tokens=None,
        messages=template_messages(messages),
        template_kwargs=parse_template_kwargs(asked.chat_template_kwargs, limits),
        tools=parse_chat_tools(asked.tools, NULL, NULL, limits).shown,
        documents=documents,
        is_reply=parse_is_reply(asked.add_generation_prompt, is_continued=is_continued),
        is_continued=is_continued,
        num_bytes=len(body),
        ignored=ignored,
    )
