"""What a `vllm serve` of 0.32 with all the flags says, as recorded, from a server in the test's own process."""

import asyncio
import contextlib
import copy

import msgspec

from workers.adopted.http import Address, HttpClient

PATIENCE_S = 180.0
"""A deadline for what should happen soon; only a failing test waits so long."""
MODEL = {
    "id": "demo",
    "object": "model",
    "created": 1795886285,
    "owned_by": "vllm",
    "root": "/models/smollm2",
    "parent": None,
    "max_model_len": 1024,
    "permission": [{"id": "modelperm-83125da8608ac879", "object": "model_permission"}],
}
SOURCE = {
    "enable_kv_cache_events": True,
    "publisher": "zmq",
    "endpoint": "tcp://*:15557",
    "replay_endpoint": "tcp://*:15558",
    "buffer_steps": 10000,
    "hwm": 100000,
    "max_queue_size": 100000,
    "topic": "",
}
METRICS = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="demo"} 2.0
vllm:num_requests_waiting{engine="0",model_name="demo"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="demo",reason="capacity"} 1.0
vllm:kv_cache_usage_perc{engine="0",model_name="demo"} 0.25
vllm:cache_config_info{_block_size_resolved="True",block_size="4",cache_dtype="auto",\
enable_prefix_caching="True",engine="0",kv_cache_dtype_skip_layers="[]",num_gpu_blocks="68"} 1.0
"""
KEPT = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[1, 2, 3, 4, 5, 6, 7, 8]],
    "remote_engine_id": "207e33aa-e1ab-43a9-91c5-c8d56eca3e94",
    "remote_request_id": "generate-tokens-r1-82831016",
    "remote_host": "10.0.0.7",
    "remote_port": 5600,
    "tp_size": 1,
    "dcp_size": 1,
    "pp_size": 1,
    "remote_num_tokens": 32,
    "remote_blocks_expiry_time": None,
    "transfer_mode": "pull",
    "remote_prefill_cached_tokens": 0,
}


def choice(tokens, finish=None, *, index=0, logprobs=None):
    return {
        "index": index,
        "finish_reason": finish,
        "stop_reason": None,
        "token_ids": tokens,
        "routed_experts": None,
        "sampling_mask": None,
        "weight_versions": None,
        "logprobs": logprobs,
    }


def chunk(tokens, finish=None, *, index=0, logprobs=None):
    """Of a stream."""
    return {
        "request_id": "generate-tokens-r1",
        "usage": None,
        "output_mode": "tokens",
        "choices": [choice(tokens, finish, index=index, logprobs=logprobs)],
    }


def usage(cached):
    return {
        "request_id": "generate-tokens-r1",
        "usage": {
            "prompt_tokens": 8,
            "total_tokens": 10,
            "completion_tokens": 2,
            "prompt_tokens_details": {"cached_tokens": cached},
        },
        "output_mode": "tokens",
        "choices": [],
    }


def whole(tokens, finish="length", *, cached=0, kept=None, prompt_logprobs=None):
    """An answer that is not streamed."""
    return usage(cached) | {
        "model": "demo",
        "created": 1795886286,
        "prompt_logprobs": prompt_logprobs,
        "prompt_token_ids": None,
        "kv_transfer_params": kept,
        "ec_transfer_params": None,
        "choices": [choice(tokens, finish)],
    }


def error(code, message="it is wrong", param=None):
    return {"error": {"message": message, "type": "BadRequestError", "param": param, "code": code}}


def streamed(answers):
    return [*answers, b"[DONE]"]


class VllmServer:
    """Answers on a port of its own. `generate` is told each body and gives (status, answer): a list is streamed, whose
    members are sent one by one; an asyncio.Event among them is waited for, and None breaks the connection.
    """

    def __init__(self, generate=None):
        self.models = {"object": "list", "data": [MODEL]}
        self.sources = {"0": copy.deepcopy(SOURCE)}
        self.metrics = METRICS
        self.health = 200
        self.forbids_tokens = False
        self.wants_key = False
        self.generate = generate or (lambda body: (200, whole([7])))
        self.bodies = []
        self.heads = []
        self.looks = asyncio.Queue()
        """One for each time that its health was asked for."""
        self.closed = asyncio.Event()
        """Somebody went before all had been said."""
        self._writers = set()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = Address("127.0.0.1", self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, *_):
        await self.stop()

    async def stop(self):
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._server.wait_closed(), 5)

    def client(self, **options):
        return HttpClient(self.address, **options)

    async def _serve(self, reader, writer):
        self._writers.add(writer)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            method, path, _ = head.split(" ", 2)
            length = next((int(line[15:]) for line in head.splitlines() if line.startswith("Content-Length")), 0)
            body = await reader.readexactly(length)
            await self._answer(method, path, body, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.closed.set()
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, method, path, body, reader, writer):
        match path:
            case _ if self.wants_key and path.startswith("/v1"):
                self._say(writer, 401, b'{"error":"Unauthorized"}')
            case "/inference/v1/generate" if self.forbids_tokens:
                self._say(writer, 403, msgspec.json.encode(error(403, "Scale-out endpoints are disabled.")))
            case "/health":
                self.looks.put_nowait(None)
                self._say(writer, self.health, b"")
            case "/v1/models":
                self._say(writer, 200, msgspec.json.encode(self.models))
            case "/version":
                self._say(writer, 200, b'{"version":"0.32.0"}')
            case "/kv_event_sources":
                self._say(writer, 200, msgspec.json.encode(self.sources))
            case "/metrics":
                self._say(writer, 200, self.metrics.encode())
            case "/inference/v1/generate":
                asked = msgspec.json.decode(body)
                self.bodies.append(asked)
                status, answer = (400, error(400)) if asked == {} else self.generate(asked)
                if isinstance(answer, list):
                    await self._stream(answer, reader, writer)
                else:
                    self._say(writer, status, msgspec.json.encode(answer))
            case _:
                self._say(writer, 404, b"{}")

    @staticmethod
    def _say(writer, status, body):
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)

    async def _stream(self, answers, reader, writer):
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        gone = asyncio.ensure_future(reader.read(1))
        for answer in answers:
            if answer is None:
                writer.transport.abort()
                return
            if isinstance(answer, asyncio.Event):
                waiting = asyncio.ensure_future(answer.wait())
                await asyncio.wait((gone, waiting), return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
                if gone.done():
                    self.closed.set()
                    return
                continue
            data = b"data: " + (answer if isinstance(answer, bytes) else msgspec.json.encode(answer)) + b"\n\n"
            writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        gone.cancel()
