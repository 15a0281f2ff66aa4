"""The sandboxed Jinja environment of chat templates, compatible with transformers.

trim_blocks, lstrip_blocks, break and continue, `{% generation %}`, tojson, raise_exception,
strftime_now. Concatenation keeps the class UntrustedText (untrusted_text.py). Loops, calls and
texts are counted (template_budget.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from coordinator.text.template_budget import (
    check_call,
    check_operands,
    count,
    counted,
    counted_parts,
)
from coordinator.text.untrusted_text import UntrustedText, is_marked, joined

_COUNTED = "_counted"  # the filter around the iterable of a loop
_GROWING = ("batch", "center", "format", "indent", "replace", "round", "slice", "wordwrap")


class _Generation(Extension):
    """`{% generation %}`, which marks output of the model for training: renders its content."""

    tags = {"generation"}  # noqa: RUF012 the name and type that Jinja expects

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Joining(CodeGenerator):
    """Compiles `a ~ b` to a call of the environment's `concat`."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Joining
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        return joined(counted_parts(parts))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        count()
        value = getattr(function, "__self__", None)
        if value is None:  # str.format, which the sandbox wraps
            value = getattr(getattr(function, "__wrapped__", None), "__self__", None)
        if isinstance(value, str):
            _check_method(function.__name__, value, args, kwargs)
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in template.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _COUNTED, [], [], None, None, lineno=loop.lineno)
        return template


def template_environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    """The environment; `now` is the clock of strftime_now."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return now().strftime(form)

    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    for name in _GROWING:
        environment.filters[name] = _checked(name, environment.filters[name])
    environment.filters[_COUNTED] = counted
    environment.filters["tojson"] = _to_json
    environment.filters["safe"] = _safe
    environment.filters["join"] = _join(environment.filters["join"])
    del environment.globals["lipsum"]  # its loop is not counted
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _check_method(name: str, value: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check the size of a str method's result before the call."""
    if name == "join":
        _check_joined(value, args[0] if args else ())
    elif name == "format_map":
        mapping = args[0] if args else {}
        check_call(name, value, mapping.values() if isinstance(mapping, Mapping) else ())
    else:
        check_call(name, value, (*args, *kwargs.values()))


def _check_joined(separator: str, parts: Any) -> None:
    if isinstance(parts, Sized) and parts:
        count(len(separator) * len(parts))
        if isinstance(parts, list | tuple):
            count(sum(len(part) for part in parts if isinstance(part, str)))


def _checked(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that checks the size of its result before it runs."""
    first = 1 if hasattr(original, "jinja_pass_arg") else 0

    @wraps(original)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if len(args) > first:
            check_call(name, args[first], (*args[first + 1 :], *kwargs.values()))
        return original(*args, **kwargs)

    return checked


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's filter escapes HTML, which models are not trained on.
    encoder = json.JSONEncoder(
        ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None:
        text = encoder.encode(value)
    else:  # indentation may make it many times longer
        check_call("center", "", (indent if isinstance(indent, int) else len(indent),))
        text = "".join(counted_parts(encoder.iterencode(value)))
    if not ensure_ascii or text.isascii():
        return text
    # Marks stay, because they stand for the client's characters, mostly ASCII.
    return "".join(c if c.isascii() or is_marked(c) else json.dumps(c)[1:-1] for c in text)


def _safe(value: Any) -> Markup:
    return Markup(str.__str__(value) if isinstance(value, UntrustedText) else value)


def _join(original: Callable[..., Any]) -> Callable[..., Any]:
    """Jinja's join filter that keeps the class UntrustedText."""

    @jinja2.pass_eval_context
    def join(
        context: nodes.EvalContext, value: Any, d: str = "", attribute: str | int | None = None
    ) -> str:
        parts = list(counted(value))
        _check_joined(str(d), parts)
        text = original(context, parts, d, attribute)
        return text if not isinstance(text, str) else joined([text, *(_empty(p) for p in parts)])

    return join


def _empty(part: Any) -> str:
    """An empty text of the class of `part`."""
    return part[:0] if isinstance(part, str) else ""
