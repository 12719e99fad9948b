"""What a running `vllm serve` is, and whether it can be adopted: everything that is missing is told at once."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from planes.wire.unreadable import UNREADABLE
from process.paths import is_hub_id
from workers.adopted.http import Address, HttpClient, ServerGone
from workers.adopted.metrics import read_cache_config
from workers.engine.base import EngineStartError

GENERATE = "/inference/v1/generate"
TIMEOUT_S = 10.0
_LOOK_S = 1.0
_ANY_HOST = ("*", "0.0.0.0", "[::]", "::")
KNOWN_VERSION = "0.32"
"""The release whose answers the tests have seen."""

_EVENTS = """--kv-events-config '{"enable_kv_cache_events": true, "endpoint": "tcp://*:5557", """
_EVENTS += """"replay_endpoint": "tcp://*:5558"}'"""


class _Model(msgspec.Struct, frozen=True):
    id: str
    root: str = ""
    parent: str | None = None
    max_model_len: int | None = None


class _Models(msgspec.Struct, frozen=True):
    data: list[_Model] = []


class _Version(msgspec.Struct, frozen=True):
    version: str = ""


class _Source(msgspec.Struct, frozen=True):
    publisher: str | None = None
    endpoint: str = ""
    replay_endpoint: str | None = None


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What the server says of itself. events, replay: where its KV events can be had; replay is "" for nowhere."""

    model: str
    root: str
    """What it was started with: a directory, or an id of the Hugging Face hub."""
    context_length: int
    version: str
    events: str
    replay: str
    cache: Mapping[str, str]
    """Of `vllm:cache_config_info`."""

    @property
    def block_size(self) -> int:
        return int(self.cache["block_size"])

    @property
    def num_blocks(self) -> int:
        return int(self.cache["num_gpu_blocks"])


async def until_healthy(client: HttpClient, *, wait_s: float, progress: Callable[[str], None]) -> None:
    """Wait for a server that is not there yet: loading takes minutes.  Raises:  EngineStartError."""
    deadline = time.monotonic() + wait_s
    is_told = False
    while True:
        try:
            status, _ = await client.ask("GET", "/health", timeout_s=TIMEOUT_S)
            if status == 200:
                return
            reason = f"its /health says {status}"
        except ServerGone as exc:
            reason = str(exc)
        if time.monotonic() >= deadline:
            raise EngineStartError(
                f"no vLLM server at {client.address.netloc} within {wait_s:g} s (--wait-s): {reason}"
            )
        if not is_told:
            progress(f"waiting for the vLLM server at {client.address.netloc}")
            is_told = True
        await asyncio.sleep(min(_LOOK_S, max(0.0, deadline - time.monotonic())))


async def examine(client: HttpClient, *, served_model_name: str | None = None) -> ServerFacts:
    """Of a server that is healthy.  Raises:  EngineStartError with the flags to add; ServerGone."""
    model = _chosen(await _asked(client, "/v1/models", _Models), served_model_name)
    version = (await _asked(client, "/version", _Version)).version
    missing = []
    status, _ = await client.ask("POST", GENERATE, b"{}", timeout_s=TIMEOUT_S)
    if status in (403, 404, 405):
        missing.append(
            "--enable-scale-out (its token-in, token-out route answers "
            f"{status}; it takes vLLM {KNOWN_VERSION} or newer)"
        )
    elif status == 401:
        raise EngineStartError(_unauthorized(client.address))
    sources = await _asked(client, "/kv_event_sources", dict[str, _Source])
    if len(sources) > 1:
        raise EngineStartError(
            f"the server has {len(sources)} data-parallel engines; adopt servers with --data-parallel-size 1, one each"
        )
    source = next(iter(sources.values()), _Source())
    if source.publisher != "zmq":
        missing.append(f"{_EVENTS} (it publishes no KV events)")
    status, exposition = await client.ask("GET", "/metrics", timeout_s=TIMEOUT_S)
    cache = read_cache_config(exposition.decode(errors="replace"))
    if cache.get("enable_prefix_caching") == "False":
        missing.append("--enable-prefix-caching (nothing is cached)")
    if missing:
        raise EngineStartError(f"the vLLM server at {client.address.netloc} must be started with {'; '.join(missing)}")
    facts = ServerFacts(
        model.id,
        model.root,
        model.max_model_len or 0,
        version,
        _reachable(source.endpoint, client.address),
        _reachable(source.replay_endpoint, client.address) if source.replay_endpoint else "",
        cache,
    )
    _check(facts, status)
    return facts


def _check(facts: ServerFacts, status: int) -> None:
    for name in ("block_size", "num_gpu_blocks"):
        if not facts.cache.get(name, "").isdigit():
            raise EngineStartError(
                f"the server's /metrics ({status}) tell no {name} in vllm:cache_config_info: is it an engine's, and "
                "started without --disable-log-stats?"
            )
    if facts.context_length < 1:
        raise EngineStartError("the server's /v1/models tell no max_model_len: is it an engine's?")


def _unauthorized(address: Address) -> str:
    return f"the vLLM server at {address.netloc} wants an API key: --server-key-file"


async def _asked(client: HttpClient, path: str, kind: type[Any]) -> Any:
    status, reply = await client.ask("GET", path, timeout_s=TIMEOUT_S)
    if status == 401:
        raise EngineStartError(_unauthorized(client.address))
    try:
        if status != 200:
            raise EngineStartError(f"{path} of {client.address.netloc} answers {status}: is it a vLLM server?")
        return msgspec.json.decode(reply, type=kind)
    except UNREADABLE as exc:
        raise EngineStartError(f"{path} of {client.address.netloc} is not what vLLM says: {exc}") from exc


def _chosen(models: _Models, name: str | None) -> _Model:
    """The base model under the name wanted, or its first: adapters have a parent."""
    own = [model for model in models.data if model.parent is None]
    found = next((model for model in own if name in (None, model.id)), None)
    if found is None:
        raise EngineStartError(f"the server has the models {[model.id for model in own]}, and none is {name!r}")
    return found


def _reachable(endpoint: str, address: Address) -> str:
    """Where a server's ZMQ endpoint can be reached from here.  Raises:  EngineStartError."""
    if endpoint.startswith("ipc://"):
        return endpoint
    scheme, _, rest = endpoint.partition("://")
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or host not in _ANY_HOST or not port.isdigit():
        raise EngineStartError(
            f"the server's KV events go to {endpoint!r}, to which it connects itself: give it {_EVENTS}"
        )
    return f"tcp://{f'[{address.host}]' if ':' in address.host else address.host}:{port}"


def model_directory(named: str | None, root: str, *, fetched: Callable[[str], Path]) -> Path:
    """Where the model's tokenizer is on this machine.

    Args:  named: what the operator says, a directory or an id at the hub; None: what the server says, `root`.
    fetched: of an id, out of the hub's cache or from the hub.
    Raises:  EngineStartError; what `fetched` raises.
    """
    wanted = named or root
    if is_hub_id(wanted):
        return fetched(wanted)
    directory = Path(wanted).expanduser()
    if not (directory / "tokenizer.json").is_file():
        raise EngineStartError(
            f"the model {wanted!r} is no directory with a tokenizer.json here: name by --model its id at the hub, or a "
            "copy of its tokenizer.json, tokenizer_config.json, config.json and generation_config.json"
        )
    return directory
