"""The probes' digest as the code of the model's makers has it, for gateways to compare theirs with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2.exceptions
import jinja2.sandbox
import structlog
import tokenizers

from planes.assets import chat_template
from planes.probes import NOW, Probe, digest

_log = structlog.get_logger()


def rendering_of(directory: Path, engine: str) -> str:
    """By transformers for vLLM, which serves with it, else by Jinja and `tokenizers`. Blocks for seconds.

    Returns:  the digest; "" if this code cannot load the model's files, which says nothing about the gateway's.
    """
    try:
        return _by_transformers(directory) if engine == "vllm" else _by_jinja(directory)
    except Exception as exc:  # noqa: BLE001 - whatever they raise for files that they cannot use
        _log.warning("rendering.unknown", model=str(directory), reason=f"{type(exc).__name__}: {exc}"[:500])
        return ""


def _by_transformers(directory: Path) -> str:
    from transformers import AutoTokenizer  # noqa: PLC0415 - seconds, and only where vLLM is

    tokenizer: Any = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)

    def chat(probe: Probe) -> list[int] | None:
        if tokenizer.chat_template is None:
            return None
        try:
            text = tokenizer.apply_chat_template(
                [dict(message) for message in probe.messages],
                tools=list(probe.tools) or None,
                add_generation_prompt=probe.is_reply,
                tokenize=False,
                strftime_now=NOW.strftime,
            )
        except (jinja2.exceptions.TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError):
            return None
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def raw(text: str) -> list[int]:
        ids: list[int] = tokenizer(text)["input_ids"]
        return ids

    return digest(chat, raw)


def _by_jinja(directory: Path) -> str:
    names = ("chat_template.jinja", "tokenizer_config.json")
    files = {name: (directory / name).read_bytes() for name in names if (directory / name).is_file()}
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    source = chat_template(files)
    variables = {name: text for name, value in config.items() if name.endswith("_token") and (text := _content(value))}
    render = None if source is None else _renderer(source)

    def chat(probe: Probe) -> list[int] | None:
        if render is None:
            return None
        try:
            text = render(
                **variables,
                messages=list(probe.messages),
                tools=list(probe.tools) or None,
                documents=None,
                add_generation_prompt=probe.is_reply,
            )
        except Exception:  # noqa: BLE001 - a template is a program
            return None
        return tokenizer.encode(text, add_special_tokens=False).ids

    def raw(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text).ids
        for kind, end in (("bos", slice(0, 1)), ("eos", slice(-1, None))):
            token, wanted = tokenizer.token_to_id(variables.get(f"{kind}_token", "")), config.get(f"add_{kind}_token")
            if token is not None and wanted is not None and wanted != (ids[end] == [token]):
                extra = [token] if wanted else []
                rest = [id_ for id_ in ids if wanted or id_ != token]
                ids = [*extra, *rest] if kind == "bos" else [*rest, *extra]
        return ids

    return digest(chat, raw)


def _content(value: Any) -> str:
    """Of a special token, which is a string or an object."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _renderer(source: str) -> Callable[..., str]:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = NOW.strftime
    return environment.from_string(source).render


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)
