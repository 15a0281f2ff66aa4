"""Settings of one schema conversion, and the error of a schema that is not supported."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from engine.constraints.oneof import Branches


class Leniency(Enum):
    """What happens to a part of a schema that grammars cannot enforce."""

    NONE = "none"  # refused; an unknown format too
    FORMATS = "formats"  # refused; an unknown format is an annotation
    ALL = "all"  # left out


class UnsupportedSchema(ValueError):
    """A schema that a grammar cannot enforce; the message gives the reason."""


@dataclass(frozen=True, slots=True)
class SchemaContext:
    """Settings of one schema conversion."""

    branches: Branches | None  # None: no `oneOf` becomes an `anyOf`
    leniency: Leniency
    escapes: str  # characters that may follow a backslash in a string
    may_be_unwritable: bool  # whether it may contain surrogates or infinite numbers

    def drop_or_raise(self, error: UnsupportedSchema) -> None:
        """Raise `error` unless the caller may drop the part that caused it."""
        if self.leniency is not Leniency.ALL:
            raise error
