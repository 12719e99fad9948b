"""The shapes of prompts: what a template writes around the contents of ordinary messages, to join most prompts.

Ordinary messages have a role, a content that is not empty and holds nothing that a control token begins or ends with,
and no more. What nearly all templates write around such contents depends on the roles alone. Whether that is so is not
guessed from what a template wrote: it is rendered once with *holes* for contents, objects that are no strings, in a
sandbox that knows them. There a hole can be

- handed on: assigned, put into a list, given to a macro, written out;
- put together with text, by `+` and `~` and by a block or macro that writes it; that makes a larger `_Text`;
- trimmed, if it stands alone;
- asked what is the same for all such contents: whether it is a string, is true, is none, has a `</think>` in it.

Whatever else is done with it (its length, a slice, a filter, a comparison, `str()`) raises `_Looked`, which nothing in
a template catches: prompts of these roles are rendered each time. So are those of a template that asks for the date or
for chance.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import jinja2
import jinja2.compiler
import jinja2.filters
import jinja2.nodes
import jinja2.runtime
import jinja2.utils

from app.prompt.sandbox import BUDGET, IS_REPLY, Budget, CodeGenerator, Environment, TemplateLimits

Json = Any

_KEYS: Final = ("role", "content")
_ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool"})
_NUM_SHAPES: Final = 256
_NUM_MESSAGES: Final = 128
_NUM_HOLES: Final = 2 * _NUM_MESSAGES
_NUM_PIECES: Final = 4096
"""Of a text that a template puts together."""
_NUM_CHARS: Final = 32_768
"""Of the text around the holes."""


class Shapes:
    """One template's. `prompt` may be called on several threads at once."""

    def __init__(
        self,
        source: str,
        variables: Mapping[str, Json],
        *,
        has_edge: Callable[[str], bool],
        knows_developer: bool,
        limits: TemplateLimits,
    ) -> None:
        """
        Args:  variables: what the template sees beside the messages, globals included.  has_edge: whether something
        that a control token can begin or end with is in a text.  knows_developer: else that role is shown as system.
        """
        environment = _Learning([variables["strftime_now"], variables["lipsum"]])
        self._template = environment.from_string(source)
        self._variables = variables
        self._has_edge = has_edge
        self._limits = limits
        self._shown_roles = {role: role for role in _ROLES}
        if not knows_developer:
            self._shown_roles["developer"] = "system"
        self._is_off = any(has_edge(word) for word in (*_KEYS, *_ROLES, IS_REPLY))
        self._shapes: dict[tuple[tuple[str, ...], bool], _Shape | None] = {}

    def prompt(self, messages: Sequence[dict[str, Json]], *, is_reply: bool) -> str | None:
        """The prompt of ordinary messages. None: they are not, or their prompt has no shape."""
        if self._is_off or len(messages) > _NUM_MESSAGES:
            return None
        roles, contents = [], []
        for message in messages:
            if (*message,) != _KEYS:
                return None
            role, content = message.values()
            if type(role) is not str or type(content) is not str or not content:
                return None
            roles.append(role)
            contents.append(content)
        joined = "".join(contents)
        if self._has_edge(joined):
            return None
        key = (tuple(roles), is_reply)
        try:
            shape = self._shapes[key]
        except KeyError:
            shape = self._learned(*key)
        if shape is None or shape.max_chars(len(joined)) > self._limits.output_chars:
            return None
        return shape.filled(contents)

    def _learned(self, roles: tuple[str, ...], is_reply: bool) -> "_Shape | None":
        if not _ROLES.issuperset(roles):
            return None
        if len(self._shapes) >= _NUM_SHAPES:
            self._shapes.clear()
        shape = self._shapes[roles, is_reply] = self._shape(roles, is_reply)
        return shape

    def _shape(self, roles: tuple[str, ...], is_reply: bool) -> "_Shape | None":
        messages = [
            {"role": self._shown_roles[role], "content": _Text([_Hole(index, self._has_edge)])}
            for index, role in enumerate(roles)
        ]
        budget = Budget(self._limits)
        variables = {**self._variables, IS_REPLY: is_reply, "messages": messages, BUDGET: budget}
        pieces: list[_Piece] = []
        try:
            context = self._template.new_context(variables, shared=True)
            for text in self._template.root_render_func(context):
                for piece in _pieces(text):
                    if isinstance(piece, str):
                        budget.spend(len(piece))
                    pieces.append(piece)
        except (_Looked, Exception):  # noqa: BLE001 - whatever it is, rendering with the contents tells
            return None
        num_chars = self._limits.output_chars - budget.chars_left
        shape = _Shape(pieces, len(roles), num_chars)
        return shape if len(shape) <= _NUM_HOLES and num_chars <= _NUM_CHARS else None


