"""How vLLM is set up: the options of a worker's engine, and vLLM's own configuration made from them."""

import os
import random
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planes.wire.messages import HandoverMode, LatencyPrior, Role, WorkerId
from workers.engine.base import EngineStartError
from workers.vllm.arguments import engine_arguments
from workers.vllm.memory import check_memory
from workers.vllm.pooling import TASK
from workers.vllm.requirements import check_accelerator, check_library, check_nixl

VERSION = "0.32.0"
"""The plug-in reaches into vLLM: another version needs its tests run and this line changed."""

PLUGIN = "workers.vllm.plugin"
"""Where vLLM finds ours, by name and in its own process."""

CPU_CONTEXT = 2048

CPU_SEQUENCES = 32

CPU_STEP_TOKENS = 2048

CPU_KV_CACHE_BYTES = 256 << 20

CPU_DECODE_STEP_TOKENS = {"bfloat16": 48, "float32": 40}
"""Tokens that a decode worker on CPU computes in one step, by what it computes in. A step streams the weights whatever
it computes, which takes about as long as 40 tokens more: chats beside a prompt become slower, two times or so, rather
than standing still. Where bfloat16 is native a step is so short (0.05 s) that a few tokens more do no harm."""

CPU_PRIOR = LatencyPrior(
    prefill_fixed_s=0.03,
    prefill_per_token_s=1 / 450,
    prefill_per_pair_s=5e-8,
    step_fixed_s=0.1,
    step_per_sequence_s=0.01,
    step_per_kv_token_s=1e-6,
    handover_fixed_s=0.02,
    handover_bytes_per_s=1e9,
)
"""One core of a common server and the demo model; the router learns the rest."""


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """How to run vLLM. Both ends of a handover need the same model path, dtype, block size and mode."""

    model_path: Path
    """A directory with `config.json` and safetensors."""
    model: str
    """The name that clients use; it salts the block names."""
    worker: WorkerId
    role: Role = Role.BOTH
    handover: HandoverMode | None = HandoverMode.PULL
    """None: this worker prefills what it decodes."""
    is_embedding: bool = False
    """Whether it makes vectors of prompts (`pooling.py`), and hands nothing over."""
    host: str = "127.0.0.1"
    """Where other workers reach this engine's handshake."""
    dtype: str = "auto"
    """auto: what the model was made in."""
    max_model_len: int | None = None
    """None: all that the model knows positions for, on CPU `CPU_CONTEXT` tokens at most."""
    block_size: int = 32
    max_num_seqs: int | None = None
    """None: as many as vLLM's server takes on this platform, on CPU `CPU_SEQUENCES`."""
    max_num_batched_tokens: int | None = None
    """None: likewise; on CPU `CPU_STEP_TOKENS`, few for a decode worker (`CPU_DECODE_STEP_TOKENS`), and for vectors at
    least a whole prompt where one cannot be computed in pieces."""
    kv_cache_bytes: int | None = None
    """None: what is left of the accelerator's memory, 256 MiB on CPU."""
    threads: int = 1
    """OpenMP threads (CPU)."""
    cores: tuple[int, ...] = ()
    """Cores for the engine process (CPU); empty: all that this process may use."""
    tensor_parallel: int = 1
    lease_s: int = 30
    """How long a prefilled KV cache waits for its decode worker's first sign of life."""
    drain_s: int = 10
    """How long `stop` waits for leased KV caches to be fetched and for vLLM to end; then it is killed."""
    push_timeout_s: float = 30.0
    """How long a decode leg waits for a WRITE: vLLM would wait for ever."""
    step_timeout_s: float = 120.0
    """An engine with work that says nothing for so long is given up."""
    load_format: str = "auto"
    """`dummy` for random weights."""
    reasoning_parser: str = ""
    """vLLM's name of the one that tells where reasoning ends, which grammars and budgets depend on; empty: none."""
    arguments: tuple[str, ...] = ()
    """More of vLLM's own, as on its command line; they count instead of the above (`arguments.py`)."""
    arguments_file: Path | None = None
    """Likewise, in vLLM's form of a YAML file."""

    @property
    def roles(self) -> tuple[Role, ...]:
        """What it can become while it runs; empty: nothing else.

        Its connector is made for one side of a handover or for both. vLLM puts off the reuse of blocks only where KV
        caches may arrive, so that one made for giving must not take.
        """
        return tuple(Role) if self.role is Role.BOTH and self.handover is not None else ()


