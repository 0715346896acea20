"""Jinja for chat templates, which come with models and are not trusted.

Attributes are guarded by Jinja's own immutable sandbox. What it leaves open is a template that never ends or fills
the memory; here that is a `TorchchatError`:

- every pass of a loop, attribute, call, filter, test and operator is a step, and the processor time of all steps is
  limited (which also ends branching recursion; plain recursion ends in a RecursionError);
- `*`, `**`, `+`, `%`, `~`, slices, `replace`, `join`, `indent`, `format` and JSON are refused before they make a
  value that is too large, and a list that holds another one a thousand times counts it a thousand times;
- values are measured before they are compared, hashed or formatted, also in error messages;
- all texts and lists that steps make add up to a limited total, and so does the output;
- attributes and methods are those listed in `template_methods`, each with its guard, and filters that only make long
  texts are left out.

The limits grow with what the caller gives, so that a long conversation always fits.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from jinja2 import Template, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from torchchat_core.errors import TorchchatError, quoted, shortened
from torchchat_core.template_limits import ITERABLES_OF_NEW, budget, stopped
from torchchat_core.template_methods import can_read, guarded_arguments

LEFT_OUT_FILTERS = ("center", "filesizeformat", "pprint", "striptags", "urlize", "wordwrap", "xmlattr")
# These pass elements on without looking into them; the others are given no more than fits into one text.
PASSING_FILTERS = frozenset(["attr", "batch", "count", "d", "default", "first", "items", "last", "length", "list",
                             "map", "random", "reject", "rejectattr", "reverse", "select", "selectattr", "slice"])
# These consume a whole sequence, and compare or add its elements.
COLLECTING_FILTERS = frozenset(["groupby", "max", "min", "sort", "sum", "unique"])
# These look only at the type of a value.
PASSING_TESTS = frozenset(["boolean", "callable", "defined", "escaped", "false", "float", "integer", "iterable",
                           "mapping", "none", "number", "sameas", "sequence", "string", "true", "undefined"])
ARITHMETIC_TESTS = frozenset(["divisibleby", "even", "odd"])
WIDE_DATE = re.compile(r"%[-_0^#+]*\d|.{101}", re.DOTALL)  # the system's strftime can pad
WIDEST_JSON_INDENT = 16


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Jinja with the settings, names and filters that chat templates rely on, and the limits above."""

    intercepted_binops = frozenset({"*", "**", "+", "%", "-", "/", "//"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols],
                         finalize=_bounded)
        for name in LEFT_OUT_FILTERS:
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters["tojson"] = to_json
        self.filters = {name: _guarded_filter(name, function) for name, function in self.filters.items()}
        self.filters.update(GUARDS)
        self.tests = {name: _guarded_test(name, function) for name, function in self.tests.items()}
        self.globals.update(raise_exception=raise_exception, strftime_now=strftime_now, range=_small_range,
                            dict=lambda *values, **names: dict(*values, **names))

    def template(self, source: str) -> Template:
        """The compiled template. Raises Jinja's and Python's errors for a wrong one."""
        tree = _Guarding().visit(self.parse(source))
        return Template.from_code(self, self.compile(tree), self.make_globals(None))

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Joins the output of a template, macro or block."""
        return budget().concatenated(parts)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return super().is_safe_attribute(obj, attr, value) and can_read(obj, attr)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        # Jinja would print nothing where the attribute is not used any further.
        if attribute.startswith("_"):
            raise stopped(f"it accesses the attribute {quoted(attribute)} of a {type(obj).__name__}")
        return self.undefined(f"chat templates may not use {quoted(attribute)} of a {type(obj).__name__}",
                              name=attribute, obj=obj, exc=SecurityError)

    def getattr(self, obj: Any, attribute: str) -> Any:
        budget().step()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        limits = budget()
        limits.step()
        if not isinstance(argument, str | int | slice):  # it is hashed, and formatted if there is no such item
            limits.bounded(argument)
        return super().getitem(obj, argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        limits = budget()
        limits.step()
        if operator == "*":
            limits.check_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            limits.check_bits(left.bit_length() * right)
        elif operator == "%" and isinstance(left, str):
            limits.check_percent_format(left, [right])
        elif operator == "+" and isinstance(left, str) and isinstance(right, str):
            limits.need_text(len(left) + len(right))
        elif operator == "-":  # of the items of dictionaries, compares
            limits.bounded(left, right)
        return limits.charge(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        limits = budget()
        limits.step()
        if isinstance(obj, LoopContext) and args:
            args = (limits.counted(args[0]), *args[1:])
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps `format`
        args = guarded_arguments(limits, method, args, kwargs)
        value = super().call(context, obj, *args, **kwargs)
        if isinstance(value, list) and isinstance(getattr(method, "__self__", None), str):  # such as `split`
            limits.charge_elements(len(value))
        return limits.charge(value)


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks the parts to train on, and prints what is inside."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it as an instance variable

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Guarding(NodeTransformer):
    """Add guards to operations that bypass the environment's hooks: loops, `~`, comparisons, slices, tuples, dictionary
    keys, and the arguments that a macro collects."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = _guard(node.iter, "counted steps")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _guard(nodes.List(node.nodes, lineno=node.lineno, environment=node.environment), "joined text")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = _guard(node.expr, "bounded value")
        for operand in node.ops:
            guard = "searched values" if operand.op in ("in", "notin") else "bounded value"
            operand.expr = _guard(operand.expr, guard)
        return node

    def visit_Name(self, node: nodes.Name) -> nodes.Node:  # noqa: N802
        collected = node.ctx == "load" and node.name in ("varargs", "kwargs")
        return _guard(node, "charged value") if collected else node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.key = _guard(node.key, "bounded value")
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _guard(node, "charged value") if isinstance(node.arg, nodes.Slice) else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _guard(node, "charged value") if node.ctx == "load" else node


