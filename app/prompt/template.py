"""Chat templates: messages in, prompt text out, in segments that say which control tokens may be recognised.

Templates are rendered as `transformers` renders them (same sandbox, whitespace rules and helpers), with bounds on the
iterations and the size of the output.

A control token that a user typed must stay text, and so must one that only comes to be in the template: from the ends
of two messages, or when a filter takes something out of one. So where a client's text has any character that a control
token begins or ends with, the messages are rendered twice, neither time as they are:

- *marked*: each spelling of a control token inside a message is put between two sentinels, strings of private-use
  characters drawn anew for every rendering. They travel through the template with the text; afterwards every control
  token that overlaps a sentinel pair is the user's. Without its sentinels this is the prompt.
- *defused*: those characters are replaced by one that no control token has. A control token that is still there, at
  the same place, is the template's. Where the template looks at such characters (for `</think>`, say) and so writes
  something else, both renderings must have the same control tokens in the same order; if not, none is trusted.

The output is cut *at the template's own control tokens* around a user's one, which is where tokenizers cut anyway:
apart from the user's control token itself, tokens come out as if the text were encoded whole. A template that writes
both ends itself around a client's word (`<|{{ role }}|>`) means the token.
"""

import itertools
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import jinja2
import msgspec

from app.prompt.sandbox import BUDGET, IS_REPLY, Budget, Environment, TemplateError, TemplateLimits
from app.prompt.shapes import Shapes
from planes.wire.errors import InvalidRequest

Json = Any

_LIMITS: Final = TemplateLimits()


class Segment(msgspec.Struct, frozen=True):
    """A piece of a prompt. Control tokens spelt out in untrusted text are encoded as text."""

    text: str
    is_trusted: bool


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """A control token's spelling, and whether the tokenizer lets it swallow the white space beside it."""

    text: str
    lstrip: bool = False
    rstrip: bool = False


