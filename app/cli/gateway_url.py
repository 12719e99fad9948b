"""How small commands reach a gateway: over HTTP, as any client does."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

from cyclopts import Parameter

from planes.wire.errors import HeadraceError
from planes.wire.urls import redacted
from process.settings import check_setting

_MAX_TOLD_CHARS = 500


class GatewayRefused(HeadraceError):  # noqa: N818 - names the outcome
    """A gateway did not answer, or answered with an error."""

    code = "gateway_refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayUrlSettings:
    """Which gateway is asked."""

    url: Annotated[str, Parameter(help="URL of the gateway.")] = "http://127.0.0.1:8000"
    api_key: Annotated[str | None, Parameter(help="Key to ask with; better told by the variable.")] = None

    def __post_init__(self) -> None:
        check_setting("url", self.url, _check_url)


class GatewayClient:
    """Asks one gateway. Every call raises GatewayRefused where it does not answer well."""

    def __init__(self, settings: GatewayUrlSettings, *, timeout_s: float = 10.0) -> None:
        self._settings = settings
        self._timeout_s = timeout_s

    def get(self, path: str, **query: Any) -> Any:
        """The JSON at a path."""
        words = "&".join(f"{name}={quote(str(value), safe='')}" for name, value in query.items())
        with self.opened(f"{path}?{words}" if words else path) as response:
            return json.load(response)

    def text(self, path: str) -> str:
        with self.opened(path) as response:
            return response.read().decode()

    def status(self, path: str) -> int:
        """What a path is answered with, errors too."""
        try:
            with self.opened(path) as response:
                return response.status
        except GatewayRefused as exc:
            if isinstance(exc.__cause__, urllib.error.HTTPError):
                return exc.__cause__.code
            raise

    @contextmanager
    def opened(
        self,
        path: str,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[HTTPResponse]:
        """The answer to a GET, or to a POST where there is a body."""
        headers = {"content-type": "application/json", **(headers or {})}
        if self._settings.api_key is not None:
            headers["authorization"] = f"Bearer {self._settings.api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._settings.url.rstrip("/") + path, data, headers)  # noqa: S310 - checked
        told = redacted(self._settings.url)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s or self._timeout_s) as response:  # noqa: S310
                yield response
        except urllib.error.HTTPError as exc:
            raise GatewayRefused(f"{told}{path}: {exc.code}: {_reason(exc.read())}") from exc
        except (OSError, HTTPException, ValueError) as exc:
            raise GatewayRefused(f"{told}{path} did not answer: {getattr(exc, 'reason', exc)}") from exc


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("it must be http://host:port or https://host:port")


def _reason(body: bytes) -> str:
    """What the error says, in OpenAI's shape or any."""
    try:
        told = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        told = body.decode(errors="replace")
    return str(told)[:_MAX_TOLD_CHARS]
