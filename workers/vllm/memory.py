"""What this machine can bear, asked before vLLM starts: the kernel's answer comes later and is final."""

from pathlib import Path
from typing import Any

import msgspec

from planes.wire.unreadable import UNREADABLE
from workers.engine.base import EngineStartError

_OVERHEAD_BYTES = 1_400 << 20
"""Measured: torch and vLLM in two processes, activations of a small model."""

_MAX_HEADER_BYTES = 100 << 20
"""What safetensors itself accepts."""

_BYTES_PER_VALUE = {"float": 4, "float32": 4}


def check_memory(
    model: Path, kv_cache_bytes: int, *, dtype: str, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")
) -> None:
    """For engines on CPU, which keep the output layer twice: as loaded and packed for the processor's matrix units.

    The largest tensor is taken for it.

    Raises:  EngineStartError if weights, KV cache and vLLM itself need more than is available.
    """
    files = list(model.glob("*.safetensors"))  # two bytes a value
    stored = sum(file.stat().st_size for file in files) + max(map(_largest_tensor, files), default=0)
    weights = stored * _BYTES_PER_VALUE.get(dtype, 2) // 2
    needed = weights + kv_cache_bytes + _OVERHEAD_BYTES
    available = available_bytes(proc, cgroup)
    if needed > available:
        raise EngineStartError(
            f"the engine needs about {needed >> 20} MiB (weights {weights >> 20}, KV cache {kv_cache_bytes >> 20}, "
            f"vLLM {_OVERHEAD_BYTES >> 20}) and {available >> 20} MiB are available: "
            "run fewer workers, a smaller KV cache or a smaller model"
        )


def _largest_tensor(file: Path) -> int:
    """Bytes, from the header of a file: its length in eight bytes, then JSON.  Source: safetensors' README."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            header = msgspec.json.decode(opened.read(min(length, _MAX_HEADER_BYTES)), type=dict[str, dict[str, Any]])
        except UNREADABLE as exc:
            raise EngineStartError(f"{file} is no file of safetensors: {exc}") from exc
    spans = [tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__"]
    return max((end - begin for begin, end in spans), default=0)


def available_bytes(proc: Path, cgroup: Path) -> int:
    """What the machine has left, or the container's limit if that is lower."""
    fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return available
