"""Adapters as vLLM is asked for them; `tests/e2e/test_adapters.py` asks vLLM itself."""

from types import SimpleNamespace

import pytest

from planes.wire.messages import Adapter
from tests.adapters import write_named_adapter
from workers.engine.base import AdapterUnusable
from workers.vllm.adapters import EngineAdapters


def of(llm):
    """vLLM's own struct takes seconds to import."""
    return EngineAdapters(llm, request=lambda each: each)


class Llm:
    def __init__(self, *, max_loras=2, max_cpu_loras=None, has_lora=True, says=True):
        config = SimpleNamespace(max_loras=max_loras, max_cpu_loras=max_cpu_loras) if has_lora else None
        self.vllm_config = SimpleNamespace(lora_config=config)
        self.says, self.removed = says, []

    async def add_lora(self, _):
        if isinstance(self.says, Exception):
            raise self.says
        return self.says

    async def remove_lora(self, number):
        self.removed.append(number)


@pytest.fixture
def adapter(tmp_path):
    path = write_named_adapter(tmp_path / "poet")
    return lambda number: Adapter(f"a{number}", "m", str(path), number)


async def test_no_more_are_loaded_than_vllm_keeps(adapter):
    llm = Llm(max_cpu_loras=2, max_loras=1)
    loading = of(llm)
    await loading.load(adapter(1))
    await loading.load(adapter(2))
    with pytest.raises(AdapterUnusable, match="keeps 2 adapters and has 2; unload one, or start it with -- --enable"):
        await loading.load(adapter(3))
    await loading.unload(adapter(1))
    await loading.load(adapter(3))
    assert llm.removed == [1]


@pytest.mark.parametrize(
    ("llm", "reason"),
    [
        (Llm(has_lora=False), "takes no adapters; start it with -- --enable-lora"),
        (
            Llm(says=ValueError("LoRA rank 64 is greater\nthan max_lora_rank 16")),
            "rank 64 is greater than max",
        ),
        (Llm(says=False), "vLLM does not take"),
    ],
)
async def test_what_vllm_does_not_take_is_told_and_does_not_count(adapter, llm, reason):
    loading = of(llm)
    for number in (1, 2, 3):
        with pytest.raises(AdapterUnusable, match=reason):
            await loading.load(adapter(number))


async def test_a_directory_that_holds_none_is_not_vllms_to_see(tmp_path):
    with pytest.raises(AdapterUnusable, match=r"it has no adapter_config\.json"):
        await of(Llm(says=AssertionError())).load(Adapter("a", "m", str(tmp_path), 1))
