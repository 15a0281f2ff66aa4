"""How a schema is read, and that it cannot be held: see schemas.py."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from engine.constraints.oneof import Branches


class Leniency(Enum):
    """What is done about a part that cannot be held."""

    NONE = "none"  # it is refused, an unknown format too
    FORMATS = "formats"  # it is refused, an unknown format is an annotation
    ALL = "all"  # it is left out


class Refused(ValueError):
    """A schema that cannot be held; the message says why."""


@dataclass(frozen=True, slots=True)
class Ways:
    """How a document is read."""

    apart: Branches | None
    leniency: Leniency
    escapes: str
    may_be_odd: bool  # whether surrogates or numbers without an end may be in it

    def leave_out(self, why: Refused) -> None:
        """Raise the reason where nothing may be left out."""
        if self.leniency is not Leniency.ALL:
            raise why
