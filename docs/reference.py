"""Writes docs/reference.md from the code: flags of every command, live settings, HTTP routes, metrics.

python docs/reference.py           # write it
python docs/reference.py --check   # exit status 1 if it is stale
"""

import ast
import sys
import types
import typing
from dataclasses import MISSING, fields
from pathlib import Path

from app.cli.certs import CertsSettings
from app.cli.chat import ChatSettings
from app.cli.config import ConfigSettings, live_settings
from app.cli.doctor import DoctorSettings
from app.cli.fleet import FleetTableSettings
from app.cli.gateway_url import GatewayUrlSettings
from app.cli.keys import KeySettings, RotateSettings
from app.cli.role import RoleSettings
from app.cli.top import TopSettings
from app.cli.up import UpSettings
from app.main import create_app
from app.metrics import Metrics
from app.settings import GatewaySettings
from planes.wire.messages import WorkerId
from workers.adopted.settings import AdoptSettings
from workers.engine.base import EngineLoad
from workers.metrics import WorkerMetrics
from workers.settings import WorkerSettings

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "reference.md"
COMMANDS = {
    "headrace up": (UpSettings, "Everything on this machine."),
    "headrace gateway": (GatewaySettings, "One gateway."),
    "headrace worker": (WorkerSettings, "One worker."),
    "headrace adopt": (
        AdoptSettings,
        "`headrace adopt http://host:port`: a running, unmodified vLLM server as a worker (docs/adopt.md).",
    ),
    "headrace certs": (
        CertsSettings,
        "`headrace certs FOLDER`: a CA, certificates and a token for trying a secured fleet out.",
    ),
    "headrace fleet": (FleetTableSettings, "Who is registered, and what they do."),
    "headrace doctor": (
        DoctorSettings,
        "What is wrong with this machine, the planes, workers or a gateway, and what to do.",
    ),
    "headrace top": (TopSettings, "What the fleet does now, live: rates, times, load by worker."),
    "headrace chat": (ChatSettings, "A conversation in the terminal, with which workers served each answer."),
    "headrace trace": (
        GatewayUrlSettings,
        "`headrace trace ID`: where a request's time went, and why; without an id the last ones.",
    ),
    "headrace role": (RoleSettings, "`headrace role WORKER both|prefill|decode|auto` changes a running worker's role."),
    "headrace keys create": (
        KeySettings,
        "`headrace keys create TENANT` makes an API key in etcd and shows its secret, once.",
    ),
    "headrace keys rotate": (
        RotateSettings,
        "`headrace keys rotate ID` gives a key another secret; `list` and `revoke ID` have its flags but the last.",
    ),
    "headrace config": (
        ConfigSettings,
        "Routing settings that gateways follow while they run; `name=value` changes one, `name=null` undoes it.",
    ),
}

