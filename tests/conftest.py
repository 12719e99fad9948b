"""Real servers for the integration and end-to-end tests: one etcd and one NATS a session, on free ports."""

import uuid
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from app.cli.certs import CertSet, CertsSettings, make_certs
from app.cli.servers import etcd_server, nats_server


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def etcd_url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    async with etcd_server(tmp_path_factory.mktemp("etcd") / "data") as server:
        yield server.url


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def nats_url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    async with nats_server(tmp_path_factory.mktemp("nats") / "data") as server:
        yield server.url


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> CertSet:
    """A fleet's certificates and token, for localhost. Not to be changed."""
    return make_certs(tmp_path_factory.mktemp("certs"), CertsSettings())


@pytest.fixture(scope="session")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> CertSet:
    """Those of another fleet."""
    return make_certs(tmp_path_factory.mktemp("strangers"), CertsSettings())


@pytest.fixture
def namespace() -> str:
    return f"test-{uuid.uuid4().hex[:12]}"
