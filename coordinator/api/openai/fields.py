"""One JSON object of a request, read field by field: types are checked, nulls are unset.

fields = Fields(body)
n = fields.integer("n", 1, 128)        InvalidRequest("n", ...) if it is anything else
fields.end(ignored=...)                Refused: what nobody asked for is unknown
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from coordinator.api.openai.errors import unknown_parameter, unsupported
from engine.base.errors import InvalidRequest

UINT32 = 2**32 - 1


class Fields:
    """An object at `path` of the request ("" is the body itself)."""

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self._values = values
        self._path = path
        self._read: set[str] = set()

    def path(self, key: str) -> str:
        """The full name of a field, for errors."""
        return f"{self._path}.{key}" if self._path else key

    def take(self, key: str) -> Any:
        """The value as it stands; None where it is unset or null."""
        self._read.add(key)
        return self._values.get(key)

    def boolean(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.take(key)
        if value is not None and not isinstance(value, bool):
            raise InvalidRequest(self.path(key), "expected true or false")
        return default if value is None else value

    def integer(self, key: str, low: int, high: int) -> int | None:
        """A whole number in [low, high]; 3.0 is one."""
        value = self.take(key)
        if value is None:
            return None
        return whole(self.path(key), value, low, high)

    def number(self, key: str) -> float | None:
        """Any number; ranges of sampling parameters are the gRPC API's affair."""
        value = self.take(key)
        if value is None:
            return None
        return real(self.path(key), value)

    def text(self, key: str) -> str | None:
        """A string."""
        value = self.take(key)
        if value is not None and not isinstance(value, str):
            raise InvalidRequest(self.path(key), "expected text")
        return value

    def list(self, key: str) -> list[Any] | None:
        """An array."""
        value = self.take(key)
        if value is not None and not isinstance(value, list):
            raise InvalidRequest(self.path(key), "expected an array")
        return value

    def object(self, key: str) -> Fields | None:
        """An object, to be read like this one."""
        value = self.take(key)
        if value is None:
            return None
        return as_object(self.path(key), value)

    def neutral(self, allowed: Mapping[str, Collection[Any]]) -> None:
        """Options that we do not have, at values at which they do nothing; others are refused."""
        for key, harmless in allowed.items():
            value = self.take(key)
            if value is not None and not any(_same(value, one) for one in harmless):
                raise unsupported(self.path(key), "this option")

    def end(self, ignored: Collection[str] = (), *, nulls: bool = False) -> None:
        """Raise Refused for the first field that was not read and is not among `ignored`.

        With `nulls` a field that is null is as good as unset.
        """
        for key, value in self._values.items():
            if nulls and value is None:
                continue
            if key not in self._read and key not in ignored:
                raise unknown_parameter(self.path(key)[:200])


def _same(value: Any, other: Any) -> bool:
    """Equal, and not by Python's notion that true is 1."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def as_object(path: str, value: Any) -> Fields:
    """`value` as an object. Raises InvalidRequest."""
    if not isinstance(value, dict):
        raise InvalidRequest(path, "expected an object")
    return Fields(value, path)


def whole(path: str, value: Any, low: int, high: int) -> int:
    """`value` as a whole number in [low, high]. Raises InvalidRequest."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(path, "expected a whole number")
    if not low <= value <= high:
        raise InvalidRequest(path, f"{_shown(value)}; expected {low} to {high}")
    return value


def real(path: str, value: Any) -> float:
    """`value` as a number. Raises InvalidRequest."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(path, "expected a number")
    try:
        return float(value)
    except OverflowError:
        raise InvalidRequest(path, "expected a number of a size that a float can have") from None


def whole_list(path: str, values: Any, low: int, high: int) -> list[int]:
    """`values` as an array of whole numbers in [low, high]. Raises InvalidRequest."""
    if not isinstance(values, list):
        raise InvalidRequest(path, "expected an array of whole numbers")
    if all(type(value) is int and low <= value <= high for value in values):
        return values
    return [whole(f"{path}[{i}]", value, low, high) for i, value in enumerate(values)]


def _shown(value: int) -> str:
    return str(value) if abs(value) < 10**30 else "a huge number"