class _Shape:
    """Text, a content, text, a content, … text."""

    __slots__ = ("_contents", "_is_trimmed", "_num_chars", "_pieces", "_repeats")

    def __init__(self, pieces: Iterable["_Piece"], num_messages: int, num_chars: int) -> None:
        """Args:  num_chars: that a rendering's budget is spent on apart from contents."""
        texts: list[list[str]] = [[]]
        holes = []
        for piece in pieces:
            if isinstance(piece, str):
                texts[-1].append(piece)
            else:
                texts.append([])
                holes.append(piece)
        self._pieces = [""] * (len(texts) + len(holes))
        self._pieces[::2] = map("".join, texts)
        self._contents = [hole.index + hole.is_trimmed * num_messages for hole in holes]
        """Indices of contents; of the trimmed ones, which follow, too."""
        self._is_trimmed = any(hole.is_trimmed for hole in holes)
        self._num_chars = num_chars
        self._repeats = max(Counter(hole.index for hole in holes).values(), default=0)

    def __len__(self) -> int:
        return len(self._contents)

    def max_chars(self, num_chars: int) -> int:
        """That a rendering's budget is spent on at most, with contents of so many characters."""
        return self._num_chars + self._repeats * num_chars

    def filled(self, contents: list[str]) -> str:
        if self._is_trimmed:
            contents = [*contents, *[content.strip() for content in contents]]
        pieces = self._pieces.copy()
        pieces[1::2] = [contents[index] for index in self._contents]
        return "".join(pieces)


class _Looked(BaseException):
    """Something was done with a hole that may depend on its text. No `Exception`: some filters catch these."""


def _look(*_: Any, **__: Any) -> Any:
    raise _Looked


class _Opaque:
    """What `isinstance`, `hasattr` and the operators of strings get nothing out of.

    Without `__add__`, `__mod__`, `__getitem__` and the like: C code asks which of them a type has and goes other ways
    with a string. Templates' operators and calls go through `_Learning`.
    """

    __slots__ = ()
    __getattribute__ = _look
    __str__ = __repr__ = __format__ = __hash__ = __bool__ = __len__ = __iter__ = __contains__ = _look
    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = _look


@dataclass(frozen=True, slots=True)
class _Hole:
    """Where a message's content belongs.  lacks: whether a text is in no ordinary content."""

    index: int
    lacks: Callable[[str], bool]
    is_trimmed: bool = False


_Piece = str | _Hole


class _Text(_Opaque):
    """Text with at least one hole in it."""

    __slots__ = ("pieces",)

    def __init__(self, pieces: Iterable[_Piece]) -> None:
        self.pieces = tuple(pieces)

    def __bool__(self) -> bool:
        if any(piece if isinstance(piece, str) else not piece.is_trimmed for piece in _pieces(self)):
            return True
        raise _Looked

    def __eq__(self, other: object) -> bool:
        if other is self:
            return True
        if other is None:
            return False
        if type(other) is str and not other:
            return not self
        raise _Looked

    __hash__ = _look

    def __contains__(self, item: object) -> bool:
        if type(item) is str and _hole(self).lacks(item):
            return False
        raise _Looked