FIELDS = {
    "top_k": "Draw from the k likeliest tokens; 0 or -1: from all.",
    "min_p": "Draw from tokens at least so likely, relative to the likeliest; 0 to 1.",
    "repetition_penalty": "Divides the logits of tokens seen before; more than 0, 1 does nothing.",
    "ignore_eos": "Go on to `max_tokens`, for load tests.",
    "min_tokens": "Tokens before an answer may end by itself.",
    "stop_token_ids": "Tokens that end an answer.",
    "bad_words": "Texts that an answer must not contain; up to 128.",
    "include_stop_str_in_output": "End the answer with the stop string that ended it.",
    "skip_special_tokens": "Leave special tokens out of the answer's text; true without it.",
    "structured_outputs": "What the answer must match: json, regex, choice, grammar, json_object or structural_tag.",
    "guided_json": "The older name of `structured_outputs.json`.",
    "guided_regex": "The older name of `structured_outputs.regex`.",
    "guided_choice": "The older name of `structured_outputs.choice`.",
    "guided_grammar": "The older name of `structured_outputs.grammar`.",
    "thinking_token_budget": "Most tokens of reasoning; -1: no limit.",
    "prompt_logprobs": "Report the prompt's log probabilities with so many alternatives; not streamed, one worker.",
    "return_token_ids": "List token ids in the answer, the prompt's too.",
    "truncate_prompt_tokens": "Keep the prompt's last tokens only; -1: as many as leave room for the answer.",
    "cache_salt": "Only requests with the same salt share cached prompts; up to 256 characters.",
    "priority": "Class from -1000 to 1000; lower is sooner, but never sooner than the API key's own.",
    "slo_ttft_ms": "The first token shall come in so many milliseconds. Refused (429) where it is predicted to take "
    "longer, or served late with `--no-refuse-late`.",
    "slo_itl_ms": "Mean milliseconds between tokens at most: routing keeps to it before all else, and refuses nothing.",
    "timeout_ms": "Give up after so long, in milliseconds; `--request-timeout-s` at most.",
    "chat_template_kwargs": "Chat only: what the chat template sees besides the messages.",
    "add_generation_prompt": "Chat only: whether the prompt ends where the assistant's turn begins; true without it.",
    "continue_final_message": "Chat only: go on with the last message in place of a new one.",
    "documents": "Chat only: objects for templates that know them.",
}
"""What a body may have beside OpenAI's fields: `app/openai/bodies.py`, a test compares."""
HEADERS = (
    ("x-headrace-handover", "request", "`always` (two workers, or 503), `never`, or `auto`: as the router decides."),
    ("x-headrace-explain", "request", "`1` is answered by `x-headrace-route`."),
    ("x-headrace-slo-ttft-ms", "request", "As `slo_ttft_ms` in the body, which goes before it."),
    ("x-headrace-slo-itl-ms", "request", "As `slo_itl_ms` in the body, which goes before it."),
    ("x-headrace-script", "request", "What the simulated engine alone says: a JSON list of texts, one for each turn."),
    ("x-headrace-ignored", "response", "Body fields that nobody here knows; they changed nothing."),
    ("x-request-id", "response", "For `GET /v1/routes/{request_id}` and the logs."),
    (
        "x-headrace-overhead-ms",
        "response",
        (
            "What the gateway took itself until the first worker was asked, in milliseconds: reading the body (as "
            "slowly as it is sent), checking, rendering and tokenizing it, and deciding; without the wait for a worker "
            "with room. Of a request that got no worker: until then. It is what is known when the head is made; what "
            "workers say is passed on as it comes."
        ),
    ),
    ("x-headrace-prefill", "response", "The worker that computed the prompt; the decode worker without a handover."),
    ("x-headrace-decode", "response", "The worker that generates."),
    ("x-headrace-policy", "response", "The policy that chose them."),
    ("x-headrace-unstored", "response", "Why a response of `/v1/responses` is not kept though it should be: a code."),
    ("x-headrace-route", "response", "The choice, its predicted seconds and what it gives up, as JSON."),
    ("x-headrace-fallback", "response", "Why it was not served as chosen first: the code of what failed."),
    ("x-ratelimit-limit-requests, -tokens", "response", "Of a limited key: its limit in a minute, else in a day."),
    ("x-ratelimit-remaining-requests, -tokens", "response", "What is left of it, as far as this gateway knows."),
    ("x-ratelimit-reset-requests, -tokens", "response", "Until all of it is there again, as in `59s` or `6m0s`."),
    ("retry-after, retry-after-ms", "response", "When a refused request is worth another try."),
)


