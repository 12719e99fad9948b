"""A NATS that knows its clients by nkeys, and one that knows them by credentials, JWTs of an operator's account."""

import base64
import hashlib
import json
import os
import time
from contextlib import asynccontextmanager

import nkeys
import pytest

from tests.integration.conftest import Site
from tests.nats_servers import own_nats

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

UNLIMITED = dict.fromkeys(("subs", "data", "payload"), -1)
OF_AN_ACCOUNT = UNLIMITED | dict.fromkeys(("imports", "exports", "conn", "leaf"), -1) | {"wildcards": True}
JETSTREAM = dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), -1)


class Identity:
    """A key pair of NATS."""

    def __init__(self, prefix):
        seed = nkeys.encode_seed(os.urandom(32), prefix)
        self._pair = nkeys.from_seed(bytearray(seed))
        self.seed = bytes(seed).decode().rstrip("=")
        self.name = self._pair.public_key.decode().rstrip("=")

    def jwt(self, subject, kind, **claims):
        """What this identity says of another one, as nsc would write it."""
        told = {"iat": int(time.time()), "iss": self.name, "sub": subject.name, "name": kind}
        told["nats"] = {"type": kind, "version": 2, **claims}
        told["jti"] = base64.b32encode(hashlib.sha256(json.dumps(told).encode()).digest()).decode().rstrip("=")
        signed = f"{encoded({'typ': 'JWT', 'alg': 'ed25519-nkey'})}.{encoded(told)}"
        return f"{signed}.{base64url(self._pair.sign(signed.encode()))}"


def encoded(value):
    return base64url(json.dumps(value).encode())


def base64url(data):
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def written(path, text):
    path.write_text(text)
    return path


def credentials(account, user):
    """A file of credentials for a user of this account."""
    token = account.jwt(user, "user", pub={}, sub={}, **UNLIMITED)
    return (
        f"-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user.seed}\n------END USER NKEY SEED------\n"
    )


@asynccontextmanager
async def known_by_nkey(folder):
    """Returns:  the server's url, the flag, and the files of somebody whom it knows and of somebody else."""
    right, wrong = Identity(nkeys.PREFIX_BYTE_USER), Identity(nkeys.PREFIX_BYTE_USER)
    config = f"JS\nauthorization {{ users: [{{ nkey: {right.name} }}] }}\n"
    async with own_nats(folder / "nats", config) as url:
        yield url, "--nats-nkey-file", *(written(folder / who.name, who.seed) for who in (right, wrong))


@asynccontextmanager
async def known_by_credentials(folder):
    """The same; the other one's account was made by somebody else's operator."""
    operator, stranger = Identity(nkeys.PREFIX_BYTE_OPERATOR), Identity(nkeys.PREFIX_BYTE_ACCOUNT)
    account, system = Identity(nkeys.PREFIX_BYTE_ACCOUNT), Identity(nkeys.PREFIX_BYTE_ACCOUNT)
    tokens = (
        operator.jwt(account, "account", limits=OF_AN_ACCOUNT | JETSTREAM),
        operator.jwt(system, "account", limits=OF_AN_ACCOUNT),
    )
    config = (
        f"JS\noperator: {operator.jwt(operator, 'operator')}\nsystem_account: {system.name}\n"
        f"resolver: MEMORY\nresolver_preload: {{ {account.name}: {tokens[0]}, {system.name}: {tokens[1]} }}\n"
    )
    async with own_nats(folder / "nats", config) as url:
        files = [
            written(folder / each.name, credentials(each, Identity(nkeys.PREFIX_BYTE_USER)))
            for each in (account, stranger)
        ]
        yield url, "--nats-credentials-file", *files


@pytest.mark.parametrize("known", [known_by_nkey, known_by_credentials])
async def test_a_fleet_works_with_its_own_and_nobody_joins_with_another(
    known, etcd_url, stack, reach, unique, until, tmp_path
):
    logs = tmp_path / "logs"
    logs.mkdir()
    async with known(tmp_path) as (url, flag, right, wrong):
        site = Site(etcd_url, url, logs)
        try:
            for name in ("prefill-1", "decode-1"):
                site.start_worker(name, flag, str(right))
            gateway = await site.gateway(flag, str(right), num_workers=2)
            async with reach(gateway) as api, reach(stack.alone) as alone:
                answer = await api.chat(unique, headers={"x-headrace-handover": "always"}, max_tokens=20)
                served = (answer.headers["x-headrace-prefill"], answer.headers["x-headrace-decode"])
                assert (answer.status_code, served) == (200, ("prefill-1", "decode-1"))
                assert answer.json()["choices"][0]["message"]["content"] == await alone.text(unique, max_tokens=20)
                stranger = site.start_worker("decode-2", flag, str(wrong))
                assert "uthorization" in await stranger.says("event=nats.")

                async def hears():
                    """What a worker reports comes over NATS."""
                    return all(worker["load"] for worker in (await api.fleet()).values())

                await until(hears)
                assert set(await api.fleet()) == {"prefill-1", "decode-1"}
            doctor = site.start("doctor", ["app.cli", "doctor", flag, str(wrong), *site.flags, "--url", gateway.url])
            assert await doctor.ended() == 1
            assert doctor.said("wrong NATS")
            told = "".join(each.log.read_text(errors="replace") for each in site.processes)
            for file in (right, wrong):
                assert file.read_text().strip().splitlines()[-1 if flag.endswith("nkey-file") else -2] not in told
        finally:
            site.close()
