"""The gateways that are compared: where they come from and how they are started."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

ENVIRONMENTS: Final = Path(__file__).parents[2] / ".venv-peers"
BASE: Final = "SMG 1.13.0"
"""What ratios are against."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where one gateway runs. folder: its own, for what it writes.  etcd, nats: URLs, for who wants them."""

    port: int
    spare_port: int
    workers: Sequence[str]
    model: str
    model_path: Path
    folder: Path
    etcd: str
    nats: str


@dataclass(frozen=True, slots=True)
class Gateway:
    """One of them.

    installs: what pip is told, one call after the other.  argv, workers, environment: of a site; the programs lie in
    the environment's bin, but for one that is named whole.  workers: a program that it needs in place of plain HTTP
    workers.
    """

    name: str
    folder: str
    installs: tuple[tuple[str, ...], ...]
    argv: Callable[[Site], Sequence[str]]
    environment: Callable[[Site], dict[str, str]] = field(default=lambda _site: {})
    workers: Callable[[Site], Sequence[str]] | None = None
    note: str = ""

    @property
    def bin(self) -> Path:
        return ENVIRONMENTS / self.folder / "bin"


def _smg(site: Site) -> list[str]:
    return ["smg", "launch", *_routed(site), "--log-level", "warn", "--disable-tokenizer-autoload"]


def _sglang_router(site: Site) -> list[str]:
    return ["python", "-m", "sglang_router.launch_router", *_routed(site), "--log-level", "warn"]


def _vllm_router(site: Site) -> list[str]:
    return ["vllm-router", *_routed(site), "--log-level", "warning"]


def _routed(site: Site) -> list[str]:
    ports = ["--host", "127.0.0.1", "--port", str(site.port), "--prometheus-port", str(site.spare_port)]
    return ["--worker-urls", *site.workers, *ports, "--policy", "cache_aware"]


def _litellm(site: Site) -> list[str]:
    served = {"model": f"openai/{site.model}", "api_key": "none"}
    models = [{"model_name": site.model, "litellm_params": served | {"api_base": f"{url}/v1"}} for url in site.workers]
    settings = {"dangerously_permit_weak_or_unset_master_key": True}  # no key, as with all others
    path = site.folder / "config.yaml"
    path.write_text(json.dumps({"model_list": models, "general_settings": settings}))  # JSON is YAML
    return ["litellm", "--config", str(path), "--host", "127.0.0.1", "--port", str(site.port), "--num_workers", "1"]


def _dynamo_planes(_site: Site) -> list[str]:
    return ["--discovery-backend", "etcd", "--event-plane", "nats", "--request-plane", "tcp"]


def _dynamo(site: Site) -> list[str]:
    kind = ["--http-port", str(site.port), "--router-mode", "kv"]
    return ["python", "-m", "dynamo.frontend", *kind, *_dynamo_planes(site)]


def _dynamo_workers(site: Site) -> list[str]:
    """Two of its mocker, which never waits."""
    model = site.folder / "model"
    shutil.copytree(site.model_path, model, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    if not (model / "config.json").exists():  # the simulated engine's model has none
        facts = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 32768}
        (model / "config.json").write_text(json.dumps(facts | {"vocab_size": 260, "eos_token_id": 256}))
    size = ["--speedup-ratio", "0", "--block-size", "16", "--num-workers", "2"]
    named = ["--model-path", str(model), "--model-name", site.model]
    return ["python", "-m", "dynamo.mocker", *named, *size, *_dynamo_planes(site)]


def _dynamo_environment(site: Site) -> dict[str, str]:
    return {"ETCD_ENDPOINTS": site.etcd, "NATS_SERVER": site.nats, "DYN_LOG": "warn"}


def _relay(site: Site) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("relay.py")), str(site.port), *site.workers]


GATEWAYS: Final = (
    Gateway(
        BASE,
        "smg",
        (
            ("--no-deps", "smg==1.13.0"),
            ("setproctitle", "aiohttp", "orjson", "grpcio", "grpcio-health-checking", "pyyaml"),
        ),
        _smg,
        note="cache_aware; matches text, no tokenizer",
    ),
    Gateway(
        "sglang-router 0.3.2",
        "sglang-router",
        (("sglang-router==0.3.2",),),
        _sglang_router,
        note="cache_aware; matches text, no tokenizer",
    ),
    Gateway(
        "vllm-router 0.1.17",
        "vllm-router",
        (("vllm-router==0.1.17",),),
        _vllm_router,
        note="cache_aware; matches text, no tokenizer",
    ),
    Gateway(
        "Dynamo 1.6.1",
        "dynamo",
        (
            (
                *("ai-dynamo-runtime==1.6.1", "aiohttp", "msgspec", "prometheus-client<1", "pyzmq", "redis<9", "tqdm"),
                *("transformers", "zstandard", "kubernetes<33"),
            ),
            ("--no-deps", "ai-dynamo==1.6.1"),
        ),
        _dynamo,
        _dynamo_environment,
        _dynamo_workers,
        note="kv; tokenizes, exact index; before its own mocker, which never waits",
    ),
    Gateway("Relay in Python", "", (), _relay, note="forwards bytes, nothing else: the floor of a gateway in Python"),
    Gateway("LiteLLM 1.108.7", "litellm", (("litellm[proxy]==1.108.7",),), _litellm, note="one process, as it comes"),
)
POLICIES: Final = ("headrace", "least_loaded")
"""Of Headrace itself."""


def headrace_name(policy: str) -> str:
    return f"Headrace, {policy}"
