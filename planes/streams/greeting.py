"""What both ends of a stream show before anything else: certificates, and that they know the fleet's token (ADR 35).

    gateway                                    worker
    ── TCP, TLS ────────────────────────────►  who shows no certificate of the fleet's CA ends here
    ◄──────────────── Challenge(nonce W) ────
    ── Introduction(nonce G, gateway's proof) ─►  who cannot prove it ends here
    ◄── Hello(worker, epoch, worker's proof) ──  a worker that cannot prove it gets no request

The token itself never travels. Each proof is an HMAC over both nonces, and over which end made it: none can be sent
back, or once more. Without a token the worker begins with Hello.
"""

import hmac
import secrets
import ssl

from planes.security.files import Reloaded, UnusableFile, read_secret
from planes.security.planes import StreamSecurity
from planes.security.tls import gateway_tls, worker_tls

MAX_GREETING_BYTES = 4096
"""All that either end takes before it knows the other one."""
MIN_NONCE_BYTES = 16
_MIN_TOKEN_CHARACTERS = 16
"""Whoever overhears a proof may try tokens until one fits."""


class StreamKeys:
    """What this process shows on its streams and asks others for, as the files say by now.

    Raises:  UnusableFile.
    """

    def __init__(self, security: StreamSecurity | None = None) -> None:
        security = security or StreamSecurity()
        self._to_worker = gateway_tls(security.tls) if security.tls.is_mutual else None
        self._to_gateway = worker_tls(security.tls) if security.tls.is_mutual else None
        self._token = _token(security)

    @property
    def to_worker(self) -> ssl.SSLContext | None:
        """For connecting to a worker; None: without TLS."""
        return None if self._to_worker is None else self._to_worker()

    @property
    def to_gateway(self) -> ssl.SSLContext | None:
        """For gateways that connect here; None: without TLS."""
        return None if self._to_gateway is None else self._to_gateway()

    @property
    def token(self) -> bytes | None:
        """Never to be shown or sent."""
        return None if self._token is None else self._token()


def new_nonce() -> bytes:
    return secrets.token_bytes(32)


def gateway_proof(token: bytes, *, of_worker: bytes, of_gateway: bytes) -> bytes:
    """Args:  of_worker, of_gateway: their nonces."""
    return _proof(token, b"gateway", of_worker, of_gateway)


def worker_proof(token: bytes, *, of_worker: bytes, of_gateway: bytes, worker: str, epoch: int) -> bytes:
    """Args:  of_worker, of_gateway: their nonces."""
    return _proof(token, b"worker", of_worker, of_gateway, worker.encode(), str(epoch).encode())


def is_proof(given: bytes, wanted: bytes) -> bool:
    """Takes as long whether they differ early, late or not at all."""
    return hmac.compare_digest(given, wanted)


def _proof(token: bytes, *parts: bytes) -> bytes:
    """Each part with its length, so that no two lists of parts give one text."""
    text = b"".join(len(part).to_bytes(4, "little") + part for part in (b"headrace stream 1", *parts))
    return hmac.digest(token, text, "sha256")


def _token(security: StreamSecurity) -> Reloaded[bytes] | None:
    file = security.token_file
    if file is None:
        return None

    def read() -> bytes:
        token = read_secret(file).strip()
        if len(token) < _MIN_TOKEN_CHARACTERS:
            raise UnusableFile(file, f"has fewer than {_MIN_TOKEN_CHARACTERS} characters; take 32 random bytes in hex")
        return token.encode()

    return Reloaded([file], read)
