"""One connection to one endpoint of etcd: aetcd's client, with TLS, which aetcd itself cannot."""

from typing import Any

import aetcd
import grpc
from aetcd import rpc

from planes.security.files import Reloaded, read_secret
from planes.security.planes import EtcdSecurity
from planes.security.tls import grpc_files
from planes.wire.urls import EtcdAddress, Login


class EtcdKeys:
    """What this process shows etcd, as the files say by now.  Raises:  UnusableFile."""

    def __init__(self, address: EtcdAddress, security: EtcdSecurity) -> None:
        self._files = grpc_files(security.tls) if address.is_tls else None
        self._user, self._login = security.user, address.login
        file = security.password_file
        self._password = None if file is None else Reloaded([file], lambda: read_secret(file))

    def channel(self, target: str, options: Any) -> Any:
        """A new channel of gRPC to `host:port`."""
        if self._files is None:
            return rpc.insecure_channel(target, options=options)
        ca, key, cert = self._files()
        credentials = grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)
        return rpc.secure_channel(target, credentials, options=options)

    @property
    def login(self) -> Login | None:
        if self._user is None or self._password is None:
            return self._login
        return Login(self._user, self._password())


class Client(aetcd.Client):  # type: ignore[misc]  # it has no types
    """Connects as aetcd's own client does, over a channel of ours. For one user of `async with`."""

    def __init__(self, host: str, port: int, keys: EtcdKeys, *, timeout_s: float, options: dict[str, Any]) -> None:
        super().__init__(host, port, timeout=timeout_s, options=options)
        self._keys = keys

    async def connect(self) -> None:
        """Raises:  grpc's AioRpcError where etcd refuses the login, or is not there to be asked."""
        if self._connected.is_set():
            return
        self.channel = self._keys.channel(f"{self._host}:{self._port}", self._options.items())
        try:
            if (login := self._keys.login) is not None:
                self.auth_stub = rpc.AuthStub(self.channel)
                asked = rpc.AuthenticateRequest(name=login.user, password=login.password)
                answer = await self.auth_stub.Authenticate(asked, timeout=self._timeout)
                self.metadata = (("token", answer.token),)
        except BaseException:
            await self.channel.close()
            self._init_channel_attrs()
            raise
        self.kvstub = rpc.KVStub(self.channel)
        self.leasestub = rpc.LeaseStub(self.channel)
        self._connected.set()