class ChatTemplate:
    """One model's compiled chat template. `render` may run on several threads at once."""

    def __init__(
        self,
        source: str,
        special_tokens: Sequence[SpecialToken] = (),
        *,
        variables: Mapping[str, Json] | None = None,
        limits: TemplateLimits = _LIMITS,
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        """
        Args:  special_tokens: every control token of the tokenizer.  variables: what the template sees beside the
        messages (`bos_token`, …).  clock: for `strftime_now`.
        Raises:  jinja2.TemplateSyntaxError.
        """
        self._template = Environment(clock).from_string(source)
        # The globals too: Jinja would merge them anew for every rendering, which takes as long as rendering.
        self._variables = {**self._template.globals, "tools": None, "documents": None, **(variables or {})}
        self._specials = {token.text: token for token in special_tokens if token.text}
        self._special = re.compile(_alternatives(self._specials))
        ends = {char for text in self._specials for char in (text[0], text[-1])}
        edges = {char for char in ends if not char.isalnum() and not char.isspace()}
        endless = [text for text in self._specials if edges.isdisjoint(text)]
        self._edges = (*endless, *edges)
        """What a control token can begin or end with; of one of letters alone, the whole."""
        self._edge = re.compile("|".join(map(re.escape, self._edges)))
        self._limits = limits
        # Most templates know only system, user and assistant; developer is OpenAI's newer word for system.
        self._knows_developer = "developer" in source
        self._shapes = Shapes(
            source,
            self._variables,
            has_edge=self._has_edge,
            knows_developer=self._knows_developer,
            limits=limits,
        )

    def render(
        self,
        messages: Sequence[dict[str, Json]],
        kwargs: Mapping[str, Json] | None = None,
        *,
        is_reply: bool = True,
        is_continued: bool = False,
    ) -> list[Segment]:
        """The prompt as one or more segments.

        Args:  kwargs: what the template sees besides: the request's `chat_template_kwargs`, `tools`, `documents`.
        is_reply: whether the prompt ends where the assistant's turn begins (`add_generation_prompt`).
        is_continued: whether it ends with the last message's content, for the answer to go on with it.
        Raises:  TemplateError.
        """
        if not kwargs and not is_continued:
            prompt = self._shapes.prompt(messages, is_reply=is_reply)
            if prompt is not None:
                return [Segment(prompt, is_trusted=True)]
        if not is_reply:
            kwargs = {**(kwargs or {}), IS_REPLY: False}
        if is_continued:
            kwargs = {**(kwargs or {}), _IS_CONTINUED: True}
        if not self._knows_developer:
            messages = [m | {"role": "system"} if m["role"] == "developer" else m for m in messages]
        else:
            messages = list(messages)
        try:
            if not (_spells(messages, self._has_edge) or (kwargs and _spells(kwargs, self._has_edge))):
                return [Segment(self._rendered(messages, kwargs), is_trusted=True)]
            return self._checked(messages, kwargs)
        except RecursionError as exc:
            raise TemplateError("The messages are nested too deeply for the chat template.", param="messages") from exc

    def _has_edge(self, text: str) -> bool:
        """Each by itself: a search for all at once takes 100 times as long for a long text."""
        for edge in self._edges:  # noqa: SIM110 - a generator would take as long as a short text
            if edge in text:
                return True
        return False

    def _checked(self, messages: Sequence[dict[str, Json]], kwargs: Mapping[str, Json] | None) -> list[Segment]:
        """The prompt of messages that may have to do with its control tokens: see the module."""
        spelt: Sequence[tuple[int, int]] = ()
        if _spells(messages, self._special.search) or (kwargs and _spells(kwargs, self._special.search)):
            sentinels = _Sentinels(self._limits.spelt_tokens)
            text, spelt = sentinels.removed(self._replaced(messages, kwargs, self._special, sentinels.around))
        else:
            text = self._rendered(messages, kwargs)
        return self._segments(text, spelt, self._replaced(messages, kwargs, self._edge, _DEFUSED))

    def _replaced(
        self,
        messages: Sequence[dict[str, Json]],
        kwargs: Mapping[str, Json] | None,
        found: re.Pattern[str],
        by: str | Callable[[re.Match[str]], str],
    ) -> str:
        """The prompt, with what is `found` in the client's strings replaced before the template sees them."""

        def change(text: str) -> str:
            return found.sub(by, text)

        return self._rendered([_mapped(message, change) for message in messages], _mapped(kwargs, change))

    def _rendered(self, messages: Sequence[dict[str, Json]], kwargs: Mapping[str, Json] | None) -> str:
        budget = Budget(self._limits)
        end = _End(messages) if kwargs and kwargs.get(_IS_CONTINUED) else None
        variables = {
            **self._variables,
            IS_REPLY: True,
            **(kwargs or {}),
            "messages": messages if end is None else end.messages,
            BUDGET: budget,
        }
        try:
            context = self._template.new_context(variables, shared=True)
            text = "".join(budget.output(self._template.root_render_func(context)))
            return text if end is None else end.cut(text)
        except InvalidRequest:
            raise
        except jinja2.TemplateError as exc:
            raise TemplateError(f"The chat template refused the messages: {exc}", param="messages") from exc
        except RecursionError as exc:
            raise TemplateError("The chat template recursed too deeply.", param="messages") from exc
        # A template is a program from outside: whatever it trips over is about this request, not about the gateway.
        except Exception as exc:
            raise TemplateError(
                f"The chat template failed on these messages: {type(exc).__name__}: {exc}", param="messages"
            ) from exc

    def _segments(self, text: str, spelt: Sequence[tuple[int, int]], defused: str) -> list[Segment]:
        """`text` cut up.  spelt: the control tokens that a message holds whole.  defused: the other rendering."""
        others, users = [], []
        pairs = iter(spelt)
        theirs_start, theirs_end = next(pairs, _NOWHERE)
        for match in self._special.finditer(text):
            start, end = match.span()
            while theirs_end <= start:
                theirs_start, theirs_end = next(pairs, _NOWHERE)
            if theirs_start < end:
                users.append(start)
            else:
                others.append(match)
        cuts: list[tuple[int, int]] = []  # the template's control tokens: [start, end)
        for match, is_templates in zip(others, self._templates(others, text, defused), strict=True):
            start, end = match.span()
            if is_templates:
                token = self._specials[match[0]]
                swallowed_from = _skip_back(text, start) if token.lstrip else start
                cuts.append((swallowed_from, _skip(text, end) if token.rstrip else end))
            else:
                users.append(start)
        return list(_cut(text, cuts, sorted(users)))

    def _templates(self, found: Sequence[re.Match[str]], text: str, defused: str) -> list[bool]:
        """Whether the template alone has written each of the control tokens `found` in `text`."""
        if len(text) == len(defused):
            return [defused.startswith(match[0], match.start()) for match in found]
        return [[match[0] for match in found] == self._special.findall(defused)] * len(found)


_NOWHERE: Final = (sys.maxsize, sys.maxsize)
_IS_CONTINUED: Final = "continue_final_message"
_PRIVATE_USE: Final = 0xF0000
_DEFUSED: Final = "\U0010fffd"
"""No control token has it: the last private-use character."""


class _Sentinels:
    """Two strings of 64 random bits each: a message that held one, to hide a control token in, would have to guess."""

    __slots__ = ("_left", "_limit", "closing", "opening")

    def __init__(self, limit: int) -> None:
        self._limit = self._left = limit
        drawn = [chr(_PRIVATE_USE + int.from_bytes(secrets.token_bytes(2))) for _ in range(8)]
        self.opening, self.closing = "".join(drawn[:4]), "".join(drawn[4:])

    def around(self, match: re.Match[str]) -> str:
        self._left -= 1
        if self._left < 0:
            raise TemplateError(
                f"The messages spell out more than {self._limit} of the model's control tokens, which is the limit.",
                param="messages",
            )
        return f"{self.opening}{match[0]}{self.closing}"

    def removed(self, marked: str) -> tuple[str, list[tuple[int, int]]]:
        """The text without sentinels, and what stood between pairs of them; a half that lost its other is dropped."""
        before, *opened = marked.split(self.opening)
        pieces = [before.replace(self.closing, "")]
        ranges: list[tuple[int, int]] = []
        length = len(pieces[0])
        for piece in opened:
            inside, closing, after = piece.partition(self.closing)
            if closing:
                ranges.append((length, length + len(inside)))
            text = inside + after.replace(self.closing, "")
            pieces.append(text)
            length += len(text)
        return "".join(pieces), ranges


class _End:
    """Finds where the last message's content ends in the prompt, as transformers does: by a mark that follows it."""

    __slots__ = ("_mark", "messages")

    def __init__(self, messages: Sequence[dict[str, Json]]) -> None:
        """Raises:  TemplateError if there is none."""
        if not messages:
            raise TemplateError("There is no message to go on with.", param="messages")
        self._mark = "".join([chr(_PRIVATE_USE + int.from_bytes(secrets.token_bytes(2))) for _ in range(4)])
        last = messages[-1]
        self.messages = [*messages[:-1], last | {"content": f"{last['content']}{self._mark} "}]

    def cut(self, text: str) -> str:
        before, mark, after = text.rpartition(self._mark)
        if not mark:
            raise TemplateError("The chat template does not show the last message's content.", param="messages")
        return before if after.startswith(" ") else before.rstrip()  # it trims, so it would have trimmed that end too


def _spells(value: Json, finds: Callable[[str], object]) -> bool:
    """Whether `finds` finds a control token anywhere in a JSON value."""
    if isinstance(value, str):
        return bool(finds(value))
    if isinstance(value, Mapping):
        return any(_spells(key, finds) or _spells(item, finds) for key, item in value.items())
    if isinstance(value, list | tuple):
        return any(_spells(item, finds) for item in value)
    return False


def _mapped(value: Json, change: Callable[[str], str]) -> Json:
    """A copy of a JSON value with every string in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, change) for item in value]
    return value


def _cut(text: str, cuts: Sequence[tuple[int, int]], users: Sequence[int]) -> Iterator[Segment]:
    """Segments of `text`: untrusted are the stretches between two of `cuts` in which one of `users` begins."""
    bounds = [(0, 0), *cuts, (len(text), len(text))]
    trusted_from, next_user = 0, 0
    for (_, start), (end, _) in itertools.pairwise(bounds):
        if next_user == len(users) or users[next_user] >= end:
            continue
        while next_user < len(users) and users[next_user] < end:
            next_user += 1
        if trusted_from < start:
            yield Segment(text[trusted_from:start], is_trusted=True)
        yield Segment(text[start:end], is_trusted=False)
        trusted_from = end
    if trusted_from < len(text):
        yield Segment(text[trusted_from:], is_trusted=True)


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _skip_back(text: str, position: int) -> int:
    while position > 0 and text[position - 1].isspace():
        position -= 1
    return position


def _alternatives(words: Iterable[str]) -> str:
    """A pattern that matches the longest of `words`, built as a trie: some models have thousands of control tokens."""
    trie: dict[str, Any] = {}
    for word in words:
        node = trie
        for char in word:
            node = node.setdefault(char, {})
        node[""] = {}
    return _pattern(trie)


def _pattern(trie: dict[str, Any]) -> str:
    prefix = ""
    while len(trie) == 1:  # one way on: no choice to write down
        ((char, trie),) = trie.items()
        if not char:
            return prefix
        prefix += re.escape(char)
    branches = [re.escape(char) + _pattern(node) for char, node in sorted(trie.items()) if char]
    if not branches:
        return prefix
    return f"{prefix}(?:{'|'.join(branches)}){'?' if '' in trie else ''}"
