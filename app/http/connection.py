"""The HTTP connection: uvicorn's protocol, which lets answers write on the transport and tells when clients go."""

from collections.abc import Callable
from typing import Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

EXTENSION: Final = "headrace.client"
"""The ASGI extension under which a request's `Client` is found."""


class Client:
    """The connection that one request came over, as long as its answer lasts."""

    def __init__(self, protocol: "StreamingProtocol", cycle: RequestResponseCycle) -> None:
        self._protocol = protocol
        self.cycle = cycle
        self.transport = protocol.transport
        self.flow = protocol.flow

    @property
    def is_gone(self) -> bool:
        return self._protocol.is_gone

    def watch(self, on_gone: Callable[[], object] | None) -> None:
        """Call `on_gone` as soon as the connection is lost; None: no longer."""
        self._protocol.on_gone = on_gone


class StreamingProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1 protocol, which hands its connection to our answers. Set as `uvicorn.Config(http=…)`."""

    on_gone: Callable[[], object] | None = None
    is_gone = False

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        # The task that runs the request exists, but has not begun: it will find the extension.
        self.scope["extensions"] = {EXTENSION: Client(self, self.cycle)}  # type: ignore[dict-item]

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.is_gone = True
        if self.on_gone is not None:
            self.on_gone()
