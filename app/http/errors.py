"""What a connection can be refused for before any route has seen its request."""

from planes.wire.errors import InvalidRequest, Rejected


class HeadTooLarge(InvalidRequest):
    """A head of more bytes or fields than anybody needs."""

    code = "head_too_large"

    def __init__(self, limit: int, what: str) -> None:
        super().__init__(f"The request's head has more than {limit} {what}, which is the limit.")


class ReadTimeout(InvalidRequest):
    """A request did not come whole in time."""

    code = "request_timeout"

    def __init__(self, limit_s: float, part: str) -> None:
        super().__init__(f"The request's {part} was not here {limit_s:g} s after its first byte, which is the limit.")


class TooManyPipelined(InvalidRequest):
    """More requests sent ahead than are kept for one connection."""

    code = "too_many_pipelined"

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"{limit} requests of this connection wait for an answer, which is the limit; wait for some of them."
        )


class NotHttp(InvalidRequest):
    """Bytes that are no HTTP/1 request."""

    code = "invalid_http"

    def __init__(self, reason: str) -> None:
        super().__init__(f"This is no valid HTTP/1.1 request: {reason}.")


class Stopping(Rejected):
    """The gateway stops, and the rest of the request would keep it from that."""

    code = "gateway_stopping"

    def __init__(self) -> None:
        super().__init__(
            "The gateway is stopping and the request was not here whole; send it again.", retry_after_s=1.0
        )


class TooManyConnections(Rejected):
    """As many connections as this gateway holds are open."""

    code = "too_many_connections"

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"This gateway has {limit} connections open, which is its limit (--max-connections); close some of yours.",
            retry_after_s=1.0,
        )
