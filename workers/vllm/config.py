"""How vLLM is set up: the options of a worker's engine, and vLLM's own configuration made from them."""

import ctypes
import importlib.util
import os
import random
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from planes.wire.messages import HandoverMode, LatencyPrior, Role, WorkerId
from workers.engine.base import EngineStartError
from workers.nixl_wheel import WHEELS, installed_wheel
from workers.vllm.memory import check_memory
from workers.vllm.pooling import TASK

VERSION = "0.32.0"
"""The plug-in reaches into vLLM: another version needs its tests run and this line changed."""

PLUGIN = "workers.vllm.plugin"
"""Where vLLM finds ours, by name and in its own process."""

NIXL_VERSION = "1.5.1"

DEFAULT_CONTEXT = 2048

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
    """None: `DEFAULT_CONTEXT` tokens, or all that the model knows positions for, if they are fewer."""
    block_size: int = 32
    max_num_seqs: int = 32
    max_num_batched_tokens: int | None = None
    """None: 2048, on CPU few for a decode worker (`CPU_DECODE_STEP_TOKENS`), and for vectors at least a whole prompt
    where one cannot be computed in pieces."""
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

    if vllm.__version__ != VERSION:
        raise EngineStartError(f"vLLM {vllm.__version__} is installed and this worker is written for {VERSION}")
    is_cpu, kv_cache_bytes = current_platform.is_cpu(), options.kv_cache_bytes
    check_accelerator(current_platform, tensor_parallel=options.tensor_parallel)
    if options.handover is not None:
        check_nixl(torch.version.cuda)
    if is_cpu:
        check_library("libnuma.so.1", package="libnuma1")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the executor then needs no process of its own
        # The first request for logprobs would wait for a C++ compiler, and all others with it (18 s measured).
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
        kv_cache_bytes = kv_cache_bytes or CPU_KV_CACHE_BYTES
        check_memory(options.model_path, kv_cache_bytes, dtype=options.dtype)
    more: dict[str, Any] = {} if kv_cache_bytes is None else {"kv_cache_memory_bytes": kv_cache_bytes}
    if kv_cache_bytes is not None and not is_cpu:
        # vLLM would still ask for 0.92 of the whole device to be free, and refuse a second worker on one GPU.
        more["gpu_memory_utilization"] = 0.01
    args = AsyncEngineArgs(
        model=str(options.model_path.resolve()),
        served_model_name=options.model,
        dtype=options.dtype,
        load_format=options.load_format,
        max_model_len=options.max_model_len,
        block_size=options.block_size,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens or _step_tokens(options, is_cpu=is_cpu),
        **_runner(options),
        tensor_parallel_size=options.tensor_parallel,
        enforce_eager=is_cpu,
        worker_extension_cls=f"{PLUGIN}.BeforeLoading",
        skip_tokenizer_init=not options.reasoning_parser,  # grammars have their own (`grammar_process.py`)
        reasoning_parser=options.reasoning_parser,
        scheduling_policy="priority",
        prefix_caching_hash_algo="sha256_cbor",
        prefix_cache_retention_interval=None,
        kv_transfer_config=None if options.handover is None else KVTransferConfig(**_handover(options, is_cpu=is_cpu)),
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", **events),
        shutdown_timeout=options.drain_s,
        disable_log_stats=True,
        **more,
    )
    if options.max_model_len is None:
        args.max_model_len = min(DEFAULT_CONTEXT, args.create_model_config().max_model_len)
    config = args.create_engine_config()
    scheduler = "AsyncScheduler" if config.scheduler_config.async_scheduling else "Scheduler"
    config.scheduler_config.scheduler_cls = f"{PLUGIN}.{scheduler}"
    return config


def _runner(options: VllmOptions) -> dict[str, Any]:
    """What of a prompt for a vector may be computed before, or in pieces, vLLM knows from the model's attention."""
    if options.is_embedding:
        return {"runner": "pooling", "convert": TASK}
    return {"enable_prefix_caching": True}


