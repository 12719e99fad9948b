"""Everything an operator may set about a server's adoption; `headrace adopt --help` lists it."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from planes.wire.errors import UnusableSetting
from planes.wire.messages import ADOPTED
from workers.serving_settings import ServingSettings
from workers.settings import WorkerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptSettings(ServingSettings):
    """Settings of the process beside a vLLM server. Those with a worker's names mean the same.

    Raises:  UnusableSetting, naming the setting, its value and what is allowed.
    """

    model: Annotated[
        str | None,
        Parameter(
            help="Directory of the model's tokenizer and configuration on this machine, or its id at the Hugging Face "
            "hub. Default: what the server was started with."
        ),
    ] = None
    served_model_name: Annotated[
        str | None, Parameter(help="Name that clients use, one of the server's. Default: its first.")
    ] = None
    server_key_file: Annotated[Path | None, Parameter(help="File with the server's --api-key.")] = None
    wait_s: Annotated[float, Parameter(help="Longest wait for the server to be ready, in seconds.")] = 600.0
    handover: Annotated[
        Literal["pull", "none"], Parameter(help="Whether KV caches go from and to this server (NixlConnector).")
    ] = "pull"
    max_batch: Annotated[int, Parameter(help="The server's --max-num-seqs.")] = 256
    max_step_tokens: Annotated[int, Parameter(help="The server's --max-num-batched-tokens.")] = 2048
    lease_s: Annotated[int, Parameter(help="The server's kv_lease_duration, in seconds.")] = 30
    tool_parser: Annotated[
        str,
        Parameter(help="What reads tool calls in answers: tags (<tool_call>), none; auto: as the chat template says."),
    ] = "auto"
    reasoning_parser: Annotated[
        str, Parameter(help="What tells thoughts from answers: think (<think>), none; auto: likewise.")
    ] = "auto"

    def __post_init__(self) -> None:
        ServingSettings.__post_init__(self)
        if not self.wait_s >= 0:
            raise UnusableSetting("wait_s", self.wait_s, "it must be 0 or more")
        self.server_key()

    def server_key(self) -> str:
        """The server's API key; "": it has none.  Raises:  UnusableSetting."""
        if self.server_key_file is None:
            return ""
        try:
            key = self.server_key_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as exc:
            raise UnusableSetting("server_key_file", str(self.server_key_file), f"it cannot be read: {exc}") from exc
        if not key.isascii() or not key.isprintable() or not key:
            raise UnusableSetting("server_key_file", str(self.server_key_file), "it must hold one line of ASCII")
        return key

    def as_worker(self, model: str, directory: Path) -> WorkerSettings:
        """The same for the worker that the server becomes.

        Args:  model: the name that clients use.  directory: of its tokenizer.  Raises:  UnusableSetting.
        """
        shared = {field.name for field in fields(WorkerSettings)} & {field.name for field in fields(self)}
        same = {name: getattr(self, name) for name in shared - {"model", "served_model_name"}}
        return WorkerSettings(engine=ADOPTED, model=directory, served_model_name=model, **same)
