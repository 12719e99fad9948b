"""The simulated engine behind plain OpenAI HTTP, for others' gateways: `python -m workers.sim.plain --port 9001`.

The same engine with the same settings as `headrace worker --engine sim`, without etcd, NATS and frames, so that
gateways can be compared before equal workers. Chat completions, completions, responses and messages, streamed or whole;
a prompt's tokens are its bytes; fields that would change an answer's form are ignored. One write per stream and step.
"""

import asyncio
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, cast

import httptools
import msgspec
import numpy as np
import structlog
import uvloop
from cyclopts import Parameter

from planes.wire.frames import FinishReason, Sampling
from planes.wire.messages import KvEvent, RequestId, StepSample, WorkerId
from planes.wire.unreadable import UNREADABLE
from process import logging as logs
from process.settings import command_line, run
from workers.answer.detokenizer import Vocabulary, load_vocabulary
from workers.engine.base import Engine, EngineOutput, EngineRequest
from workers.engine.make import make_engine
from workers.settings import WorkerSettings
from workers.sim.plain_answers import DIALECTS, Answer, chunk, head, message

_log = structlog.get_logger()
_DEFAULT_TOKENS = 16
app = command_line("python -m workers.sim.plain", "The simulated engine behind plain OpenAI HTTP.")


class _Nobody:
    """Hears what the engine tells, and does nothing: there is no gateway of ours."""

    def kv_changed(self, events: list[KvEvent]) -> None: ...

    def stepped(self, sample: StepSample) -> None: ...

    def died(self, reason: str) -> None: ...


class PlainServer:
    """What all connections share.  vocabulary: texts of the engine's tokens."""

    def __init__(self, engine: Engine, model: str, vocabulary: Vocabulary) -> None:
        self.engine, self.model = engine, model
        self._texts = [text.decode(errors="replace") for text in vocabulary.texts]
        self._serial = 0
        self._listener: asyncio.Server | None = None

    async def listen(self, host: str, port: int) -> int:
        """Returns the port."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(lambda: _Connection(self), host, port, backlog=4096)
        bound: int = self._listener.sockets[0].getsockname()[1]
        return bound

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()

    def text_of(self, tokens: tuple[int, ...]) -> str:
        return "".join([self._texts[token] for token in tokens])

    def submit(self, body: dict[str, Any], on_output: Callable[[EngineOutput], None]) -> tuple[RequestId, int]:
        """Returns the request's id and how many tokens its prompt has."""
        self._serial += 1
        request = RequestId(f"plain-{self._serial}")
        prompt = np.frombuffer(_prompt_of(body), dtype=np.uint8).astype(np.uint32)
        limits = [body[name] for name in ("max_completion_tokens", "max_tokens", "max_output_tokens") if body.get(name)]
        sampling = Sampling(max_tokens=next(iter(limits), _DEFAULT_TOKENS), ignore_eos=bool(body.get("ignore_eos")))
        self.engine.submit(EngineRequest(request, prompt, sampling), on_output)
        return request, len(prompt)


def _prompt_of(body: dict[str, Any]) -> bytes:
    """All the text that there is, in its order."""
    found: list[str] = []

    def collect(value: Any) -> None:
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, list):
            for item in value:
                collect(item)
        elif isinstance(value, dict):
            collect(value.get("content", value.get("text")))

    for name in ("system", "instructions", "messages", "input", "prompt"):
        collect(body.get(name))
    return "\n".join(found).encode() or b" "


class _Connection(asyncio.Protocol):
    """One client; its requests follow each other."""

    def __init__(self, server: PlainServer) -> None:
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self._path, self._body = b"", b""
        self._request: RequestId | None = None
        self._answer: Answer | None = None
        self._is_streaming = False
        self._text: list[str] = []
        self._num_tokens = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        if self._request is not None:
            self._server.engine.abort(self._request)
            self._request = None

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()

    # --- httptools --------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._path, self._body = b"", b""

    def on_url(self, url: bytes) -> None:
        self._path += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        path = self._path.split(b"?")[0].decode("latin-1")
        dialect = DIALECTS.get(path)
        if dialect is None:
            self._transport.write(self._known(path))
            return
        try:
            body = msgspec.json.decode(self._body, type=dict[str, Any])
        except UNREADABLE as exc:
            self._transport.write(message(400, {"error": {"message": str(exc)}}))
            return
        self._text, self._num_tokens = [], 0
        self._is_streaming = bool(body.get("stream"))
        self._request, num_prompt_tokens = self._server.submit(body, self._on_output)
        self._answer = dialect(self._request, self._server.model, num_prompt_tokens)

    def _known(self, path: str) -> bytes:
        server = self._server
        card = {"id": server.model, "object": "model", "created": 0, "owned_by": "headrace"}
        facts = {"model_path": server.model, "served_model_name": server.model, "tokenizer_path": server.model}
        answers: dict[str, Any] = {
            "/health": {"status": "ok"},
            "/v1/models": {"object": "list", "data": [card]},
            "/get_model_info": facts,
            "/model_info": facts,
            "/get_server_info": facts,
            "/server_info": facts,
            "/version": {"version": "0"},
        }
        if path not in answers:
            return message(404, {"error": {"message": f"{path} is none of {', '.join([*DIALECTS, *answers])}"}})
        return message(200, answers[path])

    # --- the engine -------------------------------------------------------------------------------------------------

    def _on_output(self, output: EngineOutput) -> None:
        answer = self._answer
        if answer is None:
            return
        if output.finish is FinishReason.ERROR:
            self._fail(output.error)
            return
        text = self._server.text_of(output.tokens)
        is_first = not self._num_tokens
        self._num_tokens += len(output.tokens)
        if not self._is_streaming:
            self._text.append(text)
        else:
            events = (answer.begin() if is_first else b"") + (answer.delta(text) if text else b"")
            if output.finish is not None:
                events += answer.end(self._num_tokens, output.finish.value)
            written = (head(200, "text/event-stream") if is_first else b"") + chunk(events)
            self._transport.write(written + (chunk(b"") if output.finish is not None else b""))
        if output.finish is not None:
            if not self._is_streaming:
                whole = answer.whole("".join(self._text), self._num_tokens, output.finish.value)
                self._transport.write(message(200, whole))
            self._request = self._answer = None

    def _fail(self, error: str) -> None:
        if self._is_streaming and self._num_tokens:
            self._transport.close()
        else:
            self._transport.write(message(503, {"error": {"message": error}}))
        self._request = self._answer = None


@app.default
def main(settings: Annotated[WorkerSettings | None, Parameter(name="*")] = None) -> int:
    """Run it until SIGTERM or SIGINT."""
    settings = replace(settings or WorkerSettings(), engine="sim", handover="none")
    logs.configure(settings.log_level, as_json=settings.log_json)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(settings))


async def _serve(settings: WorkerSettings) -> int:
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ending.set)
    vocabulary = load_vocabulary(settings.model_path / "tokenizer.json")
    engine = make_engine(settings, WorkerId(settings.new_worker_id()), vocab_size=len(vocabulary.names))
    await engine.start(_Nobody(), progress=lambda _step: None)
    server = PlainServer(engine, settings.model_name, vocabulary)
    port = await server.listen(settings.host, settings.port)
    _log.info("http.listening", host=settings.host, port=port)
    await ending.wait()
    server.close()
    await engine.stop()
    return 0


if __name__ == "__main__":
    sys.exit(run(app))
