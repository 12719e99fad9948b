"""uvicorn as our processes run it: its sockets, its limits, and how it ends."""

import asyncio
import contextlib
import functools
import socket
import time
from collections.abc import Callable, Iterator, Mapping

import uvicorn
from starlette.types import ASGIApp

from app.console.live import Live
from app.http.connection import NOTHING_AT_ONCE, BeginAtOnce, ConnectionLimits, StreamingProtocol
from app.metrics import Metrics
from app.settings import GatewaySettings
from planes.security.tls import http_tls
from planes.wire.errors import UnusableSetting

_LAST_WORDS_S = 1.0


class HttpServer(uvicorn.Server):
    """uvicorn's server without its signal handlers, which would end the process before our own tasks have ended."""

    def __init__(
        self, config: uvicorn.Config, live: Live | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(config)
        self._live = live
        self._clock = clock
        self._drain_deadline = 0.0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield

    def stop(self) -> None:
        """Let running answers end, up to the drain limit; said twice: do not."""
        self.force_exit = self.should_exit
        if not self.should_exit:
            self._drain_deadline = self._clock() + (self.config.timeout_graceful_shutdown or 0)
        self.should_exit = True
        if self._live is not None:  # its streams would go on for as long as they may
            self._live.stop()

    def left_s(self) -> float:
        """Of the drain limit, once stopped: what else must end has no limit of its own."""
        return 0.0 if self.force_exit else max(0.0, self._drain_deadline - self._clock())

    async def cut_off(self) -> None:
        """Let the answers that are left tell their clients, while the workers' streams are still there."""
        for connection in list(self.server_state.connections):
            if isinstance(connection, StreamingProtocol):
                connection.cut_off()
        answers = list(self.server_state.tasks)
        if self.force_exit:  # out of patience, uvicorn has cancelled them; told to exit, it leaves them alone
            for answer in answers:
                answer.cancel()
        if answers:
            await asyncio.wait(answers, timeout=_LAST_WORDS_S)


def server_config(
    settings: GatewaySettings,
    app: ASGIApp,
    metrics: Metrics,
    *,
    at_once: Mapping[str, BeginAtOnce] = NOTHING_AT_ONCE,
) -> uvicorn.Config:
    """For each port of a gateway.  at_once: see `StreamingProtocol`; `app` answers whatever they leave."""
    limits = ConnectionLimits(
        read_timeout_s=min(settings.read_timeout_s, settings.request_timeout_s),
        num_connections=settings.max_connections,
    )
    protocol = functools.partial(
        StreamingProtocol, limits=limits, on_refused=metrics.connection_refused, at_once=at_once
    )
    config = uvicorn.Config(
        app,
        http=protocol,  # type: ignore[arg-type] # all that uvicorn does is call it
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here looks at the address of a client
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
    )
    if settings.tls_cert is not None and settings.tls_key is not None:
        config.load()
        config.ssl = http_tls(settings.tls_cert, settings.tls_key)  # uvicorn's own would keep what it read once
    return config


def listening(name: str, host: str, port: int, *, is_shared: bool = False) -> socket.socket:
    """name: of the setting that says the port.  is_shared: with other sockets.  Raises:  UnusableSetting."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048, reuse_port=is_shared)
    except OSError as exc:
        raise UnusableSetting(name, port, f"{host} cannot be listened on: {exc}") from exc
