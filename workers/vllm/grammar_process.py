"""Compiles grammars that nobody knows yet where they can do no harm: `python -m workers.vllm.grammar_process`.

A schema of a few bytes can keep a compiler busy for ever, take all memory or overflow its stack. So each is compiled in
a child of its own, with limits, before the engine gets to see it, and asked for a few tokens: a grammar may compile and
match nothing, or take seconds for each token. The engine needs the same seconds and bytes again.

Lines of JSON: `Attempt` on standard input, `Verdict` on standard output, one at a time. The first line out is an empty
verdict: the tokenizer is ready, and its serialized form, which is all that the engine needs of it, is in the file.
"""

import gc
import os
import random
import re
import resource
import select
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

LIBRARIES = ("xgrammar", "guidance")
"""vLLM's names of what compiles a grammar, the preferred one first."""

MAX_CPU_S = 3
"""For compiling and a few tokens."""
MAX_BYTES = 1 << 30
MAX_WHITESPACE = 20
"""Characters in one place of JSON. Without a limit small models indent for ever; this is ten levels of two."""
_NUM_REHEARSED = 32
MAX_WALL_S = 10.0 * MAX_CPU_S
"""For what waits instead of computing. Long, because the cores may have other things to do: no grammar's fault."""
_PLACE = re.compile(r"^\[[\d:]+\] \S+:\d+: ")
"""Time, file and line, which xgrammar's messages begin with."""
_TOO_LARGE = f"it takes more than {MAX_BYTES >> 20} MiB"


class Attempt(msgspec.Struct, frozen=True):
    """kind: a keyword of vLLM's StructuredOutputsParams: json, regex, grammar or structural_tag.  spec: its value.

    libraries: which may try, in this order.
    """

    kind: str
    spec: str
    libraries: tuple[str, ...] = LIBRARIES


class Verdict(msgspec.Struct, frozen=True):
    """library: the first that can; empty: none, for this `reason`.  is_late: the clock has ended the trial."""

    library: str = ""
    reason: str = ""
    is_late: bool = False


def main(model: Path, vocab_size: int, file: Path, say: Callable[[Verdict], object]) -> None:
    import xgrammar  # noqa: PLC0415 - takes seconds, and only this process needs it

    if reason := alone(partial(_describe, model, vocab_size, file), max_cpu_s=None, max_wall_s=None):
        sys.exit(f"the tokenizer of {model} cannot be described to a grammar's library: {reason}")
    compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo.deserialize_json(file.read_text()), max_threads=1)
    decoder = msgspec.json.Decoder(Attempt)
    gc.freeze()  # children share these pages
    say(Verdict())
    for line in sys.stdin.buffer:
        say(_judge(compiler, model, decoder.decode(line)))


def _judge(compiler: Any, model: Path, attempt: Attempt) -> Verdict:
    first_reason = ""
    for library in attempt.libraries:
        try:
            reason = alone(partial(_TRY[library], compiler, model, attempt))
        except TooLate as exc:
            return Verdict(reason=str(exc), is_late=True)
        except TooCostly as exc:  # the other library may bear it, and let the engine suffer
            return Verdict(reason=str(exc))
        if not reason:
            return Verdict(library)
        first_reason = first_reason or reason
    return Verdict(reason=first_reason)


def _describe(model: Path, vocab_size: int, file: Path) -> None:
    """In a child, because a tokenizer takes much memory and seconds to be freed."""
    import transformers  # noqa: PLC0415
    import xgrammar  # noqa: PLC0415

    tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(info.serialize_json())
    unfinished.rename(file)


def _xgrammar(compiler: Any, _: Path, attempt: Attempt) -> None:
    """As vLLM's XgrammarBackend does."""
    if attempt.kind == "json":
        compiled = compiler.compile_json_schema(attempt.spec, any_whitespace=True, max_whitespace_cnt=MAX_WHITESPACE)
    elif attempt.kind == "regex":
        compiled = compiler.compile_regex(attempt.spec)
    elif attempt.kind == "structural_tag":
        compiled = compiler.compile_structural_tag(attempt.spec)
    elif is_lark(attempt.spec):
        compiled = compiler.compile_lark(attempt.spec)
    else:
        compiled = compiler.compile_grammar(attempt.spec)
    _rehearse(compiled)


