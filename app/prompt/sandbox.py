"""What chat templates run in: the sandbox of `transformers`, its white space and helpers, and bounds on a rendering."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NoReturn

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from planes.wire.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """Bounds on one rendering."""

    iterations: int = 1_000_000
    spelt_tokens: int = 10_000
    """Control tokens spelt out by the client; each costs some microseconds."""
    output_chars: int = 64_000_000
    """Of the output, and of what `*` repeats on the way there."""
    integer_bits: int = 4_096


class TemplateError(InvalidRequest):
    """The template refused the messages, or could not be rendered with them."""

    code = "template_error"


IS_REPLY: Final = "add_generation_prompt"
"""The variable that says whether the prompt ends where the assistant's turn begins."""
BUDGET: Final = "_headrace_budget"
"""The variable with the rendering's `Budget`, and the filter that every loop goes through."""
_OF_ANY_DICT: Final = frozenset(dir({}))


class Budget:
    """Counts one rendering's iterations and characters."""

    __slots__ = ("_iterations_left", "_limits", "chars_left")

    def __init__(self, limits: TemplateLimits) -> None:
        self._limits = limits
        self._iterations_left = limits.iterations
        self.chars_left = limits.output_chars

    def iterate(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._iterations_left -= 1
            if self._iterations_left < 0:
                raise TemplateError(
                    f"The chat template looped more than {self._limits.iterations} times over these messages.",
                    param="messages",
                )
            yield item

    def multiply(self, operator: str, left: Any, right: Any) -> None:
        """Count what `left operator right` will make, before it is made."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > self._limits.integer_bits:
                raise TemplateError(
                    f"The chat template computed a number of more than {self._limits.integer_bits} bits.",
                    param="messages",
                )
            return
        for repeated, times in ((left, right), (right, left)):
            if isinstance(repeated, Sequence) and isinstance(times, int):
                self.spend(len(repeated) * max(times, 0))

    def output(self, pieces: Iterable[str]) -> Iterator[str]:
        for piece in pieces:
            self.spend(len(piece))
            yield piece

    def spend(self, num_chars: int) -> None:
        self.chars_left -= num_chars
        if self.chars_left < 0:
            raise TemplateError(
                f"The rendered prompt has more than {self._limits.output_chars} characters, which is the limit.",
                param="messages",
            )


class CodeGenerator(jinja2.compiler.CodeGenerator):
    """Computes nothing: Jinja's own does so with whatever is written out and has no variable in it."""

    def _output_child_to_const(self, node: jinja2.nodes.Expr, frame: jinja2.compiler.Frame, finalize: Any) -> str:
        if not isinstance(node, jinja2.nodes.Const | jinja2.nodes.TemplateData):
            raise jinja2.nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """transformers' sandbox; every `for`, `*` and `**` counts against the rendering's budget."""

    intercepted_binops = frozenset({"*", "**"})
    code_generator_class = CodeGenerator

    def __init__(self, clock: Callable[[], datetime]) -> None:
        """Args:  clock: for `strftime_now`."""
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing of a template is computed before a request pays for it
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        self.filters["tojson"] = _tojson
        self.filters[BUDGET] = _counted
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda pattern: clock().strftime(pattern)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        budget: Budget = context[BUDGET]
        budget.multiply(operator, left, right)
        return super().call_binop(context, operator, left, right)

    # As the sandbox's, which raises and catches an error for each `message.key`, and two for a key that is not there.

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute not in _OF_ANY_DICT:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(obj) is dict and type(argument) is str and argument not in _OF_ANY_DICT:
            return obj[argument] if argument in obj else self.undefined(obj=obj, name=argument)
        return super().getitem(obj, argument)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = jinja2.nodes.Filter(loop.iter, BUDGET, [], [], None, None, lineno=loop.lineno)
        for modifier in tree.find_all(jinja2.nodes.EvalContextModifier):
            if not all(isinstance(option.value, jinja2.nodes.Const) for option in modifier.options):
                raise jinja2.TemplateSyntaxError("'autoescape' takes true or false", modifier.lineno, name, filename)
        return tree


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks text for training; for serving it is the text."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@jinja2.pass_context
def _counted(context: jinja2.runtime.Context, items: Any) -> Iterator[Any]:
    budget: Budget = context[BUDGET]
    return budget.iterate(items)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the HTML escapes of Jinja's own."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
