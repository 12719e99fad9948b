"""Everything an operator may set about a gateway. Also from `HEADRACE_<FLAG>`; `headrace gateway --help` lists it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from app.http.origins import parse_origins
from app.openai.schema import Limits
from planes.security.tls import http_tls
from planes.streams.protocol import StreamLimits
from planes.wire.errors import UnusableSetting
from process.paths import cache_dir
from process.settings import ProcessSettings, check_pair, check_setting


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings(ProcessSettings):
    """Settings of one gateway process.

    Raises:  UnusableSetting, naming the setting, its value and what is allowed.
    """

    host: Annotated[str, Parameter(help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Parameter(help="Port to listen on; 0 takes a free one.")] = 8000
    processes: Annotated[
        int,
        Parameter(
            help="Processes that share the port, each a gateway of its own (ADR 46); limits such as --max-connections "
            "are each one's."
        ),
    ] = 1
    tls_cert: Annotated[
        Path | None,
        Parameter(help="PEM file: the certificate for HTTPS, with those between it and its CA. Default: plain HTTP."),
    ] = None
    tls_key: Annotated[Path | None, Parameter(help="PEM file: its key. Both are read anew when they change.")] = None
    admin_port: Annotated[
        int | None,
        Parameter(
            help="A port of its own for operators: metrics, fleet, console, all usage and routes, health; 0 takes a "
            "free one. Without it they are at --port, and need an admin's key where there are keys."
        ),
    ] = None
    admin_host: Annotated[
        str,
        Parameter(
            help="Address for --admin-port. On one that others reach it asks for an admin's key, on loopback not."
        ),
    ] = "127.0.0.1"
    cors_origin: Annotated[
        str,
        Parameter(
            help="Origins whose pages may ask, with commas between, such as https://a.example; *: all. Default: none."
        ),
    ] = ""
    policy: Annotated[str, Parameter(help="Routing policy: a name, or package.module:Class of your own.")] = "headrace"
    shadow_policy: Annotated[
        str | None, Parameter(help="A second policy that decides too, is measured, and is not obeyed; empty: none.")
    ] = None
    prefill_dispatch: Annotated[
        Literal["direct", "queue"],
        Parameter(help="Send prompts to the prefill worker chosen, or let those with room take them from a queue."),
    ] = "direct"
    queue_limit: Annotated[int, Parameter(help="Most requests that wait in this gateway.")] = 4096
    slo_ttft_s: Annotated[
        float | None, Parameter(help="By when a first token shall come, in seconds: routing keeps to it where it can.")
    ] = None
    slo_itl_ms: Annotated[
        float | None,
        Parameter(help="Mean time between a stream's tokens, in milliseconds, that routing keeps to before all else."),
    ] = None
    refuse_late: Annotated[
        bool, Parameter(help="Refuse requests whose first token is predicted to come later than their SLO.")
    ] = True
    request_timeout_s: Annotated[float, Parameter(help="Longest time for one request, in seconds.")] = 600.0
    max_attempts: Annotated[
        int, Parameter(help="Most workers tried in a row without a new token before a request ends with an error.")
    ] = 3
    replacement_s: Annotated[
        float,
        Parameter(help="Longest wait of an answer that has tokens for a worker if none is left, in seconds; 0: none."),
    ] = 60.0
    read_timeout_s: Annotated[
        float, Parameter(help="Longest time from a request's first byte to its last, in seconds.")
    ] = 60.0
    max_connections: Annotated[
        int, Parameter(help="Most connections of clients at once; another one is answered 503 and closed.")
    ] = 32_768
    max_body_bytes: Annotated[
        int, Parameter(help="Longest request body; never more than 1 MiB + 64 bytes per token of the longest context.")
    ] = 16 << 20
    body_memory_bytes: Annotated[
        int, Parameter(help="Most memory for all bodies that are being read, beyond the first 64 KiB of each.")
    ] = 256 << 20
    strict_fields: Annotated[
        bool, Parameter(help="Refuse body fields that nobody here knows, in place of naming them in the answer's head.")
    ] = False
    response_ttl_s: Annotated[
        float, Parameter(help="How long /v1/responses keeps a response, in seconds; the same for all gateways.")
    ] = 86_400.0
    response_store_bytes: Annotated[
        int,
        Parameter(
            help="Most bytes of all kept responses, in NATS; the oldest make room, and one has a 16th at most. The "
            "same for all gateways."
        ),
    ] = 256 << 20
    slow_client_bytes: Annotated[
        int, Parameter(help="Most unsent bytes of one answer; a client that reads more slowly is cut off.")
    ] = 1 << 20
    console: Annotated[bool, Parameter(help="Serve the console, a page that shows the fleet live, at /console.")] = True
    keep_prompt_nonces: Annotated[
        bool,
        Parameter(help="Keep a first line of a system prompt such as x-…-header: ID, which ends all prefix caching."),
    ] = False
    sse_keepalive_s: Annotated[
        float,
        Parameter(help="Longest silence of a streamed answer, also before its first token, in seconds; 0: no limit."),
    ] = 15.0
    drain_delay_s: Annotated[
        float,
        Parameter(
            help="Time at shutdown, in seconds, in which /health is 503 and requests are still taken, so that load "
            "balancers send their next ones elsewhere; a second signal ends it."
        ),
    ] = 0.0
    drain_s: Annotated[
        float, Parameter(help="Longest wait for running answers at shutdown, after --drain-delay-s, in seconds.")
    ] = 30.0
    heartbeat_s: Annotated[float, Parameter(help="Silence on a worker's stream before a ping, in seconds.")] = 1.0
    dead_after_s: Annotated[
        float, Parameter(help="Silence on a worker's stream after which the worker counts as lost, in seconds.")
    ] = 3.0
    api_keys_file: Annotated[
        Path | None,
        Parameter(help="TOML file of API keys, read anew on SIGHUP. Default, without --api-keys: everybody may ask."),
    ] = None
    api_keys: Annotated[
        bool, Parameter(help="Ask for API keys, of those in etcd: headrace keys. May go with --api-keys-file.")
    ] = False
    record: Annotated[
        Path | None,
        Parameter(
            help="Write a line for each request served into this folder, in Mooncake's trace format: lengths and "
            "salted hashes, no text. One gateway a folder. Default: nothing is written."
        ),
    ] = None
    record_file_bytes: Annotated[int, Parameter(help="Bytes of a recorded file after which the next one begins.")] = (
        64 << 20
    )
    record_files: Annotated[int, Parameter(help="Most recorded files in the folder; the oldest make room.")] = 16
    otlp_endpoint: Annotated[
        str | None,
        Parameter(
            help="URL of an OpenTelemetry collector that takes OTLP over HTTP, such as http://127.0.0.1:4318: requests "
            "are traced. Needs the extra otel. Default: nothing is traced."
        ),
    ] = None
    trace_ratio: Annotated[
        float,
        Parameter(help="Share of requests that are traced, 0 to 1; a client that sends traceparent decides itself."),
    ] = 1.0
    autorole: Annotated[
        bool,
        Parameter(
            help="Let one of the gateways with this flag change running workers' roles as the load changes (ADR 34). "
            "Give it to all of them.",
            negative="",
        ),
    ] = False
    autorole_window_s: Annotated[
        float, Parameter(help="How much load --autorole looks at for each decision, in seconds.")
    ] = 60.0
    autorole_horizon_s: Annotated[
        float, Parameter(help="Within which a change by --autorole must pay, in seconds.")
    ] = 600.0
    autorole_min_prefill: Annotated[
        int, Parameter(help="Of each model, so many workers take prompts of others; --autorole keeps to it.")
    ] = 1
    autorole_min_decode: Annotated[
        int, Parameter(help="Of each model, so many workers decode; --autorole keeps to it.")
    ] = 1
    cache_dir: Annotated[
        Path | None,
        Parameter(
            help="Where tokenizer files are kept between starts. Default: assets in HEADRACE_CACHE (~/.cache/headrace)."
        ),
    ] = None

    def __post_init__(self) -> None:
        ProcessSettings.__post_init__(self)
        if not 0 <= self.port <= 65535:
            raise UnusableSetting("port", self.port, "a port is 0 to 65535")
        check_admin_port(self.admin_port, self.port)
        parse_origins(self.cors_origin)
        for name in (
            "processes",
            "queue_limit",
            "max_attempts",
            "max_connections",
            "max_body_bytes",
            "body_memory_bytes",
            "slow_client_bytes",
            "response_store_bytes",
            "record_file_bytes",
            "record_files",
            "autorole_min_prefill",
            "autorole_min_decode",
        ):
            if getattr(self, name) < 1:
                raise UnusableSetting(name, getattr(self, name), "it must be 1 or more")
        for name in (
            "request_timeout_s",
            "read_timeout_s",
            "heartbeat_s",
            "dead_after_s",
            "slo_ttft_s",
            "slo_itl_ms",
            "response_ttl_s",
            "autorole_window_s",
            "autorole_horizon_s",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UnusableSetting(name, value, "it must be more than 0 seconds")
        for name in ("drain_delay_s", "drain_s", "replacement_s", "sse_keepalive_s"):
            if not getattr(self, name) >= 0:
                raise UnusableSetting(name, getattr(self, name), "it must be 0 seconds or more")
        check_setting("trace_ratio", self.trace_ratio, _check_share)
        check_setting("otlp_endpoint", self.otlp_endpoint, _check_collector)
        check_pair(self, "tls_cert", "tls_key")
        if self.tls_cert is not None and (key := self.tls_key) is not None:
            check_setting("tls_cert", str(self.tls_cert), lambda cert: http_tls(Path(cert), key))
        if self.dead_after_s <= self.heartbeat_s:
            raise UnusableSetting(
                "dead_after_s", self.dead_after_s, f"it must exceed --heartbeat-s ({self.heartbeat_s})"
            )

    @property
    def has_keys(self) -> bool:
        """Whether who asks must have a key."""
        return self.api_keys or self.api_keys_file is not None

    @property
    def assets_dir(self) -> Path:
        """Where tokenizer files are kept."""
        return cache_dir() / "assets" if self.cache_dir is None else self.cache_dir.expanduser()

    @property
    def body_limits(self) -> Limits:
        return Limits(has_strict_fields=self.strict_fields)

    @property
    def stream_limits(self) -> StreamLimits:
        return StreamLimits(ping_s=self.heartbeat_s, dead_s=self.dead_after_s)


def _check_share(value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError("it must be from 0 to 1")


def _check_collector(url: str | None) -> None:
    if url is not None and not url.startswith(("http://", "https://")):
        raise ValueError("it must be http://host:port or https://host:port")


def check_admin_port(admin_port: int | None, port: int) -> None:
    """Raises:  UnusableSetting."""
    if admin_port is not None and not 0 <= admin_port <= 65535:
        raise UnusableSetting("admin_port", admin_port, "a port is 0 to 65535")
    if admin_port and admin_port == port:
        raise UnusableSetting("admin_port", admin_port, "it must differ from --port")
