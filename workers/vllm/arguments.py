"""Engine arguments of vLLM's own, which an operator gives beside a worker's settings, read by vLLM's own parser."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workers.engine.base import EngineStartError

_OWN_SETTING = "the worker has a setting of its own for it"
_BLOCKS = "gateways find cached prompts by the names of blocks, which the worker makes from these hashes"
_EVENTS = "the worker hears of cached blocks this way"
_HANDOVER = "it is made for handovers (--role, --handover, --lease-s)"
_OUR_CLASS = "the class there is the worker's own: without it nothing is handed over"
_RANKS = "a worker is one engine: start one for each rank"
_TEXT = "an engine here reads and writes tokens: texts are made by gateways and workers, from the files of --model"
_FETCHED = "--model is fetched before vLLM starts, as HF_HOME and HF_TOKEN say"

REFUSED: Mapping[str, str] = {
    "model": f"{_OWN_SETTING}, --model",
    "served_model_name": f"{_OWN_SETTING}, --served-model-name",
    "reasoning_parser": f"{_OWN_SETTING}, --reasoning-parser",
    "runner": f"{_OWN_SETTING}, --task",
    "convert": f"{_OWN_SETTING}, --task",
    "revision": f"{_OWN_SETTING}, --revision",
    "tokenizer": _TEXT,
    "tokenizer_revision": _TEXT,
    "skip_tokenizer_init": _TEXT,
    "generation_config": _TEXT,
    "override_generation_config": _TEXT,
    "download_dir": _FETCHED,
    "hf_token": _FETCHED,
    "kv_transfer_config": _HANDOVER,
    "kv_offloading_size": f"vLLM would put another connector in the place of the one that hands over; {_HANDOVER}",
    "kv_offloading_backend": f"vLLM would put another connector in the place of the one that hands over; {_HANDOVER}",
    "kv_events_config": _EVENTS,
    "prefix_caching_hash_algo": _BLOCKS,
    "prefix_cache_retention_interval": _BLOCKS,
    "prefix_match_unit": _BLOCKS,
    "scheduler_cls": _OUR_CLASS,
    "worker_extension_cls": _OUR_CLASS,
    "scheduling_policy": "gateways say which request goes first",
    "disable_log_stats": "gateways route by these numbers",
    "data_parallel_size": _RANKS,
    "data_parallel_rank": _RANKS,
    "data_parallel_start_rank": _RANKS,
    "data_parallel_size_local": _RANKS,
    "data_parallel_address": _RANKS,
    "data_parallel_rpc_port": _RANKS,
    "data_parallel_hybrid_lb": _RANKS,
    "data_parallel_external_lb": _RANKS,
    "data_parallel_multi_port_external_lb": _RANKS,
    "data_parallel_backend": _RANKS,
}
"""What would break a handover or what gateways are told, by vLLM's name of it, and why."""

REPLACED = frozenset(
    {
        "dtype",
        "load_format",
        "max_model_len",
        "block_size",
        "max_num_seqs",
        "max_num_batched_tokens",
        "enable_prefix_caching",
        "tensor_parallel_size",
        "enforce_eager",
        "shutdown_timeout",
        "kv_cache_memory_bytes",
        "gpu_memory_utilization",
    }
)
"""What the worker sets, and an operator's argument counts instead: of the two it is the one that says it to vLLM."""


def engine_arguments(words: Sequence[str], config_file: Path | None = None) -> dict[str, Any]:
    """Values by vLLM's names of them, of those that are given. vLLM is imported.

    Args:  words: as on vLLM's command line; they count more than config_file, a YAML file as its `--config` takes it.
    Raises:  EngineStartError for what vLLM's parser does not take, and for what a worker cannot do without.
    """
    if not words and config_file is None:
        return {}
    from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: PLC0415 - seconds
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: PLC0415

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> None:
            raise _unusable(message)

    parser = AsyncEngineArgs.add_cli_args(Parser(add_help=False, allow_abbrev=False))
    for action in parser._actions:  # noqa: SLF001 - only what is given shall be there
        action.default = argparse.SUPPRESS
    try:
        from_file = [] if config_file is None else parser.load_config_file(str(config_file))
        given: dict[str, Any] = vars(parser.parse_args([*from_file, *words]))
    except EngineStartError:
        raise
    except Exception as exc:
        raise _unusable(f"{type(exc).__name__}: {exc}") from exc
    refuse(given)
    return given


def refuse(given: Mapping[str, Any]) -> None:
    """Raises:  EngineStartError if one of them is no operator's to say."""
    for name in given:
        if (reason := REFUSED.get(name)) is not None:
            raise _unusable(f"--{name.replace('_', '-')} cannot be given: {reason}")


def _unusable(reason: str) -> EngineStartError:
    return EngineStartError(f"engine arguments (after --, --engine-args, --engine-config): {reason}")
