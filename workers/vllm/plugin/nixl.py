"""NIXL under the name that vLLM imports, with a progress thread that does not burn a core."""

import importlib
import importlib.util
import os
import sys

import torch

from workers.nixl_wheel import installed_wheel

PROGRESS_PAUSE_US = 50_000
"""NIXL's Python API asks for 0: the progress thread then burns a core. At 50 ms an idle engine takes 1.4 % of one, at
5 ms 2.2 %. Handovers are no slower: the engine drives NIXL itself while a transfer or a lease is open (ADR 6)."""


def install() -> None:
    """Before `vllm.distributed.nixl_utils` is imported, which looks for the module `nixl` and remembers what it found.

    Replaces `nixlAgentConfig` in NIXL's bindings, which `nixl._api.nixl_agent` makes one of with `pthrDelay = 0`.
    """
    os.environ.setdefault("UCX_RCACHE_MAX_UNRELEASED", "1024")  # what vLLM sets when it is the first to import NIXL
    if importlib.util.find_spec("nixl") is None:
        wheel = installed_wheel(torch.version.cuda)
        if wheel is None:
            return  # an engine without handovers needs none
        for module in ("", "._bindings", "._api"):
            sys.modules[f"nixl{module}"] = importlib.import_module(f"{wheel}{module}")
    binding = importlib.import_module("nixl._api").nixlBind
    if not hasattr(binding.nixlAgentConfig, "is_calm"):
        binding.nixlAgentConfig = calm(binding.nixlAgentConfig)


def calm(base: type) -> type:
    """`nixlAgentConfig` whose progress thread pauses for `PROGRESS_PAUSE_US` at least, whatever is asked for."""

    class CalmAgentConfig(base):  # type: ignore[misc]
        is_calm = True

        @property
        def pthrDelay(self) -> int:  # noqa: N802 - NIXL's name
            return int(base.pthrDelay.__get__(self))  # type: ignore[attr-defined]

        @pthrDelay.setter
        def pthrDelay(self, value: int) -> None:  # noqa: N802
            base.pthrDelay.__set__(self, max(value, PROGRESS_PAUSE_US))  # type: ignore[attr-defined]

    return CalmAgentConfig