def engine_config(options: VllmOptions, events: dict[str, str]) -> Any:
    """Import vLLM and make its configuration. The environment must be set first, some of it before torch."""
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    for name, value in (
        ("VLLM_NO_USAGE_STATS", "1"),
        ("HF_HUB_OFFLINE", "1"),
        ("VLLM_LOGGING_LEVEL", "WARNING"),
        ("VLLM_LOGGING_STREAM", "ext://sys.stderr"),
    ):
        os.environ.setdefault(name, value)
    if options.handover is not None:
        os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"] = options.host
        os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(_free_port(options.host))
    import torch  # noqa: PLC0415 - these take seconds and half a gigabyte
    import vllm  # noqa: PLC0415
    from vllm.config import KVEventsConfig, KVTransferConfig  # noqa: PLC0415
    from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: PLC0415
    from vllm.platforms import current_platform  # noqa: PLC0415
    from vllm.usage.usage_lib import UsageContext  # noqa: PLC0415

    if vllm.__version__ != VERSION:
        raise EngineStartError(f"vLLM {vllm.__version__} is installed and this worker is written for {VERSION}")
    is_cpu = current_platform.is_cpu()
    check_accelerator(current_platform, num_gpus=options.tensor_parallel)  # without one vLLM's parser fails, too
    given = engine_arguments(options.arguments, options.arguments_file)
    settled = {**_settled(options, is_cpu=is_cpu), **given}
    check_accelerator(current_platform, num_gpus=_num_gpus(settled))
    if options.handover is not None:
        check_nixl(torch.version.cuda)
    if is_cpu:
        check_library("libnuma.so.1", package="libnuma1")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the executor then needs no process of its own
        # The first request for logprobs would wait for a C++ compiler, and all others with it (18 s measured).
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
        check_memory(options.model_path, settled["kv_cache_memory_bytes"], dtype=str(settled["dtype"]))
    settled.setdefault("max_num_batched_tokens", _step_tokens(options, settled, is_cpu=is_cpu))
    args = AsyncEngineArgs(
        model=str(options.model_path.resolve()),
        served_model_name=options.model,
        **_runner(options),
        worker_extension_cls=f"{PLUGIN}.BeforeLoading",
        skip_tokenizer_init=not options.reasoning_parser,  # grammars have their own (`grammar_process.py`)
        reasoning_parser=options.reasoning_parser,
        scheduling_policy="priority",
        prefix_caching_hash_algo="sha256_cbor",
        prefix_cache_retention_interval=None,
        kv_transfer_config=None if options.handover is None else KVTransferConfig(**_handover(options, is_cpu=is_cpu)),
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", **events),
        disable_log_stats=True,
        **settled,
    )
    if is_cpu and args.max_model_len is None:
        args.max_model_len = min(CPU_CONTEXT, args.create_model_config().max_model_len)
    config = args.create_engine_config(UsageContext.OPENAI_API_SERVER)  # whose defaults `vllm serve` has
    scheduler = "AsyncScheduler" if config.scheduler_config.async_scheduling else "Scheduler"
    config.scheduler_config.scheduler_cls = f"{PLUGIN}.{scheduler}"
    return config


def _settled(options: VllmOptions, *, is_cpu: bool) -> dict[str, Any]:
    """What the operator's own engine arguments may replace."""
    kv_cache_bytes = options.kv_cache_bytes or (CPU_KV_CACHE_BYTES if is_cpu else None)
    settled: dict[str, Any] = {
        "dtype": options.dtype,
        "load_format": options.load_format,
        "max_model_len": options.max_model_len,
        "block_size": options.block_size,
        "max_num_seqs": options.max_num_seqs or (CPU_SEQUENCES if is_cpu else None),
        "tensor_parallel_size": options.tensor_parallel,
        "enforce_eager": is_cpu,
        "shutdown_timeout": options.drain_s,
    }
    if not options.is_embedding:
        settled["enable_prefix_caching"] = True
    if options.max_num_batched_tokens is not None:
        settled["max_num_batched_tokens"] = options.max_num_batched_tokens
    if kv_cache_bytes is not None:
        settled["kv_cache_memory_bytes"] = kv_cache_bytes
    if kv_cache_bytes is not None and not is_cpu:
        # vLLM would still ask for 0.92 of the whole device to be free, and refuse a second worker on one GPU.
        settled["gpu_memory_utilization"] = 0.01
    return settled


def _num_gpus(settled: dict[str, Any]) -> int:
    """That this machine must have at least: where Ray places the parts of an engine, one."""
    if settled.get("distributed_executor_backend") == "ray":
        return 1
    parts = int(settled["tensor_parallel_size"]) * int(settled.get("pipeline_parallel_size", 1))
    return -(-parts // int(settled.get("nnodes", 1)))


def _runner(options: VllmOptions) -> dict[str, Any]:
    """What of a prompt for a vector may be computed before, or in pieces, vLLM knows from the model's attention."""
    return {"runner": "pooling", "convert": TASK} if options.is_embedding else {}


def _step_tokens(options: VllmOptions, settled: dict[str, Any], *, is_cpu: bool) -> int | None:
    """None: as many as vLLM takes by itself, at least a whole prompt where one cannot be computed in pieces."""
    if options.is_embedding or not is_cpu:
        return None
    if options.role is Role.DECODE:
        few = CPU_DECODE_STEP_TOKENS.get(str(settled["dtype"]), CPU_DECODE_STEP_TOKENS["float32"])
        return max(few, int(settled["max_num_seqs"]))
    return CPU_STEP_TOKENS


def _handover(options: VllmOptions, *, is_cpu: bool) -> dict[str, Any]:
    return {
        "kv_connector": "NixlPullConnector" if options.handover is HandoverMode.PULL else "NixlPushConnector",
        "kv_connector_module_path": PLUGIN,
        "kv_role": {Role.PREFILL: "kv_producer", Role.DECODE: "kv_consumer", Role.BOTH: "kv_both"}[options.role],
        "engine_id": f"{options.worker}-{time.time_ns():x}",
        **({"kv_buffer_device": "cpu"} if is_cpu else {}),  # else vLLM takes the platform's own
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {
            "kv_lease_duration": options.lease_s,
            "push_registration_timeout": options.push_timeout_s,
        },
    }


def _free_port(host: str) -> int:
    """A free port below the range from which the kernel hands out its own, so that nobody gets it by chance."""
    for _ in range(100):
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise EngineStartError(
        f"no port of {host} between 20000 and 32000 is free for the handshake: is it an address of this machine?"
    )
