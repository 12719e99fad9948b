"""Which library can compile what an answer must match, found out before the engine sees it.

Once it is ready a worker starts `grammar_process.py`, and keeps what that has said of a grammar.
"""

import asyncio
import contextlib
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from planes.wire.errors import HeadraceError
from planes.wire.frames import StructuredOutput
from workers.structured import unusable
from workers.vllm.grammar_process import LIBRARIES, MAX_WALL_S, Attempt, Verdict

_MAX_KNOWN = 1024
_TIMEOUT_S = (len(LIBRARIES) + 1) * MAX_WALL_S
"""Longer than a trial may take there (`grammar_process.py`): after it the process itself hangs."""
_VARIABLE = "HEADRACE_VLLM_TOKENIZER"


class GrammarProcessEnded(HeadraceError):  # noqa: N818 - names what is wrong
    """The process that tries grammars is gone; the next request starts another."""

    code = "grammar_process"


class TrialLate(HeadraceError):  # noqa: N818 - names what is wrong
    """Nobody knows whether a grammar can be used; another time, or another worker, may tell."""

    code = "grammar_trial_late"


def expect_tokenizer(folder: Path) -> Path:
    """In the worker, before the engine process starts: where the two of them look for the tokenizer's description."""
    os.environ[_VARIABLE] = str(file := folder / "tokenizer")
    return file


def described_tokenizer() -> Path:
    """In the engine process; the file is there when a request with a grammar comes."""
    return Path(os.environ[_VARIABLE])


class GrammarTrials:
    """Tries grammars, one at a time. A trial that has begun goes on to its verdict if its request is given up."""

    def __init__(self, *, libraries_for: Callable[[str, str], Sequence[str]], timeout_s: float = _TIMEOUT_S) -> None:
        """libraries_for: which libraries may try a grammar of some kind.  timeout_s: for one trial."""
        self._libraries_for = libraries_for
        self._timeout_s = timeout_s
        self._known: OrderedDict[tuple[str, str], Verdict] = OrderedDict()
        self._command: tuple[str, ...] = ()
        self._starting: asyncio.Task[asyncio.subprocess.Process] | None = None
        self._turn = asyncio.Lock()
        self._trial: asyncio.Task[None] | None = None
        """The latest."""

    def start(self, model_path: Path, vocab_size: int, description: Path) -> None:
        """Begin to start the process. description: where it writes what an engine needs of the tokenizer."""
        module = "workers.vllm.grammar_process"
        self.begin((sys.executable, "-m", module, str(model_path.resolve()), str(vocab_size), str(description)))

    def begin(self, command: tuple[str, ...]) -> None:
        self._command = command
        self._starting = asyncio.create_task(self._launch())

    async def library(self, kind: str, spec: str) -> str:
        """vLLM's name of the library that can compile it. kind, spec: as in `grammar_process.Attempt`.

        Raises:  InvalidRequest with the library's reason; GrammarProcessEnded, TrialLate.
        """
        key = kind, spec
        if key not in self._known:
            async with self._turn:
                if self._trial is not None:
                    await asyncio.wait([self._trial])  # of a request that was given up
                if key not in self._known:
                    self._trial = asyncio.create_task(self._try(kind, spec))
                    await asyncio.shield(self._trial)
        verdict = self._known[key]
        self._known.move_to_end(key)
        if verdict.library:
            return verdict.library
        raise unusable(f"the answer's {kind} cannot be used: {verdict.reason}")

    async def _try(self, kind: str, spec: str) -> None:
        libraries = tuple(self._libraries_for(kind, spec))
        if libraries:
            verdict = await self._asked(Attempt(kind, spec, libraries))
        else:
            verdict = Verdict(reason="it has keywords that neither of the libraries here supports")
        if verdict.is_late:
            raise TrialLate(f"the trial of the answer's {kind} was given up: {verdict.reason}")
        self._known[kind, spec] = verdict
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)

    async def _asked(self, attempt: Attempt) -> Verdict:
        """What the process says of it.  Raises:  GrammarProcessEnded."""
        if self._starting is None or (self._starting.done() and self._starting.exception() is not None):
            self._starting = asyncio.create_task(self._launch())
        process = await asyncio.shield(self._starting)
        try:
            process.stdin.write(msgspec.json.encode(attempt) + b"\n")  # type: ignore[union-attr]
            return await _verdict(process, self._timeout_s)
        except BaseException:
            await self._end()  # its next line would answer this question
            raise

    async def _launch(self) -> asyncio.subprocess.Process:
        """Raises:  GrammarProcessEnded."""
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
            )
        except OSError as exc:
            raise GrammarProcessEnded(f"the process that tries grammars cannot be started: {exc}") from exc
        try:
            await _verdict(process, timeout_s=None)
        except BaseException:
            await _kill(process)
            raise
        return process

    async def stop(self) -> None:
        """Nobody may wait for a verdict any more."""
        if self._trial is not None:
            self._trial.cancel()
            await asyncio.wait([self._trial])
        await self._end()

    async def _end(self) -> None:
        starting, self._starting = self._starting, None
        if starting is None:
            return
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError, GrammarProcessEnded):
            process = await starting
            await _kill(process)


async def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


async def _verdict(process: asyncio.subprocess.Process, timeout_s: float | None) -> Verdict:
    """Its next word.  Raises:  GrammarProcessEnded."""
    try:
        async with asyncio.timeout(timeout_s):
            line = await process.stdout.readline()  # type: ignore[union-attr]
    except TimeoutError as exc:
        raise GrammarProcessEnded(f"the process that tries grammars said nothing for {timeout_s} s") from exc
    if not line:
        raise GrammarProcessEnded("the process that tries grammars ended; its last lines above say why")
    return msgspec.json.decode(line, type=Verdict)


def grammar_of(structured: StructuredOutput) -> tuple[str, str]:
    """`grammar_process.Attempt`'s kind and spec."""
    if structured.json_schema:
        return "json", structured.json_schema
    if structured.regex:
        return "regex", structured.regex
    if structured.choice:
        return "grammar", choice_grammar(structured.choice)
    if structured.grammar:
        return "grammar", structured.grammar
    return "structural_tag", structured.structural_tag


def choice_grammar(choice: Sequence[str]) -> str:
    """EBNF for one of these texts."""
    return "root ::= " + " | ".join(f'"{"".join(map(_escaped, text))}"' for text in choice)


def _escaped(character: str) -> str:
    if character in '\\"':
        return f"\\{character}"
    return f"\\u{ord(character):04x}" if ord(character) < 0x20 or ord(character) == 0x7F else character


def libraries_for(kind: str, spec: str) -> Sequence[str]:
    """As vLLM chooses: keywords that a library takes and does not mind are left to the other. Needs vLLM."""
    from vllm.v1.structured_output.backend_guidance import has_guidance_unsupported_json_features  # noqa: PLC0415
    from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features  # noqa: PLC0415

    if kind != "json":
        return LIBRARIES if kind != "structural_tag" else LIBRARIES[:1]
    schema: Any = msgspec.json.decode(spec)
    is_unsupported = (has_xgrammar_unsupported_json_features, has_guidance_unsupported_json_features)
    return [library for library, is_in in zip(LIBRARIES, is_unsupported, strict=True) if not is_in(schema)]