def _step_tokens(options: VllmOptions, *, is_cpu: bool) -> int | None:
    """None: as many as vLLM takes by itself, at least a whole prompt where one cannot be computed in pieces."""
    if options.is_embedding:
        return None
    if is_cpu and options.role is Role.DECODE:
        return max(CPU_DECODE_STEP_TOKENS.get(options.dtype, CPU_DECODE_STEP_TOKENS["float32"]), options.max_num_seqs)
    return 2048


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


class Platform(Protocol):
    """What is needed of `vllm.platforms.current_platform`."""

    def is_cpu(self) -> bool: ...
    def is_unspecified(self) -> bool: ...
    def device_count(self) -> int: ...


def check_accelerator(platform: Platform, *, tensor_parallel: int) -> None:
    """vLLM itself goes on without a device and fails later, with a message about device strings.

    Raises:  EngineStartError.
    """
    if platform.is_cpu():
        return
    num_visible = 0 if platform.is_unspecified() else platform.device_count()
    if num_visible < tensor_parallel:
        mask = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = "no GPU is visible" if not num_visible else f"{num_visible} GPUs are visible"
        raise EngineStartError(
            f"{seen} to vLLM, which is built for GPUs here, and this worker needs {tensor_parallel} "
            f"(--tensor-parallel). In a container: docker run --gpus all. Does nvidia-smi list the GPUs? If not, the "
            f"driver is missing; if so, it may be too old for this build, or CUDA_VISIBLE_DEVICES "
            f"({'not set' if mask is None else repr(mask)}) hides them. Without GPUs: make install EXTRA=cpu, the "
            f"image's FLAVOR=cpu, or --engine sim"
        )


def check_nixl(cuda_version: str | None, *, find: Callable[[str], Any] = importlib.util.find_spec) -> None:
    """cuda_version: torch's, such as 13.0; None on CPU.  Raises:  EngineStartError if there is no NIXL for it."""
    if find("nixl") is not None:  # the wheel that chooses among the others itself
        return
    installed = installed_wheel(cuda_version, find=find)
    fitting = WHEELS.get((cuda_version or "").partition(".")[0], installed)
    if installed is None or installed != fitting:
        wanted = (fitting or WHEELS["12"]).replace("_", "-")
        there = "is not installed" if installed is None else f"is here for another CUDA ({installed})"
        torch = "" if cuda_version is None else f", and torch is built for CUDA {cuda_version}"
        raise EngineStartError(
            f"a handover needs NIXL, which {there}{torch}: pip install {wanted}=={NIXL_VERSION}, or --handover none"
        )


def check_library(name: str, *, package: str) -> None:
    """vLLM's CPU build only warns of a missing library and fails later, nameless.  Raises:  EngineStartError."""
    try:
        ctypes.CDLL(name)
    except OSError as exc:
        raise EngineStartError(f"vLLM on CPU needs {name}: apt-get install {package} ({exc})") from exc


def eos_tokens(model_path: Path) -> list[int]:
    """Token ids that end an answer, from `generation_config.json`, else from `config.json`."""
    for name in ("generation_config.json", "config.json"):
        file = model_path / name
        eos = msgspec.json.decode(file.read_bytes()).get("eos_token_id") if file.is_file() else None
        if eos is not None:
            return [eos] if isinstance(eos, int) else list(eos)
    return []


def check_model_dir(options: VllmOptions) -> None:
    path = options.model_path
    if not (path / "config.json").is_file():
        what = "has no config.json" if path.is_dir() else "is no directory"
        raise EngineStartError(f"the model {path} {what}: name a directory with config.json and *.safetensors")
    if options.load_format != "dummy" and not any(path.glob("*.safetensors")):
        raise EngineStartError(f"the model {path} has no *.safetensors, the only weights that are read")


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
