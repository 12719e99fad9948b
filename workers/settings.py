"""Everything an operator may set about a worker. Also from `HEADRACE_<FLAG>`; `headrace worker --help` lists it."""

import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from planes.wire.errors import UnusableSetting
from planes.wire.messages import HandoverMode
from process.paths import DEMO_MODEL, is_hub_id
from workers.hub import fetched_model
from workers.serving_settings import ServingSettings

SIM_MODEL = Path(__file__).parent / "sim" / "model"
"""Tokenizer and chat template of the simulated engine's own model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings(ServingSettings):
    """Settings of one worker process. None stands for the engine's own default.

    Raises:  UnusableSetting, naming the setting, its value and what is allowed.
    """

    task: Annotated[
        Literal["generate", "embed"],
        Parameter(help="Generate, or make vectors of prompts for /v1/embeddings (needs --role both)."),
    ] = "generate"
    engine: Annotated[
        Literal["vllm", "sim", "adopted"],
        Parameter(help="What computes: a real model or simulated time; adopted is for headrace adopt alone."),
    ] = "vllm"
    model: Annotated[
        Path | None,
        Parameter(
            help="Directory of a model, or its id at the Hugging Face hub, org/name. Default: the demo model, SmolLM2 "
            "135M; for sim, a built-in tokenizer."
        ),
    ] = None
    revision: Annotated[str | None, Parameter(help="Branch, tag or commit of a model at the hub. Default: main.")] = (
        None
    )
    served_model_name: Annotated[
        str | None,
        Parameter(
            help="Name that clients use. Default: the directory's name, the hub's id, the demo model's name, or sim."
        ),
    ] = None
    handover: Annotated[
        Literal["pull", "push", "none"],
        Parameter(help="Who moves the KV cache: the decode worker, the prefill worker, or nobody."),
    ] = "pull"
    context_length: Annotated[
        int | None,
        Parameter(
            help="Most prompt plus completion tokens of a request. Default: as many as the model can, on CPU 2048 at "
            "most (vllm); 32768 (sim)."
        ),
    ] = None
    block_size: Annotated[int | None, Parameter(help="Tokens per KV block. Default: 32 (vllm), 16 (sim).")] = None
    num_blocks: Annotated[int | None, Parameter(help="KV blocks (sim). Default: 8192.")] = None
    kv_cache_bytes: Annotated[
        int | None, Parameter(help="Memory for the KV cache (vllm). Default: 256 MiB on CPU, what is left elsewhere.")
    ] = None
    max_batch: Annotated[
        int | None, Parameter(help="Most sequences running at once. Default: vLLM's own, on CPU 32; 256 (sim).")
    ] = None
    max_step_tokens: Annotated[
        int | None,
        Parameter(
            help="Most tokens that one step computes. Default: vLLM's own, on CPU 2048, and 40 for a decode worker; "
            "2048 (sim)."
        ),
    ] = None
    tool_parser: Annotated[
        str,
        Parameter(
            help="What reads tool calls in answers: tags (<tool_call>), one of vLLM's by its name (vllm), none; auto: "
            "as the checkpoint's response_template says (vllm), else as its chat template writes them."
        ),
    ] = "auto"
    reasoning_parser: Annotated[
        str,
        Parameter(
            help="What tells thoughts from answers: think (<think>), one of vLLM's (vllm), none; auto: likewise."
        ),
    ] = "auto"
    dtype: Annotated[
        str,
        Parameter(
            help="Number format of the weights (vllm); auto takes what this machine computes fastest, float32 for the "
            "demo model."
        ),
    ] = "auto"
    load_format: Annotated[str, Parameter(help="How to load the weights (vllm); dummy makes random ones.")] = "auto"
    tensor_parallel: Annotated[int, Parameter(help="GPUs that share the model (vllm).")] = 1
    engine_args: Annotated[
        str,
        Parameter(
            help="More for vLLM, as on its command line: '--quantization fp8 --pipeline-parallel-size 2'; also after "
            "-- at the end of the worker's. They count more than the flags here."
        ),
    ] = ""
    engine_config: Annotated[
        Path | None, Parameter(help="YAML file with more for vLLM, as its --config takes it; --engine-args count more.")
    ] = None
    prefill_dispatch: Annotated[
        Literal["direct", "queue"],
        Parameter(help="Compute the prompts that gateways send, or also take some from the queue when there is room."),
    ] = "direct"
    pull_ahead: Annotated[
        int, Parameter(help="Prompts waiting for the engine with fewer of which there is room for one from the queue.")
    ] = 2
    lease_s: Annotated[int, Parameter(help="Seconds a prefilled KV cache waits to be fetched.")] = 30
    cores: Annotated[str | None, Parameter(help="CPU cores this worker may use, e.g. 0-3,6. Default: all.")] = None
    speedup: Annotated[float, Parameter(help="How many times faster than real time to simulate (sim).")] = 1.0
    sim_prefill_tokens_per_s: Annotated[float, Parameter(help="Prompt tokens computed in a second (sim).")] = 8000.0
    sim_step_s: Annotated[float, Parameter(help="Seconds for a decode step, whatever the batch (sim).")] = 0.008
    sim_shortest_first: Annotated[
        bool, Parameter(help="Compute the shortest prompt first, as with vLLM, rather than in turn (sim).")
    ] = False
    sim_handover_bytes_per_s: Annotated[float, Parameter(help="Speed of handovers (sim).")] = 4e9
    sim_kv_bytes_per_token: Annotated[
        int, Parameter(help="Size of the KV cache that handovers move, a multiple of 8 (sim).")
    ] = 1024
    sim_answer_tokens: Annotated[
        int, Parameter(help="Tokens after which an answer ends by itself, on average (sim); 0: never.")
    ] = 256
    sim_seed: Annotated[int, Parameter(help="Picks the tokens (sim); the same for workers of one model.")] = 0

    def __post_init__(self) -> None:
        ServingSettings.__post_init__(self)
        _check_numbers(self)
        _check_model(self)
        if self.served_model_name == "":
            raise UnusableSetting("served_model_name", "", "it must have at least 1 character")
        _check_task(self)
        _check_engine_args(self)
        if self.is_pulling and not self.may_pull:
            allowed = f"queue needs --handover pull (it is {self.handover}): nobody knows yet whom to push to"
            raise UnusableSetting("prefill_dispatch", self.prefill_dispatch, allowed)
        self.core_numbers()

    @property
    def handover_mode(self) -> HandoverMode | None:
        return None if self.handover == "none" or self.is_embedding else HandoverMode(self.handover)

    @property
    def is_embedding(self) -> bool:
        """Whether it makes vectors of prompts."""
        return self.task == "embed"

    @property
    def is_pulling(self) -> bool:
        """Whether it begins with taking prefill jobs from the queue; a decode worker leaves them alone."""
        return self.prefill_dispatch == "queue" and self.worker_role.can_prefill

    @property
    def may_pull(self) -> bool:
        """Whether it takes them whenever its role has prompts sent to it."""
        return self.prefill_dispatch == "queue" and self.handover_mode is HandoverMode.PULL

    @property
    def model_path(self) -> Path:
        """Where the tokenizer is, and for vLLM the weights (see `with_model`)."""
        return self.model if self.model is not None else SIM_MODEL

    @property
    def model_name(self) -> str:
        if self.served_model_name is not None:
            return self.served_model_name
        if self.model is None:
            return "sim" if self.engine == "sim" else DEMO_MODEL
        return str(self.model) if is_hub_id(str(self.model)) else self.model.resolve().name

    def with_model(
        self, demo_model: Callable[[], Path], fetched: Callable[..., Path] = fetched_model
    ) -> "WorkerSettings":
        """The same with the directory of a model: of the demo model, if none is named for an engine that needs one.

        In float32 unless told otherwise: its answers' first tokens can be near ties, and in bfloat16, which CPUs that
        have it take by default, the capital of France became "L'Étoile". It is small enough for 0.5 GB.
        """
        if self.model is not None and is_hub_id(str(self.model)):
            found = fetched(str(self.model), self.revision, has_weights=self.engine == "vllm")
            return replace(self, model=found, served_model_name=self.model_name, revision=None)
        if self.model is not None or self.engine == "sim":
            return self
        dtype = "float32" if self.dtype == "auto" else self.dtype
        return replace(self, model=demo_model(), served_model_name=self.model_name, dtype=dtype)

    def engine_words(self) -> tuple[str, ...]:
        """What `engine_args` says.  Raises:  UnusableSetting."""
        try:
            return tuple(shlex.split(self.engine_args))
        except ValueError as exc:
            raise UnusableSetting(
                "engine_args", self.engine_args, f"quotes must be closed, as in a shell: {exc}"
            ) from exc

    def core_numbers(self) -> tuple[int, ...]:
        """Cores to run on, in order; empty: all.  Raises:  UnusableSetting."""
        if self.cores is None:
            return ()
        cores: set[int] = set()
        for part in self.cores.split(","):
            span = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part.strip())
            if span is None or int(span[1]) > int(span[2] or span[1]):
                raise UnusableSetting("cores", self.cores, "it must be core numbers and ranges such as 0-3,6")
            cores.update(range(int(span[1]), int(span[2] or span[1]) + 1))
        return tuple(sorted(cores))


def _check_numbers(settings: WorkerSettings) -> None:
    counts = ("context_length", "block_size", "num_blocks", "kv_cache_bytes", "max_batch", "max_step_tokens")
    for name in (*counts, "tensor_parallel", "lease_s", "pull_ahead"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UnusableSetting(name, value, "it must be 1 or more")
    if settings.sim_kv_bytes_per_token < 8 or settings.sim_kv_bytes_per_token % 8:
        raise UnusableSetting("sim_kv_bytes_per_token", settings.sim_kv_bytes_per_token, "it must be a multiple of 8")
    if settings.sim_answer_tokens < 0:
        raise UnusableSetting("sim_answer_tokens", settings.sim_answer_tokens, "it must be 0 or more")
    speeds = ("speedup", "sim_prefill_tokens_per_s", "sim_step_s", "sim_handover_bytes_per_s")
    for name in speeds:
        if not getattr(settings, name) > 0:
            raise UnusableSetting(name, getattr(settings, name), "it must be more than 0")


def _check_model(settings: WorkerSettings) -> None:
    is_at_hub = settings.model is not None and is_hub_id(str(settings.model))
    if settings.revision is not None and not is_at_hub:
        raise UnusableSetting("revision", settings.revision, f"only a model at the hub has one, not {settings.model}")
    if settings.model is None or is_at_hub:
        return
    for name in ("tokenizer.json", *(["config.json"] if settings.engine == "vllm" else [])):
        try:
            (settings.model / name).open("rb").close()
        except PermissionError as exc:
            reason = f"user {os.geteuid()} may not read its {name}"
            raise UnusableSetting("model", str(settings.model), reason) from exc
        except OSError as exc:
            reason = f"not the directory of a model (it has no {name})"
            raise UnusableSetting("model", str(settings.model), reason) from exc


def _check_task(settings: WorkerSettings) -> None:
    if not settings.is_embedding:
        return
    needed = {"role": "both", "prefill_dispatch": "direct"}
    for name, value in needed.items():
        if getattr(settings, name) != value:
            raise UnusableSetting(name, getattr(settings, name), f"with --task embed it must be {value}")


def _check_engine_args(settings: WorkerSettings) -> None:
    settings.engine_words()
    for name in ("engine_args", "engine_config"):
        value = getattr(settings, name)
        if value and settings.engine == "sim":
            raise UnusableSetting(name, str(value), "they are vLLM's, and the simulated engine (--engine sim) has none")
    if settings.engine_config is not None and not settings.engine_config.is_file():
        raise UnusableSetting("engine_config", str(settings.engine_config), "there is no such file")
