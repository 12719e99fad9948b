"""Whether what listens would be open to others: a start that would make it so must say that it means it (ADR 35)."""

from collections.abc import Iterator

from planes.wire.errors import HeadraceError
from planes.wire.urls import EtcdAddress, NatsAddress, is_loopback, parse_etcd, parse_nats, redacted
from process.settings import ProcessSettings


class OpenToOthers(HeadraceError):  # noqa: N818 - names what is wrong
    """A process would listen where others reach it, and let them in. The message says what is open and what to do."""

    code = "open_to_others"

    def __init__(self, flag: str, host: str, reasons: list[str]) -> None:
        super().__init__(
            f"{flag} {host} is an address that others reach, and {'; '.join(reasons)}. "
            "Mend that, listen on 127.0.0.1, or take the risk with --insecure"
        )


def refuse_open_gateway(settings: ProcessSettings, host: str, *, has_keys: bool, admin_host: str | None = None) -> None:
    """admin_host: of the port for operators; None: there is none.  Raises:  OpenToOthers."""
    no_keys = [] if has_keys else ["whoever reaches it may ask without a key (--api-keys or --api-keys-file)"]
    reasons = [*no_keys, *_open_planes(settings), *_open_streams_elsewhere(settings)]
    _refuse(settings, "--host", host, reasons)
    if admin_host is not None:
        _refuse(settings, "--admin-host", admin_host, reasons)


def refuse_open_worker(settings: ProcessSettings, host: str) -> None:
    """Raises:  OpenToOthers."""
    own = []
    if settings.stream_security.is_open:
        own = [f"whoever reaches it is taken for a gateway ({_MEND_STREAMS})"]
    _refuse(settings, "--host", host, [*own, *_open_planes(settings)])


_MEND_STREAMS = "--plane-ca, --plane-cert and --plane-key, or --stream-token-file"


def _refuse(settings: ProcessSettings, flag: str, host: str, reasons: list[str]) -> None:
    if reasons and not settings.insecure and not is_loopback(host):
        raise OpenToOthers(flag, host or "''", reasons)


def _open_planes(settings: ProcessSettings) -> Iterator[str]:
    """What others could read or write. A plane that is on this machine alone is nobody else's."""
    etcd, nats = parse_etcd(settings.etcd), parse_nats(settings.nats)
    if not etcd.is_local and not _is_etcd_secured(settings, etcd):
        yield (
            f"etcd at {redacted(settings.etcd)} is not known to keep others out (https:// with --plane-cert, or with "
            "--etcd-user)"
        )
    if not nats.is_local and not _is_nats_secured(settings, nats):
        yield (
            f"NATS at {redacted(settings.nats)} is not known to keep others out (tls:// with --plane-cert, "
            "--nats-user, --nats-token-file, --nats-nkey-file or --nats-credentials-file)"
        )


def _open_streams_elsewhere(settings: ProcessSettings) -> Iterator[str]:
    """Workers register in etcd: where that is on this machine alone, so are they."""
    if settings.stream_security.is_open and not parse_etcd(settings.etcd).is_local:
        yield f"whoever is registered as a worker gets prompts ({_MEND_STREAMS})"


def _is_etcd_secured(settings: ProcessSettings, etcd: EtcdAddress) -> bool:
    own = settings.etcd_security
    return etcd.is_tls and (own.tls.cert is not None or own.user is not None or etcd.login is not None)


def _is_nats_secured(settings: ProcessSettings, nats: NatsAddress) -> bool:
    own = settings.nats_security
    secrets = (own.tls.cert, own.user, own.token_file, own.nkey_file, own.credentials_file, nats.login, nats.token)
    return nats.is_tls and any(secret is not None for secret in secrets)
