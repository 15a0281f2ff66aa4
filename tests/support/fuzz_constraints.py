"""Constraints for the fuzz: those that people write, and those meant to do harm.

A compiler of grammars is the largest parser behind the public door. What is hostile here is small
on the wire and large behind it: nested, wide, endless, ambiguous, or at a limit and one beyond it.
The dearest take a second or two to be refused; they are rare, so that a run has an end.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

_HOSTILE = 0.3
_DEAR = 0.02  # of the hostile ones
_WORDS = (
    "river",
    "sea",
    "old man",
    "é\u0301",
    "\U0001f1e9\U0001f1ea",
    'a "b"',
    "\\",
    "\n",
    "x" * 40,
)
_SCHEMA_CHARS, _GRAMMAR_CHARS, _REGEX_CHARS = 1 << 20, 64 << 10, 16 << 10  # what is taken at most

# Python's `re` means the same by these, and never takes long over an answer: answers are checked.
PLAIN_REGEXES = (
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}",
    r"(yes|no|maybe)",
    r"[A-Z][a-z]{1,12}( [a-z]{1,12}){0,5}\.",
    r"[a-z0-9._]{1,20}@[a-z0-9]{1,20}\.(com|org)",
    r"-?(0|[1-9][0-9]{0,8})(\.[0-9]{1,6})?",
    r"\{\"a\": \"[^\"\\\n]{0,20}\"\}",
)


def json_schema(random: Random) -> bytes:
    """A JSON schema, or something in its place."""
    if random.random() >= _HOSTILE:
        return _dumped({"$defs": {"it": _schema(random, 0)}, **_schema(random, 3)})
    dear = random.random() < _DEAR
    return random.choice(_DEAR_SCHEMAS if dear else _HOSTILE_SCHEMAS)(random)


def parameters(random: Random) -> bytes:
    """Tool definitions with schemas of these kinds."""
    schema = json_schema(random).decode()
    name = random.choice(("look_up", "a.b-c_1", "x" * 64, "calls"))
    head = f'{{"type": "function", "function": {{"name": "{name}", "strict": '
    strict = random.choice(("true", "false"))
    return f'[{head}{strict}, "parameters": {schema}}}}}]'.encode()


def regex(random: Random) -> bytes:
    """A regular expression, or something in its place."""
    if random.random() >= _HOSTILE:
        return random.choice(PLAIN_REGEXES).encode()
    return random.choice(_HOSTILE_REGEXES)(random).encode()


def grammar(random: Random) -> bytes:
    """A Lark grammar, or something in its place."""
    if random.random() >= _HOSTILE:
        return random.choice(_GRAMMARS).encode()
    dear = random.random() < _DEAR
    return random.choice(_DEAR_GRAMMARS if dear else _HOSTILE_GRAMMARS)(random).encode()


def choices(random: Random) -> list[bytes]:
    """Texts to choose from."""
    if random.random() >= _HOSTILE:
        return [random.choice(_WORDS).encode() for _ in range(random.randrange(1, 6))]
    return [text.encode() for text in random.choice(_HOSTILE_CHOICES)(random)]


# -- schemas ---------------------------------------------------------------------------------------


def _schema(random: Random, depth: int) -> dict[str, Any]:
    """As a person may write it: objects, lists, scalars with a bound or two."""
    kinds: list[Callable[[], dict[str, Any]]] = [
        lambda: {"type": "string", "maxLength": random.choice((1, 5, 20))},
        lambda: {"type": "string", "pattern": random.choice(PLAIN_REGEXES)},
        lambda: {"type": "string", "format": random.choice(("date", "uuid", "email", "ipv4"))},
        lambda: {"type": "integer", "minimum": random.randrange(10), "maximum": 99},
        lambda: {"type": "number"},
        lambda: {"type": random.choice(("boolean", "null", "integer", "string"))},
        lambda: {"type": ["string", "null"]},
        lambda: {"enum": [random.choice(_WORDS), random.randrange(100), None]},
        lambda: {"const": random.choice((1, "a", None, [1, 2], {"b": "c"}))},
    ]
    if not depth:
        return random.choice(kinds)()
    below = depth - 1
    kinds += 4 * [lambda: _object(random, below)]
    kinds += [
        lambda: {
            "type": "array",
            "items": _schema(random, below),
            "maxItems": random.choice((2, 5)),
        },
        lambda: {"anyOf": [_schema(random, below), {"type": "null"}]},
        lambda: {"type": "object", "properties": {"next": {"$ref": "#/$defs/it"}}},
    ]
    return random.choice(kinds)()


def _object(random: Random, depth: int) -> dict[str, Any]:
    names = [random.choice(("name", "age", "a b", "é", "x1", "")) for _ in range(3)]
    out: dict[str, Any] = {
        "type": "object",
        "properties": {name: _schema(random, depth) for name in names},
    }
    if random.random() < 0.7:
        out["required"] = names[:2]
    if random.random() < 0.5:
        out["additionalProperties"] = random.choice((True, False))
    return out


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def _deep(random: Random) -> bytes:
    n = random.choice((20, 60, 130, 1_000, 20_000))
    return b'{"type":"object","properties":{"a":' * n + b"{}" + b"}}" * n


def _names(random: Random) -> dict[str, Any]:
    return {f"p{i}": {"type": "string"} for i in range(random.choice((30, 300, 1_000)))}


def _union(random: Random) -> bytes:
    how = random.choice(("anyOf", "oneOf", "allOf"))
    parts = [{"properties": {name: rule}} for name, rule in _names(random).items()]
    return _dumped({how: parts})


def _doubling(random: Random) -> bytes:
    """2^n ways to read thirty short lines."""
    how = random.choice(("anyOf", "allOf"))
    defs: dict[str, Any] = {"d0": {"type": "string"}}
    for i in range(1, 30):
        defs[f"d{i}"] = {how: 2 * [{"$ref": f"#/$defs/d{i - 1}"}]}
    return _dumped({"$defs": defs, "$ref": "#/$defs/d29"})


def _keywords(random: Random) -> bytes:
    """One or two that are extreme, contradict each other, or are not known."""
    known: tuple[dict[str, Any], ...] = (
        {"type": "string", "minLength": 10**6},
        {"type": "string", "minLength": 5, "maxLength": 2},
        {"type": "string", "maxLength": -1},
        {"type": "string", "pattern": _of(random, _HOSTILE_REGEXES)},
        {"type": "string", "format": random.choice(("no such", "regex", "iri", "json-pointer"))},
        {"type": "array", "minItems": 10**5, "items": {"type": "integer"}},
        {"type": "array", "minItems": 10**19},
        {"type": "array", "prefixItems": [{}] * 500, "items": False, "minItems": 501},
        {"type": "array", "uniqueItems": True},
        {"type": "integer", "minimum": 10**400},
        {"type": "number", "minimum": 1e-300, "maximum": 1e300, "multipleOf": 1e-7},
        {"type": "number", "multipleOf": random.choice((0, -1, 3, 1e-320))},
        {"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 1},
        {"type": "nothing"},
        {"type": []},
        {"enum": []},
        {"enum": "abc"},
        {"not": {}},
        {"if": {}, "then": False},
        {"$ref": random.choice(("#", "#/$defs/none", "http://x/y", "#/%zz", "file:///etc/passwd"))},
        {"required": [f"r{i}" for i in range(1_000)], "type": "object"},
        {"patternProperties": {"(a+)+$": {}}, "type": "object"},
        {"propertyNames": {"pattern": "^(x|x)*$"}, "minProperties": 1_000},
        {"properties": {"a": 3}, "type": "object"},
        {"x-guidance": {"whitespace_pattern": "(a*)*", "item_separator": "\0"}},
        {"$schema": "http://json-schema.org/draft-99/schema#", "$id": "\0", "$anchor": "#"},
    )
    return _dumped(random.choice(known))


def _recursive(random: Random) -> bytes:
    loops: tuple[dict[str, Any], ...] = (
        {"properties": {"l": {"$ref": "#"}, "r": {"$ref": "#"}}, "required": ["l", "r"]},
        {"type": "object", "properties": {"l": {"$ref": "#"}, "r": {"$ref": "#"}}},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"anyOf": [{"$ref": "#"}, {"type": "array", "items": {"$ref": "#"}}]},
        {"allOf": [{"$ref": "#"}, {"$ref": "#"}]},
    )
    return _dumped(random.choice(loops))


def _no_schema(random: Random) -> bytes:
    """JSON of another kind, or no JSON at all."""
    return random.choice(
        (
            *(b"{", b"[]", b"null", b"true", b"false", b"3", b'""', b"{}", b" ", b"\x00", b"{}{}"),
            b'{"type": "string", "type": "integer"}',
            b'{"const": "\\ud800"}',
            b'{"const": "\\u0000"}',
            b'{"minimum": NaN}',
            b'{"maximum": 1e999}',
            b'{"minimum": ' + b"9" * 5_000 + b"}",
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b" " * _SCHEMA_CHARS + random.choice((b"", b"{}")),
            b"{" + b" " * (_SCHEMA_CHARS - 2) + b"}",
            b'\xef\xbb\xbf{"type": "string"}',
            b"<schema/>",
        )
    )


_HOSTILE_SCHEMAS: tuple[Callable[[Random], bytes], ...] = (
    *(_deep, _union, _doubling, _recursive, _no_schema, _keywords, _keywords, _keywords),
    lambda r: _dumped({"type": "object", "properties": _names(r)}),
    lambda r: _dumped({"enum": [f"value {i}" for i in range(r.choice((100, 5_000)))]}),
)
_DEAR_SCHEMAS: tuple[Callable[[Random], bytes], ...] = (
    lambda r: _dumped({"properties": {f"p{i}": {"type": "integer"} for i in range(5_000)}}),
    lambda r: _dumped({"enum": [f"value {i} of a long list" for i in range(30_000)]}),
    lambda r: _dumped({"anyOf": [{"const": f"{i}" * 20} for i in range(8_000)]}),
)


# -- regular expressions ---------------------------------------------------------------------------

_HOSTILE_REGEXES: tuple[Callable[[Random], str], ...] = (
    lambda r: r.choice(("(a+)+$", "(a|a)*b", "(x+x+)+y", "^(([a-z])+.)+[A-Z]([a-z])+$", "(.*)*")),
    lambda r: r.choice(("(?:a?){500}a{500}", "((((a{10}){10}){10}){10}){10}", "(a{0,99}){0,99}")),
    lambda r: r.choice((r"[\w]{100000}", r"\w{1000}", "a{4294967296}", "a{5,2}", "a{,}", "a**")),
    lambda r: r.choice(("(?=a)b", "(?<!a)b", r"(a)\1", "(?P<x>a)(?P=x)", "(?R)", "(?#a)", r"\K")),
    lambda r: r.choice((r"\p{L}{1,300}(\p{N}|\p{L}){300}", r"\p{None}", "[z-a]", "[[:alpha:]]+")),
    lambda r: r.choice(("(", ")", "[", "\\", "*", "(?", "\x00", "\u202e", "^$", "$^", r"\b", " ")),
    lambda r: r.choice(
        ("(?i)\u0130\u017f\ufb03+", "(?s).*", "(?x) a # b", "(?-u)\\xff", r"\x{110000}")
    ),
    lambda r: "(" * (n := r.choice((50, 300, 8_000))) + "a" + ")" * n,
    lambda r: "(?:" * (n := r.choice((50, 300, 2_000))) + "a" + ")?" * n,
    lambda r: "|".join(f"word{i}" for i in range(r.choice((100, 1_700)))),
    lambda r: r.choice((".*", ".*?", "a*", "[^a]*a", "(.*a.{12})")) * r.choice((5, 30, 300)),
    lambda r: "é" * (_REGEX_CHARS + r.choice((-1, 0, 1))),
    lambda r: "".join(r.choice("()[]{}|*+?.^$\\ab0,-") for _ in range(r.choice((5, 20, 100)))),
)


# -- grammars --------------------------------------------------------------------------------------

_GRAMMARS = (
    'start: "yes" | "no"',
    'start: sum\nsum: NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]{1,3}/',
    'start: "[" [item ("," item)*] "]"\nitem: /[a-z]+/\n%ignore / +/',
    'start: greeting " " name\ngreeting: "hello" | "good day"\nname: /[A-Z][a-z]+/',
    'start: %json {"type": "object", "properties": {"a": {"type": "integer"}}}',
    'start: expr\nexpr: term | expr "-" term\nterm: "(" expr ")" | /[a-z]/',
)


def _rules(random: Random) -> str:
    """A chain, a circle or a bush of rules."""
    n = random.choice((50, 400))
    last = random.choice(('"x"', "r0", "none"))
    body = random.choice(('"a" {0} | "b"', "{0}", "{0} {0}", "{0}*", "{0}? {0}"))
    return "\n".join(
        ["start: r0", *(f"r{i}: {body.format(f'r{i + 1}')}" for i in range(n)), f"r{n}: {last}"]
    )


_HOSTILE_GRAMMARS: tuple[Callable[[Random], str], ...] = (
    _rules,
    lambda r: r.choice(("start: start", 'start: start "a" | "a"', 'start: s\ns: s s | "a" | ""')),
    lambda r: r.choice(("", "start:", "begin: /a/", "start: b", "start: /a/\nstart: /b/", "%%%")),
    lambda r: r.choice(("A: A\nstart: A", "A: B\nB: A\nstart: A", "start: A\nA: /a*/ & ~/.*b.*/")),
    lambda r: r.choice(('start: "a"{100000}', 'start: "a"{5,2}', 'start: ("a"{0,99}){0,99}')),
    lambda r: r.choice(
        ("start: <[5]>", "start: <[99999999]>", "start: <[^0-49151]>", "start: <|im_end|>")
    ),
    lambda r: r.choice(('start: "a" -> b', 'start[lazy]: /(?s:.*)/ "x"', 'start[stop=""]: /.*/')),
    lambda r: r.choice(
        ("%import common.INT\nstart: INT", "%import .x.Y\nstart: Y", "%ignore /.*/\nstart: /a/")
    ),
    lambda r: r.choice(
        ('start: %json {"$ref": "#"}', "start: %json {", "start: %regex {}", "start: @x")
    ),
    lambda r: f"start: %json {_schema_text(r)}",
    lambda r: f"start: /{_of(r, _HOSTILE_REGEXES)}/",
    lambda r: "start: " + "(" * (n := r.choice((50, 500, 20_000))) + '"a"' + ")" * n,
    lambda r: "start: " + "[" * (n := r.choice((50, 500))) + '"a"' + "]" * n,
    lambda r: f'start: "{"a" * (_GRAMMAR_CHARS - 9 + r.choice((-1, 0, 1)))}"',
    lambda r: "".join(r.choice('start:|"()/[]*?\n% aA{}<>~&') for _ in range(100)),
)
_DEAR_GRAMMARS: tuple[Callable[[Random], str], ...] = (
    lambda r: "start: " + '"a"? ' * 10_000,
    lambda r: (
        "start: r0\n" + "\n".join(f'r{i}: "a" r{i + 1}' for i in range(3_500)) + '\nr3500: "x"'
    ),
)

_HOSTILE_CHOICES: tuple[Callable[[Random], list[str]], ...] = (
    lambda r: [f"choice number {i}" for i in range(r.choice((100, 1_000, 1_001)))],
    lambda r: ["a" * i for i in range(1, 300)],
    lambda r: ["a"] * r.choice((2, 1_000)),
    lambda r: ["a" * (_GRAMMAR_CHARS + r.choice((-1, 0, 1)))],
    lambda r: ["\n" * _GRAMMAR_CHARS],  # twice as long when it is quoted
    lambda r: ["a", ""],
    lambda r: ["\x00", "\x7f", "\u2028", "\ufeff", "\U0010ffff", '"', "\\", "\\u0041", "</s>"],
    lambda r: ["<|im_end|>", "<|endoftext|>", "<tool_call>"],
    lambda r: [],
)


def _of(random: Random, kinds: tuple[Callable[[Random], str], ...]) -> str:
    return random.choice(kinds)(random)


def _schema_text(random: Random) -> str:
    return random.choice(_HOSTILE_SCHEMAS)(random).decode(errors="replace")