def _rehearse(compiled: Any) -> None:
    """Raises:  ValueError if there is nothing to say."""
    import xgrammar  # noqa: PLC0415

    matcher, rng = xgrammar.GrammarMatcher(compiled), random.Random(0)
    num_tokens = compiled.tokenizer_info.vocab_size
    for _ in range(_NUM_REHEARSED):
        if matcher.is_terminated():
            return
        mask = xgrammar.allocate_token_bitmask(1, num_tokens)
        matcher.fill_next_token_bitmask(mask)
        matcher.accept_token(int(rng.choice(_allowed(mask.numpy().tobytes(), num_tokens))))


def _allowed(mask: bytes, num_tokens: int) -> npt.NDArray[np.int64]:
    """Token ids.  Raises:  ValueError if there are none."""
    allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")[:num_tokens])
    if not len(allowed):
        raise ValueError("there comes a point from which no text matches it")
    return allowed


def _guidance(_: Any, model: Path, attempt: Attempt) -> None:
    """As vLLM's GuidanceBackend does."""
    import llguidance  # noqa: PLC0415

    if attempt.kind == "json":
        grammar = llguidance.LLMatcher.grammar_from_json_schema(attempt.spec, defaults={"whitespace_flexible": True})
    else:
        grammar = llguidance.grammar_from("regex" if attempt.kind == "regex" else "grammar", attempt.spec)
    tokenizer = llguidance.LLTokenizer(str(model / "tokenizer.json"))
    matcher, rng = llguidance.LLMatcher(tokenizer, grammar, log_level=0), random.Random(0)
    for _ in range(_NUM_REHEARSED):
        if error := matcher.get_error():
            raise ValueError(error)
        if matcher.is_stopped():
            return
        matcher.consume_token(int(rng.choice(_allowed(matcher.compute_bitmask(), tokenizer.vocab_size))))


_TRY = {"xgrammar": _xgrammar, "guidance": _guidance}


def is_lark(grammar: str) -> bool:
    """As vLLM tells Lark from EBNF: by the absence of its rules' `::=`."""
    lines = (line.partition("#")[0].partition("//")[0] for line in grammar.split("\n"))
    return not any("::=" in line for line in lines)


class TooCostly(Exception):  # noqa: N818 - names what is wrong
    """It takes more than there is for it."""


class TooLate(Exception):  # noqa: N818 - names what is wrong
    """It has not ended in time: it waits for something, or has had no turn."""


def alone(work: Callable[[], None], *, max_cpu_s: int | None = MAX_CPU_S, max_wall_s: float | None = MAX_WALL_S) -> str:
    """Run `work` in a child. Returns why it failed; empty: it did not.  Raises:  TooCostly, TooLate."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _limit(max_cpu_s)
        os.write(write_end, _reason(work)[:2000].encode())
        os._exit(0)
    os.close(write_end)
    try:
        is_late = not select.select([read_end], [], [], max_wall_s)[0]
        if is_late:
            os.kill(child, signal.SIGKILL)
        reason = os.read(read_end, 1 << 16).decode(errors="replace")
        _, status = os.waitpid(child, 0)
    finally:
        os.close(read_end)
    if is_late:
        raise TooLate(f"it had not ended after {max_wall_s:g} s")
    if os.WIFSIGNALED(status):
        raise TooCostly(_killed_by(os.WTERMSIG(status), max_cpu_s))
    if reason == _TOO_LARGE:
        raise TooCostly(reason)
    return reason


def _limit(max_cpu_s: int | None) -> None:
    if max_cpu_s is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (max_cpu_s, max_cpu_s))
        num_pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = num_pages * resource.getpagesize() + MAX_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _reason(work: Callable[[], None]) -> str:
    try:
        work()
    except MemoryError:
        return _TOO_LARGE
    except Exception as exc:  # noqa: BLE001 - whatever the library raises, it will not have this grammar
        if "bad_alloc" in str(exc):
            return _TOO_LARGE
        return _PLACE.sub("", " ".join(str(exc).split())) or type(exc).__name__
    return ""


def _killed_by(number: int, max_cpu_s: int | None) -> str:
    if number in (signal.SIGXCPU, signal.SIGKILL) and max_cpu_s is not None:
        return f"it takes more than {max_cpu_s} s"
    return f"{_TOO_LARGE}, or more of the stack ({signal.Signals(number).name})"


if __name__ == "__main__":
    out = os.dup(1)
    os.dup2(2, 1)  # what anybody else prints must not come between our lines
    main(
        Path(sys.argv[1]),
        int(sys.argv[2]),
        Path(sys.argv[3]),
        lambda verdict: os.writev(out, [msgspec.json.encode(verdict), b"\n"]),
    )
