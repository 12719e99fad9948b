"""One VllmEngine in a process of its own, driven by JSON lines: commands on standard input, news on standard output."""

import asyncio
import base64
import os
import sys

import msgspec
import numpy as np
import uvloop

from planes.wire.blocks import unpack
from planes.wire.errors import InvalidRequest
from planes.wire.frames import Leg, Parsing, Sampling
from planes.wire.messages import AllCleared, BlocksRemoved, BlocksStored, RequestId
from workers.engine.base import EngineRequest, EngineStartError
from workers.vllm.engine import VllmEngine, VllmOptions


class Run(msgspec.Struct, tag="run"):
    id: str
    prompt: list[int]
    sampling: Sampling
    leg: Leg
    resume: list[int] = []
    salt: str = ""
    parsing: Parsing | None = None
    is_embedding: bool = False


class Abort(msgspec.Struct, tag="abort"):
    id: str


class Load(msgspec.Struct, tag="load"):
    pass


class Stop(msgspec.Struct, tag="stop"):
    pass


def say(kind, **fields):
    os.write(OUT, msgspec.json.encode({"kind": kind} | fields) + b"\n")


class Observer:
    def __init__(self):
        self.held = set()

    def kv_changed(self, events):
        for event in events:
            match event:
                case BlocksStored():
                    self.held |= set(unpack(event.hashes).tolist())
                case BlocksRemoved():
                    self.held -= set(unpack(event.hashes).tolist())
                case AllCleared():
                    self.held.clear()
        say("held", names=[str(name) for name in self.held])

    def stepped(self, sample):
        say("step", sample=msgspec.to_builtins(sample))

    def died(self, reason):
        say("died", reason=reason)


class TellingEngine(VllmEngine):
    """Tells with which of the engine's reports a KV cache came: with that of a step, or of none."""

    def _recorded(self, stats, finished):
        super()._recorded(stats, finished)
        report = (stats.kv_connector_stats or {}).get("headrace", {}) if stats is not None else {}
        for engine_request, *_ in report.get("handovers", ()):
            say("arrived", id=engine_request[:-9], is_between_steps="step" not in report)


def run(engine, command):
    def emit(output):
        plain = msgspec.to_builtins(output, enc_hook=str)
        plain["ticket"] = (
            None if output.ticket is None else base64.b64encode(msgspec.msgpack.encode(output.ticket)).decode()
        )
        say("output", id=command.id, **plain)

    request = EngineRequest(
        RequestId(command.id),
        np.array(command.prompt, dtype=np.uint32),
        command.sampling,
        command.leg,
        tuple(command.resume),
        command.salt,
        parsing=command.parsing,
        is_embedding=command.is_embedding,
    )
    try:
        engine.submit(request, emit)
    except InvalidRequest as exc:
        say("invalid", id=command.id, message=str(exc), param=exc.param, code=exc.code)


async def main(options):
    engine = TellingEngine(options)
    try:
        await engine.start(Observer(), progress=lambda line: say("progress", line=line))
    except EngineStartError as exc:
        say("refused", message=str(exc))
        await engine.stop()
        return
    say("ready", facts=engine.facts, endpoint=engine.endpoint, pids=engine.process_ids)
    reader = asyncio.StreamReader(limit=1 << 20)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    decoder = msgspec.json.Decoder(Run | Abort | Load | Stop)
    while True:
        match decoder.decode(await reader.readline() or b'{"type":"stop"}'):
            case Run() as command:
                run(engine, command)
            case Abort(id=name):
                engine.abort(RequestId(name))
            case Load():
                say("load", **msgspec.to_builtins(engine.load()))
            case Stop():
                await engine.stop()
                say("stopped")
                return


if __name__ == "__main__":
    OUT = os.dup(1)  # what anybody else prints must not come between our lines
    os.dup2(2, 1)
    options = msgspec.json.decode(sys.argv[1].encode(), type=VllmOptions, dec_hook=lambda kind, value: kind(value))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(options))
