"""LoRA adapters of vLLM's engine, which must be started for them (`-- --enable-lora`)."""

from collections.abc import Callable
from typing import Any

from planes.wire.messages import Adapter
from workers.engine.base import AdapterUnusable, check_adapter


def lora_request(adapter: Adapter | None) -> Any:
    """vLLM's own; its name is in the hash of each block."""
    if adapter is None:
        return None
    from vllm.lora.request import LoRARequest  # noqa: PLC0415 - seconds

    return LoRARequest(lora_name=adapter.tag, lora_int_id=adapter.number, lora_path=adapter.path)


class EngineAdapters:
    """Loads and unloads, as many as vLLM keeps: one that it had to read anew could fail in the middle of a step, and
    take the engine with it.
    """

    def __init__(self, llm: Any, *, request: Callable[[Adapter], Any] = lora_request) -> None:
        self._llm = llm
        self._request = request
        self._loaded: set[int] = set()

    async def load(self, adapter: Adapter) -> None:
        """Raises:  AdapterUnusable."""
        config = self._llm.vllm_config.lora_config
        if config is None:
            raise AdapterUnusable("its engine takes no adapters; start it with -- --enable-lora --max-loras N")
        check_adapter(adapter)
        most = config.max_cpu_loras or config.max_loras
        if len(self._loaded) >= most:
            raise AdapterUnusable(
                f"its engine keeps {most} adapters and has {len(self._loaded)}; unload one, or start it with "
                "-- --enable-lora --max-loras N --max-cpu-loras N"
            )
        try:
            is_loaded = await self._llm.add_lora(self._request(adapter))
        except Exception as exc:  # vLLM raises whatever its parts raise
            raise AdapterUnusable(f"vLLM does not take {adapter.path}: {' '.join(str(exc).split())[:500]}") from exc
        if not is_loaded:
            raise AdapterUnusable(f"vLLM does not take {adapter.path}")
        self._loaded.add(adapter.number)

    async def unload(self, adapter: Adapter) -> None:
        self._loaded.discard(adapter.number)
        await self._llm.remove_lora(adapter.number)
