"""What an operator has said about how the planes are secured. Names of files alone: no secret stands in these."""

from dataclasses import dataclass, field
from pathlib import Path

from planes.security.tls import TlsFiles


@dataclass(frozen=True, slots=True)
class EtcdSecurity:
    """For `https://` urls the files; a login, whose password is a file's text, in place of one in the url."""

    tls: TlsFiles = field(default_factory=TlsFiles)
    user: str | None = None
    password_file: Path | None = None


@dataclass(frozen=True, slots=True)
class NatsSecurity:
    """For `tls://` urls the files; at most one of: user and password, token, nkey's seed, credentials."""

    tls: TlsFiles = field(default_factory=TlsFiles)
    user: str | None = None
    password_file: Path | None = None
    token_file: Path | None = None
    nkey_file: Path | None = None
    credentials_file: Path | None = None


@dataclass(frozen=True, slots=True)
class StreamSecurity:
    """Mutual TLS where `tls` has all three files; a token that both ends must know where there is a file of it."""

    tls: TlsFiles = field(default_factory=TlsFiles)
    token_file: Path | None = None

    @property
    def is_open(self) -> bool:
        return not self.tls.is_mutual and self.token_file is None


@dataclass(frozen=True, slots=True)
class PlaneSecurity:
    """How this process's connections to the rest of the fleet are secured."""

    etcd: EtcdSecurity = field(default_factory=EtcdSecurity)
    nats: NatsSecurity = field(default_factory=NatsSecurity)
    streams: StreamSecurity = field(default_factory=StreamSecurity)
