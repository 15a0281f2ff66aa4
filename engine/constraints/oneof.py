"""Finds out whether the branches of a `oneOf` are disjoint: then it equals an `anyOf`.

llguidance supports `anyOf`, and `oneOf` if it can prove the branches disjoint, but not through
`$ref`, as unions are mostly written:

    {"oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]}
        Cat, Dog: objects; "kind" is required, with a different constant in each

Branches count as disjoint only by types, by constants, or by required members that are disjoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from engine.constraints.json_walk import at_pointer, objects_in

_MAX_VISITS = 10_000  # in one document; beyond, no branches count as disjoint
_ITEMS = 16  # list items that count as one visit
_MAX_DEPTH = 12
_TYPES = {
    "null": {"null"},
    "boolean": {"boolean"},
    "integer": {"integer"},
    "number": {"integer", "fraction"},
    "string": {"string"},
    "array": {"array"},
    "object": {"object"},
}
_ALL_TYPES = frozenset().union(*_TYPES.values())
_Value = tuple[str, object]  # type and value: 1 equals 1.0, but not true
Schema = dict[str, object]


class Branches:
    """Compares branches within one document. In draft 4 `const` has no meaning."""

    def __init__(self, root: Schema, has_const: bool = True) -> None:
        self._root = root
        self._has_const = has_const
        self._visits_left = _MAX_VISITS
        self._values: dict[int, frozenset[_Value] | None] = {}  # by id() of a subschema
        self._is_one_resource = not _names_inside(root)

    def are_disjoint(self, options: Sequence[object], beside: Schema) -> bool:
        """Whether no value fits two of `options`; `beside` is the schema that holds them."""
        common: Schema = {key: beside[key] for key in ("type", "required") if key in beside}
        sides = [[*self._parts(option), common] for option in options]
        return all(
            self._disjoint(one, other, _MAX_DEPTH)
            for i, one in enumerate(sides)
            for other in sides[:i]
        )

    def _disjoint(self, one: list[Schema], other: list[Schema], depth: int) -> bool:
        """Whether no value fits all of `one` and all of `other`; False: not proven."""
        self._visits_left -= 1 + (len(one) + len(other)) // _ITEMS
        if self._visits_left < 0 or depth == 0:
            return False
        of_one, of_other = self._values_of(one), self._values_of(other)
        if not self._types_of(one, of_one) & self._types_of(other, of_other):
            return True
        if of_one is not None and of_other is not None and not of_one & of_other:
            return True
        for a, values, b in ((one, of_one, other), (other, of_other, one)):
            for options in _choices(a):
                if all(self._disjoint(self._parts(each), b, depth - 1) for each in options):
                    return True
            if self._types_of(a, values) == {"object"} and self._members_disjoint(a, b, depth):
                return True
        return False

    def _members_disjoint(self, one: list[Schema], other: list[Schema], depth: int) -> bool:
        """Whether a member that `one` requires cannot have a value that `other` allows."""
        listed = [_listed(part, "required") for part in one]
        self._visits_left -= sum(map(len, listed)) // _ITEMS
        names = {name for names in listed for name in names if isinstance(name, str)}
        return any(
            any(_forbids(part, name) for part in other)
            or self._disjoint(self._member(one, name), self._member(other, name), depth - 1)
            for name in sorted(names)
        )

    def _values_of(self, parts: list[Schema]) -> frozenset[_Value] | None:
        left: frozenset[_Value] | None = None
        for part in parts:
            if "const" not in part and "enum" not in part:
                continue
            if id(part) not in self._values:
                self._values[id(part)] = self._constants(part)
            if (found := self._values[id(part)]) is not None:
                self._visits_left -= len(found) // _ITEMS
                left = found if left is None else left & found
        return left

    def _types_of(self, parts: list[Schema], values: frozenset[_Value] | None) -> frozenset[str]:
        self._visits_left -= sum(len(_listed(part, "type")) for part in parts) // _ITEMS
        return _types(parts, values)

    def _constants(self, part: Schema) -> frozenset[_Value] | None:
        """All values that it allows; None: not enumerable."""
        listed = [part["const"]] if self._has_const and "const" in part else part.get("enum")
        if not isinstance(listed, list):
            return None
        values = [_value(each) for each in listed]
        return None if None in values else frozenset(value for value in values if value is not None)

    def _member(self, parts: list[Schema], name: str) -> list[Schema]:
        found: list[Schema] = []
        for part in parts:
            properties = part.get("properties")
            if isinstance(properties, dict) and name in properties:
                found += self._parts(properties[name])
        return found

    def _parts(self, schema: object, depth: int = _MAX_DEPTH) -> list[Schema]:
        """Schemas whose conjunction is `schema`, with references and `allOf` resolved."""
        self._visits_left -= 1
        if not isinstance(schema, dict) or depth == 0 or self._visits_left < 0:
            return []
        if "$ref" in schema:  # older drafts ignore the keywords beside it
            return self._parts(self._target(schema["$ref"]), depth - 1)
        parts = [schema]
        for each in _listed(schema, "allOf"):
            parts += self._parts(each, depth - 1)
        return parts

    def _target(self, reference: object) -> object:
        if not self._is_one_resource or not isinstance(reference, str):
            return None
        if reference != "#" and not reference.startswith("#/"):
            return None
        self._visits_left -= len(reference) // _ITEMS
        return at_pointer(self._root, reference)


def _types(parts: list[Schema], values: frozenset[_Value] | None) -> frozenset[str]:
    left = _ALL_TYPES
    for part in parts:
        named = part.get("type")
        names = [named] if isinstance(named, str) else named
        if isinstance(names, list):
            kinds = [_TYPES.get(n, _ALL_TYPES) if isinstance(n, str) else _ALL_TYPES for n in names]
            left &= frozenset().union(*kinds)
    return left if values is None else left & {kind for kind, _ in values}


def _forbids(part: Schema, name: str) -> bool:
    """Whether its objects cannot have a member of this name."""
    properties = part.get("properties", {})
    return (
        part.get("additionalProperties") is False
        and not part.get("patternProperties")
        and isinstance(properties, dict)
        and name not in properties
    )


def _value(value: object) -> _Value | None:
    """None: a list or an object, which is not compared."""
    match value:
        case None:
            return "null", None
        case bool():
            return "boolean", value
        case int() | float():
            whole = isinstance(value, int) or value.is_integer()
            return ("integer" if whole else "fraction"), value
        case str():
            return "string", value
    return None


def _choices(parts: list[Schema]) -> Iterator[list[object]]:
    for part in parts:
        for key in ("anyOf", "oneOf"):
            if options := _listed(part, key):
                yield options


def _listed(schema: Schema, key: str) -> list[object]:
    listed = schema.get(key)
    return listed if isinstance(listed, list) else []


def _names_inside(root: Schema) -> bool:
    """Whether a nested schema may have its own base URI, which changes its references."""
    nested = (inner for inner in objects_in(root) if inner is not root)
    return any(isinstance(inner.get(key), str) for inner in nested for key in ("$id", "id"))