class _Method(_Opaque):
    """Of a `_Text` that is one hole."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call


def _pieces(text: "str | _Text") -> tuple[_Piece, ...]:
    if type(text) is _Text:
        pieces: tuple[_Piece, ...] = object.__getattribute__(text, "pieces")
        return pieces
    if isinstance(text, str):
        return (text,)
    raise _Looked  # a filter block writes whatever its filter returns


def _hole(text: _Text) -> _Hole:
    first, *others = _pieces(text)
    if others or isinstance(first, str):
        raise _Looked
    return first


def _is_opaque(value: object) -> bool:
    return issubclass(type(value), _Opaque)


def _check(args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    if any(map(_is_opaque, args)) or any(map(_is_opaque, kwargs.values())):
        raise _Looked


def _shown(value: Any) -> Any:
    return value if type(value) is _Text else str(value)


def _joined(texts: Iterable[Any]) -> Any:
    pieces = [piece for text in texts for piece in _pieces(text) if piece]
    if len(pieces) > _NUM_PIECES:
        raise _Looked
    if any(isinstance(piece, _Hole) for piece in pieces):
        return _Text(pieces)
    return "".join(pieces)  # type: ignore[arg-type]


# What a string's methods, filters and tests do with a hole. Their arguments are named as those that they stand for.


def _trimmed(text: _Text) -> _Text:
    hole = _hole(text)
    return _Text([_Hole(hole.index, hole.lacks, is_trimmed=True)])


def _begins(text: _Text, affix: Any, /) -> bool:
    return affix in text


def _split(text: _Text, sep: Any) -> list[_Text]:
    if sep in text:
        raise _Looked
    return [text]


_METHODS: Final[Mapping[str, Callable[..., Any]]] = {
    "startswith": _begins,
    "endswith": _begins,
    "split": _split,
    "strip": _trimmed,
}


def _trim(value: Any, chars: str | None = None) -> Any:
    if type(value) is _Text and chars is None:
        return _trimmed(value)
    _check((value, chars), {})
    return jinja2.filters.do_trim(value, chars)


def _default(value: Any, default_value: Any = "", boolean: bool = False) -> Any:
    if type(value) is _Text and bool(value) and not _is_opaque(boolean):
        return value
    return jinja2.filters.do_default(value, default_value, boolean)


def _blind(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that is given no hole."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        _check(args, kwargs)
        return function(*args, **kwargs)

    return call


def _told(test: Callable[..., Any], answer: bool) -> Callable[..., Any]:
    """A test that is the same for all contents."""
    others = _blind(test)

    def call(value: Any) -> Any:
        return answer if type(value) is _Text else others(value)

    return call


_ANSWERS: Final = {
    "defined": True,
    "string": True,
    "sequence": True,
    "iterable": True,
    "undefined": False,
    "none": False,
    "boolean": False,
    "mapping": False,
    "number": False,
    "integer": False,
    "float": False,
    "callable": False,
    "true": False,
    "false": False,
}


class _CodeGenerator(CodeGenerator):
    def _output_child_pre(self, node: jinja2.nodes.Expr, frame: jinja2.compiler.Frame, finalize: Any) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super()._output_child_pre(node, frame, finalize)
        else:
            self.write("environment.shown(")

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: jinja2.compiler.Frame) -> None:  # noqa: N802 - Jinja's
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super().visit_Concat(node, frame)
            return
        self.write("environment.concat((")
        for operand in node.nodes:
            self.write("environment.shown(")
            self.visit(operand, frame)
            self.write("), ")
        self.write("))")


class _Learning(Environment):
    """The sandbox that knows holes."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})
    code_generator_class = _CodeGenerator
    concat = staticmethod(_joined)
    shown = staticmethod(_shown)

    def __init__(self, impure: Sequence[object]) -> None:
        """Args:  impure: functions that must not be called: what they return is no function of their arguments."""
        super().__init__(_look)
        self._impure = impure
        self.filters = {name: _blind(function) for name, function in self.filters.items()}
        self.filters |= {"trim": _trim, "default": _default, "d": _default, "random": _look}
        tests: dict[str, Any] = {**self.tests}
        self.tests = {
            name: _told(test, _ANSWERS[name]) if name in _ANSWERS else _blind(test) for name, test in tests.items()
        }

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if not (_is_opaque(left) or _is_opaque(right)):
            if operator in Environment.intercepted_binops:
                return super().call_binop(context, operator, left, right)
            return self.binop_table[operator](left, right)
        if operator != "+" or not {type(left), type(right)} <= {str, _Text}:
            raise _Looked
        return _joined((left, right))

    def call(self, context: jinja2.runtime.Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if any(function is impure for impure in self._impure):
            raise _Looked
        if type(function) is _Method:
            for name in ("_loop_vars", "_block_vars"):  # as Jinja takes them out again
                kwargs.pop(name, None)
            return object.__getattribute__(function, "call")(*args, **kwargs)
        if not (type(function) is jinja2.runtime.Macro or function is dict or function is jinja2.utils.Namespace):
            _check((function, *args), kwargs)
        return super().call(context, function, *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is _Text and attribute in _METHODS:
            return _Method(functools.partial(_METHODS[attribute], obj))
        if type(obj) is jinja2.utils.Namespace and not attribute.startswith("_"):
            value = getattr(obj, attribute, None)
            if type(value) is _Text:
                return value
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if _is_opaque(obj) or _is_opaque(argument):
            raise _Looked
        return super().getitem(obj, argument)
