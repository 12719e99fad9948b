"""`headrace chat`: a conversation in the terminal, streamed, with which workers served each answer."""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TextIO

from cyclopts import Parameter

from app.cli.gateway_url import GatewayClient, GatewayRefused, GatewayUrlSettings
from process.logging import printable

_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSettings(GatewayUrlSettings):
    """Whom to talk to, and how."""

    model: Annotated[str | None, Parameter(help="Model to talk to. Default: the first that the gateway has.")] = None
    system: Annotated[str | None, Parameter(help="What the model is told first.")] = None
    max_tokens: Annotated[int | None, Parameter(help="Most tokens of an answer. Default: what the context has.")] = None
    handover: Annotated[
        str, Parameter(help="Prefill and decode on two workers: always, never, or auto, as the router decides.")
    ] = "auto"


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of an answer; `usage` comes with the last piece, in OpenAI's words."""

    text: str = ""
    usage: dict[str, Any] | None = None


def chat(settings: ChatSettings, *, asked: Iterable[str], out: TextIO = sys.stdout) -> None:
    """Answer one line after the other, each with what was said before.

    Raises:  GatewayRefused where there is no model to talk to.
    """
    client = GatewayClient(settings)
    model = settings.model or _first_model(client)
    messages = [] if settings.system is None else [{"role": "system", "content": settings.system}]
    for line in asked:
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.strip()})
        try:
            said = _answer(client, settings, model, messages, out)
        except GatewayRefused as exc:
            messages.pop()  # it may be asked again
            print(f"\n{printable(str(exc))}", file=out)
        else:
            messages.append({"role": "assistant", "content": said})


def typed(prompt: str = "> ") -> Iterator[str]:
    """What a person types, until the end of input or Ctrl-C."""
    if sys.stdin.isatty():
        import readline  # noqa: F401, PLC0415 - lets `input` edit lines
    try:
        while True:
            yield input(prompt if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        print()


def pieces(lines: Iterable[bytes]) -> Iterator[Piece]:
    """Of the stream's lines.  Raises:  GatewayRefused for an error in it, or one that ends too early."""
    for line in lines:
        data = line.strip().removeprefix(b"data: ")
        if data == b"[DONE]":
            return
        if not line.startswith(b"data: "):
            continue  # a comment that keeps the connection alive, or a blank
        event = json.loads(data)
        if "error" in event:
            raise GatewayRefused(str(event["error"].get("message", event["error"])))
        choices = event.get("choices") or [{}]
        delta = choices[0].get("delta") or {}
        yield Piece(delta.get("content") or "", event.get("usage"))
    raise GatewayRefused("the stream ended in the middle of an answer")


def _first_model(client: GatewayClient) -> str:
    models = client.get("/v1/models")["data"]
    if not models:
        raise GatewayRefused("the gateway has no model: no worker is registered (headrace fleet)")
    return str(models[0]["id"])


def _answer(
    client: GatewayClient, settings: ChatSettings, model: str, messages: list[dict[str, str]], out: TextIO
) -> str:
    body: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if settings.max_tokens is not None:
        body["max_tokens"] = settings.max_tokens
    said, usage, first_at, started_at = "", None, None, time.monotonic()
    headers = {"x-headrace-handover": settings.handover}
    with client.opened("/v1/chat/completions", body, headers=headers, timeout_s=_TIMEOUT_S) as response:
        for piece in pieces(response):
            if piece.text:
                first_at = first_at or time.monotonic()
                said += piece.text
                # Line breaks are the answer's own; all else that a terminal would obey is shown.
                print("\n".join(printable(part) for part in piece.text.split("\n")), end="", file=out, flush=True)
            usage = piece.usage or usage
        served = _served(dict(response.headers.items()), usage, started_at, first_at)
    print(f"\n  [{served}]", file=out)
    return said


def _served(headers: dict[str, str], usage: dict[str, Any] | None, started_at: float, first_at: float | None) -> str:
    """Who, how many tokens, how fast."""
    found = {name.lower(): value for name, value in headers.items()}
    prefill, decode = found.get("x-headrace-prefill", "?"), found.get("x-headrace-decode", "?")
    told = [decode if prefill == decode else f"{prefill} → {decode}"]
    if usage is not None:
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        told.append(f"{usage['prompt_tokens']} prompt tokens, {cached} cached")
        told.append(f"{usage['completion_tokens']} generated")
    if first_at is not None:
        told.append(f"first after {first_at - started_at:.2f} s, all after {time.monotonic() - started_at:.2f} s")
    return printable(", ".join([*told, found.get("x-request-id", "")]))