def reference() -> str:
    """The whole page."""
    parts = ["# Reference", "", "Generated by `make docs`; a test fails when it is stale.", ""]
    for command, (settings, summary) in COMMANDS.items():
        parts += [f"## `{command}`", "", summary, "", "| flag | variable | default | meaning |", "|---|---|---|---|"]
        parts += [_flag(settings, field) for field in fields(settings)]
        parts += [""]
    parts += ["| setting | without it | meaning |", "|---|---|---|"]  # of `headrace config`, the last command
    parts += [f"| `{each.name}` | `{each.otherwise}` | {each.meaning} |" for each in live_settings()]
    parts += ["", "## HTTP", "", "| route | what it does |", "|---|---|"]
    parts += [f"| `{method} {path}` | {summary} |" for method, path, summary in _routes()]
    parts += ["", "### Headers", "", "| header | of the | meaning |", "|---|---|---|"]
    parts += [f"| `{name}` | {side} | {text} |" for name, side, text in HEADERS]
    parts += [
        "",
        "### Beyond OpenAI's body",
        "",
        "Fields that nobody knows are left out and named in `x-headrace-ignored`; `--strict-fields` refuses them.",
        "",
        "| field | meaning |",
        "|---|---|",
    ]
    parts += [f"| `{name}` | {text} |" for name, text in FIELDS.items()]
    parts += ["", "## Metrics", "", "| metric | type | meaning |", "|---|---|---|"]
    parts += [f"| `{name}` | {kind} | {text} |" for name, kind, text in _metrics()]
    parts += ["", "### Of workers", "", "With `--metrics-port`.", "", "| metric | type | meaning |", "|---|---|---|"]
    parts += [f"| `{name}` | {kind} | {text} |" for name, kind, text in sorted(set(_families(_worker_metrics())))]
    return "\n".join(parts) + "\n"


def _flag(settings: type, field: "typing.Any") -> str:
    hint = typing.get_type_hints(settings, include_extras=True)[field.name]
    help_text = next(m.help for m in hint.__metadata__ if hasattr(m, "help"))
    choices = [arg for arg in typing.get_args(typing.get_args(hint)[0]) if isinstance(arg, str)]
    allowed = f" One of {', '.join(choices)}." if choices else ""
    default = "" if field.default in (None, MISSING) else f"`{field.default}`"
    name = field.name.replace("_", "-")
    variable = f"`HEADRACE_{field.name.upper()}`" if hint.__metadata__[0].show_env_var is not False else ""
    return f"| `--{name}` | {variable} | {default} | {help_text}{allowed} |"


def _routes() -> list[tuple[str, str, str]]:
    gateway = types.SimpleNamespace(settings=GatewaySettings(), metrics=Metrics(), live=object())
    app = create_app(typing.cast("typing.Any", gateway))
    found = []
    for route in app.routes:
        methods = sorted(getattr(route, "methods", None) or ())
        text = (getattr(route, "endpoint", None).__doc__ or "").strip().split("\n")[0]
        found += [(method, route.path.replace(":path}", "}"), text) for method in methods if method != "HEAD" and text]
    return sorted(found, key=lambda row: (row[1], row[0]))


def _worker_metrics() -> bytes:
    return WorkerMetrics(WorkerId(""), "", num_blocks=1, load=EngineLoad, role=lambda: None).exposition()


def _families(exposition: bytes) -> list[tuple[str, str, str]]:
    lines = [line.split(" ", 3) for line in exposition.decode().splitlines()]
    kinds = {words[2]: words[3] for words in lines if words[1] == "TYPE"}
    found = [(words[2], kinds[words[2]], words[3]) for words in lines if words[1] == "HELP"]
    return [row for row in found if not row[0].endswith("_created")]


def _metrics() -> list[tuple[str, str, str]]:
    """Counters and histograms from the registry; what exists per scrape only, from the calls that make it."""
    found = _families(Metrics().exposition())
    for source in sorted((ROOT / "app").rglob("*.py")):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Gauge", "Total"):
                name, text = (arg.value for arg in node.args[:2] if isinstance(arg, ast.Constant))
                is_total = node.func.id == "Total"
                found.append((f"headrace_{name}{'_total' * is_total}", "counter" if is_total else "gauge", text))
    return sorted(set(found))


def main() -> int:
    page = reference()
    if "--check" in sys.argv:
        return int(TARGET.read_text() != page)
    TARGET.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
