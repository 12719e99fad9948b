"""The command line of a process that adopts a server: `headrace adopt http://10.0.0.7:8000 --role decode`."""

import asyncio
import importlib.util
import signal
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec
import structlog
import uvloop
from cyclopts import Parameter

from planes.assets import make_card, read_model_files
from planes.wire.errors import UnusableSetting
from planes.wire.messages import WorkerId
from planes.wire.unreadable import UNREADABLE
from process import logging as logs
from process.settings import command_line
from workers.adopted.engine import AdoptedEngine, AdoptOptions
from workers.adopted.examine import KNOWN_VERSION, examine, model_directory, until_healthy
from workers.adopted.http import HttpClient, parse_address
from workers.adopted.settings import AdoptSettings
from workers.answer.detokenizer import Vocabulary, load_vocabulary
from workers.engine.base import Engine
from workers.hub import fetched_model
from workers.main import Ending, progressed, serve
from workers.settings import WorkerSettings

_log = structlog.get_logger()

app = command_line("headrace adopt", "Joins a running, unmodified `vllm serve` to the fleet, as a worker.")


@app.default
def main(
    server: Annotated[str, Parameter(show_env_var=False, help="URL of the vLLM server, http[s]://host:port.")],
    /,
    *,
    settings: Annotated[AdoptSettings | None, Parameter(name="*")] = None,
) -> int:
    """Stand beside a vLLM server until SIGTERM or SIGINT, or until it is gone; docs/adopt.md says how it is started.

    The server goes on when this process ends.
    """
    settings = settings or AdoptSettings()
    logs.configure(settings.log_level, as_json=settings.log_json)
    client = HttpClient(parse_address(server), key=settings.server_key())
    if importlib.util.find_spec("zmq") is None:
        allowed = "its KV events come by ZeroMQ: pip install pyzmq, or headrace with the extra cpu or cuda"
        raise UnusableSetting("server", server, allowed)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_adopt(client, settings))


async def _adopt(client: HttpClient, settings: AdoptSettings) -> int:
    ending = Ending()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ending.asked)
    if not await ending.run_until_ending(until_healthy(client, wait_s=settings.wait_s, progress=progressed)):
        return 0
    facts = await examine(client, served_model_name=settings.served_model_name)
    if not facts.version.startswith(f"{KNOWN_VERSION}."):
        _log.warning("adopt.other_version", version=facts.version, known=KNOWN_VERSION)
    fetched = partial(fetched_model, revision=None, has_weights=False, progress=progressed)
    directory = await asyncio.to_thread(model_directory, settings.model, facts.root, fetched=fetched)
    vocabulary = await asyncio.to_thread(load_vocabulary, directory / "tokenizer.json")
    model = await asyncio.to_thread(ModelFiles.read, directory)

    def make_engine(
        settings: WorkerSettings, worker: WorkerId, *, vocab_size: int, reasoning_parser: str = ""
    ) -> Engine:
        del reasoning_parser  # the server has its own, or none
        return AdoptedEngine(_options(settings, worker, vocabulary, model, vocab_size), facts, client)

    return await serve(settings.as_worker(facts.model, directory), ending, make_engine=make_engine)


class _TextConfig(msgspec.Struct, frozen=True):
    vocab_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int | None = None
    hidden_size: int = 0
    head_dim: int | None = None


class _Config(_TextConfig, frozen=True):
    text_config: _TextConfig | None = None
    """Of a model that takes more than text."""


class ModelFiles(msgspec.Struct, frozen=True):
    """What of a model's files its server does not tell.

    bytes_per_token: of the KV cache in two-byte numbers, for the price of a handover; 0: it cannot be told.
    """

    eos: tuple[int, ...]
    vocab_size: int
    bytes_per_token: int

    @classmethod
    def read(cls, directory: Path) -> "ModelFiles":
        """Blocks.  Raises:  AssetsUnavailable."""
        files = read_model_files(directory)
        card = make_card(files, model="", block_size=1)
        try:
            whole = msgspec.json.decode(files.get("config.json", b"{}"), type=_Config)
        except UNREADABLE:
            whole = _Config()
        config = whole.text_config or whole
        head = config.head_dim or config.hidden_size // max(1, config.num_attention_heads)
        heads = config.num_key_value_heads or config.num_attention_heads
        return cls(tuple(card.eos_token_ids), config.vocab_size, 2 * 2 * config.num_hidden_layers * heads * head)


def _options(
    settings: WorkerSettings, worker: WorkerId, vocabulary: Vocabulary, model: ModelFiles, vocab_size: int
) -> AdoptOptions:
    return AdoptOptions(
        worker=worker,
        role=settings.worker_role,
        has_handover=settings.handover_mode is not None,
        vocab_size=model.vocab_size or vocab_size,
        vocabulary=vocabulary.names,
        eos=model.eos,
        max_batch=settings.max_batch or 1,
        max_step_tokens=settings.max_step_tokens or 1,
        lease_s=settings.lease_s,
        bytes_per_token=model.bytes_per_token,
    )