def raise_exception(message: object) -> None:
    """What a template calls to refuse a conversation. Raises `TorchchatError` with its message."""
    budget().bounded(message)
    raise TorchchatError(f"the chat template refuses this conversation: {shortened(str(message))}")


def strftime_now(pattern: str) -> str:
    """The local date and time. Raises `TorchchatError` for a pattern that is long or asks for padding."""
    if WIDE_DATE.search(pattern):
        raise stopped(f"its date pattern {quoted(pattern)} is too wide")
    return datetime.now().strftime(pattern)


def to_json(value: Any, ensure_ascii: bool = False, indent: int | str | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """The filter `tojson` as chat templates use it: plain JSON, where Jinja's own escapes it for HTML."""
    if indent is not None and (len(indent) if isinstance(indent, str) else indent) > WIDEST_JSON_INDENT:
        raise stopped(f"tojson is to indent by {quoted(indent)}; {WIDEST_JSON_INDENT} is the most")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return budget().concatenated(encoder.iterencode(value))


# ---- guards -------------------------------------------------------------------------------------------------------


def _guard(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=node.environment)


def _bounded(value: Any) -> Any:
    if not isinstance(value, str):
        budget().bounded(value)
    return value


# All guards ask for the context, so that Jinja never runs them while it compiles.
@pass_context
def _bounded_value(_: Context, value: Any) -> Any:
    return _bounded(value)


@pass_context
def _searched_values(_: Context, values: Any) -> Any:
    return _bounded(budget().collected(values))


@pass_context
def _charged_value(_: Context, value: Any) -> Any:
    return budget().charge(value)


@pass_context
def _joined_text(_: Context, parts: list[Any]) -> str:
    limits = budget()
    return limits.concatenated(map(str, limits.joinable(parts, "")))


@pass_context
def _counted_steps(_: Context, values: Iterable[Any]) -> Iterator[Any]:
    return budget().counted(values)


# A name with a space cannot be written in a template, except as an argument of `map`, where it does no harm.
GUARDS: Mapping[str, Callable[..., Any]] = {
    "bounded value": _bounded_value,
    "searched values": _searched_values,
    "charged value": _charged_value,
    "joined text": _joined_text,
    "counted steps": _counted_steps,
}


def _guarded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @pass_context
    def guarded(context: Context, *args: Any, **kwargs: Any) -> Any:
        limits = budget()
        limits.step()
        if name == "join" and args:
            separator = args[1] if len(args) > 1 else kwargs.get("d", "")
            args = (limits.joinable(args[0], str(separator)), *args[1:])
        elif name in PASSING_FILTERS:
            limits.bounded(*args[1:], *kwargs.values())
        else:
            if name in COLLECTING_FILTERS and args:
                args = (limits.collected(args[0]), *args[1:])
            limits.bounded(*args, *kwargs.values())
        _check_filter(name, args, kwargs)
        value = function(*_leading_argument(function, context), *args, **kwargs)
        if args and isinstance(args[0], ITERABLES_OF_NEW) and isinstance(value, list | Iterator):
            limits.charge_elements(len(args[0]))
        return limits.charge(value)

    return guarded


def _guarded_test(name: str, function: Any) -> Callable[..., Any]:
    @pass_context
    def guarded(context: Context, *args: Any) -> Any:
        limits = budget()
        limits.step()
        if name == "in" and len(args) > 1:
            args = (args[0], limits.collected(args[1]), *args[2:])
        if name not in PASSING_TESTS:  # it compares, hashes or formats
            limits.bounded(*args)
        if name in ARITHMETIC_TESTS:
            _need_numbers(name, args)
        return function(*_leading_argument(function, context), *args)

    return guarded


def _need_numbers(what: str, values: Iterable[Any]) -> None:
    """Raise `TorchchatError` for a value that is not a number: `%` and `*` of texts and lists can fill the memory."""
    for value in values:
        if not isinstance(value, int | float | Undefined):
            raise stopped(f"{what} got a {type(value).__name__}; expected a number")


def _leading_argument(function: Callable[..., Any], context: Context) -> tuple[Any, ...]:
    """What Jinja passes first to functions that are marked with `pass_context` and its like."""
    wanted = getattr(getattr(function, "jinja_pass_arg", None), "name", "")
    return {"context": (context,), "eval_context": (context.eval_ctx,),
            "environment": (context.environment,)}.get(wanted, ())


def _check_filter(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    limits = budget()
    if name == "replace" and len(args) >= 3:
        limits.check_replacement(str(args[0]), str(args[1]), str(args[2]))
    elif name == "format" and args:
        limits.check_percent_format(str(args[0]), [*args[1:], *kwargs.values()])
    elif name == "trim" and args:
        characters = args[1] if len(args) > 1 else kwargs.get("chars")
        if isinstance(characters, str):
            limits.need_search(len(str(args[0])), len(characters))
    elif name == "sum":
        _need_numbers("sum", [*args[2:3], kwargs.get("start", 0)])
    elif name in ("batch", "indent", "round", "slice"):
        limits.check_width(name, (*args[1:], *kwargs.values()))
        if name == "round":
            _need_numbers("round", args[:1])
        if name == "indent":
            width = args[1] if len(args) > 1 else kwargs.get("width", 4)
            by = len(width) if isinstance(width, str) else int(width)
            limits.need_text(len(str(args[0])) + by * (str(args[0]).count("\n") + 1))


def _small_range(*bounds: int) -> range:
    made = range(*bounds)
    budget().need_list(len(made))
    return made


@functools.cache
def chat_environment() -> ChatEnvironment:
    """The one environment, made when the first template is."""
    return ChatEnvironment()
