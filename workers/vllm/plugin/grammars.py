"""Grammars that begin where the tokens of a resumed request have left them, each on the library that its request needs.

| vLLM 0.32 alone                                          | here                                                    |
|----------------------------------------------------------|---------------------------------------------------------|
| one library for all requests, which the first one chooses | the library that the front end found fit for the request |
| a grammar begins at its beginning                        | it has taken the resumed tokens, those of reasoning apart |
| a regex has 5 s to compile, whatever else the cores do   | as long as it takes: it was tried (`grammar_process.py`)  |
| that one did not compile is told to nobody               | the log has its kind and the error's                      |

The second is vLLM's own `StructuredOutputManager.accept_tokens`, fed with one token at a time, as while it generates.
It runs where the grammar is compiled: a request leaves WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR when both are done, and
only then may its KV cache be asked for.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import xgrammar
from vllm.logger import init_logger
from vllm.tokenizers import get_tokenizer
from vllm.v1.structured_output import StructuredOutputManager, backend_xgrammar
from vllm.v1.structured_output.backend_guidance import GuidanceBackend
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

from workers.vllm.grammar_process import MAX_WHITESPACE
from workers.vllm.grammars import described_tokenizer
from workers.vllm.plugin.resume import resumed_tokens

_log = init_logger(f"vllm.{__name__}")  # the tree whose level and place vLLM's own settings say
_MAKING = threading.Lock()
_CACHE_BYTES = 256 << 20


class GrammarRejectsResume(Exception):  # noqa: N818 - names what is wrong
    """The tokens of an answer do not match what the answer must match: they were not generated under it."""


def install() -> None:
    """Replaces `StructuredOutputManager.grammar_init` and `_create_grammar`, and what limits a regex's time."""
    StructuredOutputManager.grammar_init = grammar_init
    StructuredOutputManager._create_grammar = create_grammar  # noqa: SLF001
    backend_xgrammar.compile_regex_with_timeout = lambda compile_regex, pattern: compile_regex(pattern)


def grammar_init(manager: Any, request: Any) -> None:
    """Begin to compile. On vLLM's input thread."""
    structured = request.structured_output_request
    if structured is None:
        return
    if manager.backend is None:  # whoever it is allocates the masks, which are the same for all
        manager.backend = _backend(manager, structured.params._backend)  # noqa: SLF001 - where vLLM keeps it
    if not hasattr(manager, "executor"):  # vLLM makes one where it has a tokenizer
        manager.executor = ThreadPoolExecutor(1, thread_name_prefix="grammar")
    structured.grammar = manager.executor.submit(manager._create_grammar, request)  # noqa: SLF001


def create_grammar(manager: Any, request: Any) -> Any:
    """The grammar of `request`, ready for its next token. On one of the manager's threads."""
    structured, sampling = request.structured_output_request, request.sampling_params
    kind, spec = structured.structured_output_key
    try:
        backend = _backend(manager, structured.params._backend)  # noqa: SLF001
        grammar = backend.compile_grammar(kind, spec, stop_token_ids=sampling.all_stop_token_ids)
        if resumed := resumed_tokens(sampling):
            advance(manager, request, grammar, resumed)
    except Exception as exc:
        told = request.request_id, kind.name.lower(), len(spec), type(exc).__name__  # no text of a client's
        _log.error("grammar.failed request=%s kind=%s characters=%d error=%s", *told)
        raise
    return grammar


def advance(manager: Any, request: Any, grammar: Any, tokens: list[int]) -> None:
    """Take `tokens`, generated after the prompt, and note whether they end the reasoning.

    Raises:  GrammarRejectsResume.
    """
    structured = request.structured_output_request
    so_far = list(request.prompt_token_ids)
    seen = SimpleNamespace(
        request_id=request.request_id,
        use_structured_output=True,
        structured_output_request=replace(structured, _grammar=grammar),
        prompt_token_ids=request.prompt_token_ids,
        all_token_ids=so_far,
    )
    for place, token in enumerate(tokens):
        so_far.append(token)
        if not manager.accept_tokens(seen, [token]):
            raise GrammarRejectsResume(f"number {place} of {len(tokens)} resumed tokens breaks the grammar")
    structured.reasoning_ended = seen.structured_output_request.reasoning_ended


def _backend(manager: Any, name: str) -> Any:
    with _MAKING:
        backends = manager.__dict__.setdefault("headrace_backends", {})
        if name not in backends:
            backends[name] = _MAKE[name](manager.vllm_config)
        return backends[name]


def _xgrammar(vllm_config: Any) -> XgrammarBackend:
    """Of the tokenizer as the worker has described it, which spares the engine process the tokenizer itself."""
    backend = object.__new__(XgrammarBackend)
    backend.vllm_config = vllm_config
    backend.tokenizer = None
    backend.vocab_size = vllm_config.model_config.get_vocab_size()
    backend.disable_any_whitespace = vllm_config.structured_outputs_config.disable_any_whitespace
    backend.num_speculative_tokens = 0
    tokenizer = xgrammar.TokenizerInfo.deserialize_json(described_tokenizer().read_text())
    compiler: Any = xgrammar.GrammarCompiler(
        tokenizer, max_threads=1, cache_enabled=True, cache_limit_bytes=_CACHE_BYTES
    )
    # vLLM gives no limit.
    compiler.compile_json_schema = partial(compiler.compile_json_schema, max_whitespace_cnt=MAX_WHITESPACE)
    backend.compiler = compiler
    return backend


def _guidance(vllm_config: Any) -> GuidanceBackend:
    model = vllm_config.model_config
    tokenizer = get_tokenizer(
        model.tokenizer,
        runner_type=model.runner_type,
        tokenizer_mode=model.tokenizer_mode,
        revision=model.tokenizer_revision,
    )
    return GuidanceBackend(vllm_config, tokenizer=tokenizer, vocab_size=model.get_vocab_size())


_MAKE = {"xgrammar": _xgrammar, "guidance": _guidance}
