"""Makes every configuration that a worker can ask vLLM for, through vLLM's own classes; one JSON line for each.

`config_driver.py cpu MODEL`, `cuda MODEL`, or `none MODEL` for a machine without what vLLM was built for; in place of
all configurations, those with given changes of the options: `cpu MODEL '[{"dtype": "float32"}]'`. For cuda,
vLLM's own platform class answers in the place of a GPU: what it would ask a driver for is made up, and of what a CPU
build of vLLM lacks the names are there.
"""

import sys
import types
from pathlib import Path

import msgspec
import vllm.platforms
from vllm.platforms.interface import DeviceCapability, UnspecifiedPlatform

from planes.wire.messages import HandoverMode, Role, WorkerId
from workers.engine.base import EngineStartError
from workers.vllm.config import VllmOptions, engine_config


def say(kind, text):
    sys.stdout.write(f"{kind} {text}\n")


class Unbuilt(types.ModuleType):
    """A compiled part that only a CUDA build has. Nothing of it is called before there is a GPU."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)


def pretend_cuda():
    for name in ("vllm._C_stable_libtorch", "vllm.vllm_flash_attn"):
        sys.modules[name] = Unbuilt(name)
    from vllm.platforms.cuda import NonNvmlCudaPlatform  # noqa: PLC0415 - needs what was just put there

    class OneGpu(NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id=0):
            return DeviceCapability(8, 0)

        @classmethod
        def get_device_name(cls, device_id=0):
            return "GPU"

        @classmethod
        def get_device_total_memory(cls, device_id=0):
            return 80 << 30

        @classmethod
        def device_count(cls):
            return 1

    vllm.platforms._current_platform = OneGpu()
    from vllm import _custom_ops  # noqa: PLC0415 - asks for the platform

    for name in [name for name in vars(_custom_ops) if name.startswith("cutlass_") and "_supports_" in name]:
        setattr(_custom_ops, name, lambda _: False)


if __name__ == "__main__":
    if sys.argv[1] == "cuda":
        pretend_cuda()
    if sys.argv[1] == "none":
        vllm.platforms._current_platform = UnspecifiedPlatform()
    pairs = [{"role": role, "handover": handover} for role in Role for handover in (*HandoverMode, None)]
    wanted = [*pairs, {"handover": None, "is_embedding": True}]
    for changes in msgspec.json.decode(sys.argv[3]) if sys.argv[3:] else wanted:
        options = msgspec.convert(
            {"model_path": Path(sys.argv[2]), "model": "demo", "worker": WorkerId("w"), "lease_s": 12} | changes,
            VllmOptions,
            dec_hook=lambda kind, value: kind(value),
        )
        role, handover = options.role, options.handover
        try:
            config = engine_config(options, {"endpoint": "tcp://*:0", "replay_endpoint": "tcp://*:0"})
        except EngineStartError as exc:
            say("refused", str(exc))
            continue
        transfer = config.kv_transfer_config
        scheduler = config.scheduler_config.get_scheduler_cls()
        told = {
            "role": role,
            "handover": handover,
            "runner": config.model_config.runner_type,
            "context": config.model_config.max_model_len,
            "sequences": config.scheduler_config.max_num_seqs,
            "step_tokens": config.scheduler_config.max_num_batched_tokens,
            "dtype": str(config.model_config.dtype),
            "seed": config.model_config.seed,
            "parts": config.parallel_config.world_size,
            "lora": config.lora_config and config.lora_config.max_loras,
            "is_prefix_cached": config.cache_config.enable_prefix_caching,
            "device": config.device_config.device_type,
            "buffer": transfer and transfer.kv_buffer_device,
            "connector": transfer and transfer.kv_connector,
            "kv_role": transfer and transfer.kv_role,
            "scheduler": f"{scheduler.__module__}.{scheduler.__name__}",
        }
        say("config", msgspec.json.encode(told).decode())
