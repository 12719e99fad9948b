"""What must be on this machine before vLLM starts; without it vLLM fails later, and says less."""

import ctypes
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec

from workers.engine.base import EngineStartError
from workers.nixl_wheel import WHEELS, installed_wheel

NIXL_VERSION = "1.5.1"


class Platform(Protocol):
    """What is needed of `vllm.platforms.current_platform`."""

    def is_cpu(self) -> bool: ...
    def is_unspecified(self) -> bool: ...
    def device_count(self) -> int: ...


def check_accelerator(platform: Platform, *, num_gpus: int) -> None:
    """vLLM itself goes on without a device and fails later, with a message about device strings.

    Raises:  EngineStartError.
    """
    if platform.is_cpu():
        return
    num_visible = 0 if platform.is_unspecified() else platform.device_count()
    if num_visible < num_gpus:
        mask = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = "no GPU is visible" if not num_visible else f"{num_visible} GPUs are visible"
        raise EngineStartError(
            f"{seen} to vLLM, which is built for GPUs here, and this worker needs {num_gpus} "
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


def check_model_dir(path: Path, *, load_format: str) -> None:
    """Raises:  EngineStartError if it holds no model that vLLM could load."""
    if not (path / "config.json").is_file():
        what = "has no config.json" if path.is_dir() else "is no directory"
        raise EngineStartError(f"the model {path} {what}: name a directory with config.json and *.safetensors")
    if load_format != "dummy" and not any(path.glob("*.safetensors")):
        raise EngineStartError(f"the model {path} has no *.safetensors, the only weights that are read")


def eos_tokens(model_path: Path) -> list[int]:
    """Token ids that end an answer, from `generation_config.json`, else from `config.json`."""
    for name in ("generation_config.json", "config.json"):
        file = model_path / name
        eos = msgspec.json.decode(file.read_bytes()).get("eos_token_id") if file.is_file() else None
        if eos is not None:
            return [eos] if isinstance(eos, int) else list(eos)
    return []
