"""A jinja2 environment for templates that nobody vouches for.

On top of jinja2's immutable sandbox, which keeps templates off Python's internals, this one is metered:
loops, calls, filters, operators and joins spend a budget of text and time, and whatever could make much of
little (`'a' * 10**10`, format widths, endless macros) is checked before it is done. Only the filters and
methods named here exist. Knows templates; knows no chat.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import BuiltinMethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_environment
from jinja2.visitor import NodeTransformer

_MAX_TEMPLATE_CHARS = 1 << 18
_MAX_TOKENS = 40_000  # of a template; large ones of released models have 10,000
_MAX_ARGUMENT = 1000  # of a number given to a filter or method: widths, counts, indents
_MAX_BITS = 256  # of a number made by * or **
_WIDE_FORMAT = re.compile(r"\d{4}|\*|:[^{}]*\{")  # a width of four digits, or one taken from an argument


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FILTERS = _words(""" abs attr batch capitalize count d default dictsort e escape first float format groupby
    indent int items last length list lower map max min reject rejectattr reverse round safe select
    selectattr slice sort string sum title trim truncate unique upper wordcount """)
_METHODS = {
    str: _words(""" capitalize casefold count endswith find format index isalnum isalpha isdecimal isdigit
        islower isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix
        replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper
        """),
    dict: _words("copy get items keys values"),
    list: _words("copy count index"),
    tuple: _words("count index"),
    **dict.fromkeys((int, float, bytes, range, set, frozenset), frozenset[str]()),
}


@dataclass(frozen=True, slots=True)
class RenderLimits:
    """What one rendering may spend."""

    text_chars: int = 4 << 20  # of any one text, the result included; items of any one list
    work_chars: int = 1 << 28  # of all texts made on the way
    time_s: float = 5.0


class LimitExceeded(SecurityError):
    """The template wanted more than it may have."""


class _Meter:
    """One rendering's budget."""

    def __init__(self, limits: RenderLimits) -> None:
        self._limits = limits
        self._work_left = limits.work_chars
        self._deadline_s = time.monotonic() + limits.time_s

    def check(self, size: int = 1) -> None:
        """Whether a text or list may be as large as `size` letters or items, and whether there is time
        left.
        """
        if size > self._limits.text_chars:
            raise LimitExceeded("it makes too much text")
        if time.monotonic() > self._deadline_s:
            raise LimitExceeded(f"it runs longer than {self._limits.time_s:g} seconds")

    def spend(self, size: int = 1) -> None:
        """Check, and take it from the budget."""
        self.check(size)
        self._work_left -= size
        if self._work_left < 0:
            raise LimitExceeded("it makes too much text")

    def weigh(self, value: Any) -> Any:
        """Spend for a value that is there already, and give it back; what a list holds was paid before."""
        self.spend(len(value) if isinstance(value, str | list | tuple | dict) else 1)
        return value

    def fathom(self, value: Any) -> int:
        """How many letters and items there are to print, compare or hash.

        Lists of lists of lists that share their parts are small in memory and endless to walk: those are
        refused.
        """
        size, pending = 0, [value]
        while pending:
            item = pending.pop()
            size += len(item) if isinstance(item, str) else 1
            if isinstance(item, list | tuple):
                pending.extend(item)
            elif isinstance(item, dict):
                pending.extend(item)
                pending.extend(item.values())
            if size + len(pending) > self._limits.text_chars:
                break
        self.check(size + len(pending))
        return size

    def walkable(self, value: Any) -> Any:
        """A value that was fathomed, given back."""
        if not isinstance(value, str):
            self.fathom(value)
        return value


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """`render(template, variables)` is the way in; one rendering at a time."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, limits: RenderLimits) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constants are folded when the template is compiled, where no budget holds
            finalize=self._walkable,
            extensions=[_GenerationTag, loopcontrols],
        )
        self._limits = limits
        self._meter = _Meter(limits)
        self.filters = {name: self._metered(name, self.filters[name]) for name in _FILTERS}
        self.filters |= {
            "join": pass_environment(_join),
            "replace": self._replace,
            "tojson": self._tojson,
            _LOOP: self._loop,
            _CONCAT: self.concat,
            _WALK: self._walkable,
            _WEIGH: self._weighed,
        }
        self.tests = {name: self._walking(test) for name, test in dict[str, Any](self.tests).items()}
        self.globals = {
            "range": self.globals["range"],  # the sandbox's, of at most 100,000 items
            "dict": dict,
            "namespace": _TemplateNamespace,
        }

    def load(self, text: str) -> jinja2.Template:
        """Compile a template. Raises jinja2.TemplateSyntaxError, LimitExceeded."""
        if len(text) > _MAX_TEMPLATE_CHARS or any(
            count >= _MAX_TOKENS for count, _ in enumerate(self.lex(text))
        ):
            raise LimitExceeded("it is longer than any chat needs")  # and would be long in compiling
        tree = _Instrumented().visit(self.parse(text))
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))

    def render(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """The template's text. Raises LimitExceeded, SecurityError and whatever the template runs into."""
        self._meter = _Meter(self._limits)
        return self.concat(template.generate(**variables))

    # -- where the budget is spent -----------------------------------------------------------------------

    def concat(self, parts: Iterable[Any]) -> str:
        """jinja2's own name for how blocks, macros and `~` join their parts."""
        texts, size = [], 0
        for part in parts:
            texts.append(str(self._meter.walkable(part)))
            size += len(texts[-1])
            self._meter.check(size)
        self._meter.spend(size)
        return "".join(texts)

    def _walkable(self, value: Any) -> Any:
        return self._meter.walkable(value)

    def _weighed(self, value: Any) -> Any:
        return self._meter.weigh(value)

    def _loop(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._meter.spend()
            yield item

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self._meter.spend()
        if operator in ("*", "**"):
            self._check_product(operator, left, right)
        elif operator == "%" and isinstance(left, str):
            self._check_format(left)
            self._meter.fathom(right)
        return self._meter.weigh(super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        self._meter.spend()
        self._meter.fathom([*args, *kwargs.values()])
        if isinstance(function, BuiltinMethodType) and isinstance(function.__self__, str):
            match function.__name__:
                case "join" if args:
                    return _join(self, args[0], function.__self__)
                case "replace" if len(args) >= 2:
                    return self._replace(function.__self__, *args, **kwargs)
            _check_arguments(args, kwargs)
            parts = super().call(context, function, *args, **kwargs)
            self._meter.spend(self._meter.fathom(parts))  # `split` and its like make many new texts at once
            return parts
        return self._meter.weigh(super().call(context, function, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, methods in _METHODS.items():
            if isinstance(obj, kind):
                return attr in methods
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatted = super().wrap_str_format(value)
        if formatted is not None:
            self._check_format(value.__self__)
        return formatted

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        # A filter that wants the environment or the context gets it first, before the value.
        position = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            self._meter.spend()
            first, value, rest = args[:position], args[position], args[position + 1 :]
            _check_arguments(rest, kwargs)
            self._meter.fathom([value, *rest, *kwargs.values()])
            if isinstance(value, Iterator):
                value = map(self._meter.walkable, self._loop(value))
            if name == "format":
                self._check_format(str(value))
            if name == "indent":
                self._meter.spend(len(str(value)) + str(value).count("\n") * _MAX_ARGUMENT)
            return self._meter.weigh(function(*first, value, *rest, **kwargs))

        return metered

    def _walking(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def walking(*args: Any, **kwargs: Any) -> Any:
            self._meter.fathom(args)
            return function(*args, **kwargs)

        return walking

    def _replace(self, value: Any, old: str, new: str, count: int = -1) -> str:
        text, old, new = (str(self._meter.walkable(part)) for part in (value, old, new))
        self._meter.spend(len(text) + text.count(old) * len(new))
        return text.replace(old, new, count)

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Sequence[str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        if indent is not None and not 0 <= indent <= 16:
            raise LimitExceeded("it indents JSON by more than 16")
        pair = None if separators is None else (str(separators[0]), str(separators[1]))
        return self.concat(
            json.JSONEncoder(
                ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys
            ).iterencode(value)
        )

    def _check_product(self, operator: str, left: Any, right: Any) -> None:
        if isinstance(left, int) and isinstance(right, int):
            power = operator == "**"
            bits = left.bit_length() * right if power else left.bit_length() + right.bit_length()
            if bits > _MAX_BITS:
                raise LimitExceeded("it makes too large a number")
            return
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, str | list | tuple) and isinstance(times, int):
                self._meter.spend(len(sequence) * max(times, 0))

    @staticmethod
    def _check_format(text: str) -> None:
        if _WIDE_FORMAT.search(text):
            raise LimitExceeded("it formats text to a large width")


def _check_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, int) and abs(argument) > _MAX_ARGUMENT:
            raise LimitExceeded(
                f"it gives {argument} to a filter or method; at most {_MAX_ARGUMENT} is allowed"
            )


def _join(
    environment: MeteredEnvironment, value: Iterable[Any], d: str = "", attribute: str | None = None
) -> str:
    """jinja2's `join` filter, and str.join, in metered form."""
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)

    def parts() -> Iterator[Any]:
        for number, item in enumerate(value):
            if number:
                yield d
            yield item

    return environment.concat(parts())


class _TemplateNamespace(Namespace):
    """jinja2's `namespace()`, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args  # so that `namespace(self=...)` works, as in jinja2
        names = dict(*rest, **kwargs)
        for name in names:
            _check_name(name)
        Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"  # not what is in it, which may be endless to print


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"it stores an attribute named {name!r}")


# -- compiling -------------------------------------------------------------------------------------------

# Filters with names that a template may write too; they only spend its own budget.
_LOOP, _CONCAT, _WALK, _WEIGH = "metered loop", "metered concat", "walkable", "weighed"


class _Instrumented(NodeTransformer):
    """Send through the budget what jinja2 compiles to plain Python: loops, `~`, comparisons, computed keys,
    slices, and lists, tuples and dicts written out.
    """

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filter(node.iter, _LOOP)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), _CONCAT)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filter(node.expr, _WALK)
        for operand in node.ops:
            operand.expr = _filter(operand.expr, _WALK)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _filter(node.key, _WALK)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _filter(node, _WEIGH)
        if not isinstance(node.arg, nodes.Const):
            node.arg = _filter(node.arg, _WALK)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, _WEIGH)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, _WEIGH)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, _WEIGH) if node.ctx == "load" else node


def _filter(node: nodes.Node, name: str) -> nodes.Filter:
    assert isinstance(node, nodes.Expr)
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _GenerationTag(Extension):
    """`{% generation %}` marks for training what the assistant says; here it marks nothing."""

    tags = {"generation"}  # noqa: RUF012 -- jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
