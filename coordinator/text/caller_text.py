"""Text of the caller inside a rendered prompt, told from the template's own by its characters.

    caller's strings --Marks.mark--> CallerText --template--> rendered --Marks.plain--> the prompt
                                                                 '---> which characters are marked

Every character of the caller that may be part of a special token is replaced by a lone surrogate,
which no valid text holds, one for one. A special token is the template's own if and only if none of
its characters is marked, so whatever the template does with a text (cut it, join it, change its
case), the caller's part of the result cannot become one.

Templates look into texts (`'</think>' in content`), so a marked text answers as the plain one
would: CallerText is a str that holds the marked characters and looks at the plain ones. What turns
it into a plain str again (a filter of Jinja, say) keeps the marks, which is what safety rests on;
only the template's later questions are then answered by the marked text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, SupportsIndex

from markupsafe import escape

# Where letters are that have another case, ligatures too.
_CASED = [chr(i) for i in (*range(0x2200), *range(0xFB00, 0xFB18)) if chr(i).isalpha()]
# Marks are low surrogates: 0xDC00 + 128 + the character, or one after the other.
_ASCII, _OTHERS, _LAST = 0xDC80, 0xDD00, 0xDFFF
# JSON writes these two with a backslash, and templates strip white space: they stay as they are.
_UNMARKED = '"\\'


class Marks:
    """Which characters are marked, for one vocabulary."""

    def __init__(self, special: Iterable[str]) -> None:
        found = {c for token in special for c in token if not c.isspace()} - {*_UNMARKED}
        # So is what templates may make one of by changing its case: of the Kelvin sign a k.
        cases = {c for c in _CASED if found & {*c.lower(), *c.upper(), *c.title(), *c.casefold()}}
        chars = sorted(found | cases)
        ascii_chars = [c for c in chars if c.isascii()]
        others = [c for c in chars if not c.isascii()]
        pairs = [(ord(c), _ASCII + ord(c)) for c in ascii_chars]
        pairs += zip(map(ord, others), range(_OTHERS, _LAST + 1), strict=False)
        self._to_mark = dict(pairs)
        self._to_plain = {mark: char for char, mark in pairs}
        # The same for bytes: 'surrogateescape' makes U+DC80 to U+DCFF of those above 127.
        self._high = bytes(i | 0x80 if i in self._to_mark else i for i in range(256))
        self._low = bytes(i & 0x7F for i in range(256))

    def mark(self, text: str) -> CallerText:
        """`text`, all of it the caller's."""
        text = str.__str__(without_surrogates(text))
        if text.isascii():  # ten times as fast as the other way
            data = text.encode("ascii").translate(self._high)
            return CallerText(data.decode("ascii", "surrogateescape"), self, text)
        return CallerText(text.translate(self._to_mark), self, text)

    def plain(self, text: str) -> str:
        """The text without marks; as long as before."""
        try:
            data = str.encode(text, "ascii", "surrogateescape")
        except UnicodeEncodeError:
            return str.translate(text, self._to_plain)
        return data.translate(self._low).decode("ascii")

    def mark_all(self, value: Any) -> Any:
        """The same JSON value with its strings marked, keys too."""
        if isinstance(value, str):
            return self.mark(value)
        if isinstance(value, Mapping):
            return {self.mark_all(key): self.mark_all(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mark_all(item) for item in value]
        return value


def without_surrogates(text: str) -> str:
    """Pairs of surrogates joined; a lone one, which no UTF-8 text can hold, counts as U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def is_marked(char: str) -> bool:
    """Whether a character of a rendered prompt is the caller's."""
    return 0xDC00 <= ord(char) <= 0xDFFF


def joined(parts: Iterable[str]) -> str:
    """ "".join that keeps the class of the caller's text: Jinja joins all output by it."""
    parts = list(parts)
    text = "".join(parts)
    marks = next((p._marks for p in parts if isinstance(p, CallerText)), None)
    return CallerText(text, marks) if marks else text


class CallerText(str):
    """A str with marks, read as if it had none. `str` methods see and return the marked text."""

    __slots__ = ("_marks", "_unmarked")
    _marks: Marks
    _unmarked: str | None

    def __new__(cls, text: str, marks: Marks, plain: str | None = None) -> CallerText:  # noqa: D102
        self = super().__new__(cls, text)
        self._marks = marks
        self._unmarked = plain
        return self

    @property
    def _plain(self) -> str:
        if self._unmarked is None:
            self._unmarked = self._marks.plain(self)
        return self._unmarked

    # -- pieces of it ------------------------------------------------------------------------------

    def _cut(self, begin: int, end: int) -> CallerText:
        return CallerText(str.__getitem__(self, slice(begin, end)), self._marks)

    def _cuts(self, pieces: Iterable[str]) -> list[Any]:
        """The marked form of pieces that stand in this order in the plain text."""
        out, at = [], 0
        for piece in pieces:
            at = self._plain.index(piece, at)
            out.append(self._cut(at, at + len(piece)))
            at += len(piece)
        return out

    def __str__(self) -> str:
        return self

    def __repr__(self) -> str:
        return CallerText(self._marks.mark(repr(self._plain)), self._marks)

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        return CallerText(str.__getitem__(self, key), self._marks)

    def __iter__(self) -> Iterator[str]:
        return (self._cut(i, i + 1) for i in range(len(self)))

    def strip(self, chars: str | None = None, /) -> str:
        """As str's."""
        return self.rstrip(chars).lstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> str:
        """As str's."""
        return self._cut(len(self) - len(self._plain.lstrip(_plain(chars))), len(self))

    def rstrip(self, chars: str | None = None, /) -> str:
        """As str's."""
        return self._cut(0, len(self._plain.rstrip(_plain(chars))))

    def removeprefix(self, prefix: str, /) -> str:
        """As str's."""
        return self._cut(len(self) - len(self._plain.removeprefix(_plain(prefix))), len(self))

    def removesuffix(self, suffix: str, /) -> str:
        """As str's."""
        return self._cut(0, len(self._plain.removesuffix(_plain(suffix))))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        """As str's."""
        return self._parts(self._plain.split(_plain(sep), maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        """As str's."""
        return self._parts(self._plain.rsplit(_plain(sep), maxsplit), sep)

    def _parts(self, pieces: list[str], sep: str | None) -> list[Any]:
        if sep is None:
            return self._cuts(pieces)
        out, at = [], 0
        for piece in pieces:
            out.append(self._cut(at, at + len(piece)))
            at += len(piece) + len(sep)
        return out

    def splitlines(self, keepends: bool = False) -> list[Any]:
        """As str's."""
        lines = self._cuts(self._plain.splitlines(keepends=True))
        if keepends:
            return lines
        texts = self._plain.splitlines()
        return [line._cut(0, len(text)) for line, text in zip(lines, texts, strict=True)]

    def partition(self, sep: str, /) -> tuple[Any, Any, Any]:
        """As str's."""
        first, middle, _ = map(len, self._plain.partition(_plain(sep)))
        return self._three(first, first + middle)

    def rpartition(self, sep: str, /) -> tuple[Any, Any, Any]:
        """As str's."""
        first, middle, _ = map(len, self._plain.rpartition(_plain(sep)))
        return self._three(first, first + middle)

    def _three(self, first: int, second: int) -> tuple[Any, Any, Any]:
        return self._cut(0, first), self._cut(first, second), self._cut(second, len(self))

    # -- made of it --------------------------------------------------------------------------------

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, str):
            return NotImplemented
        return CallerText(str.__add__(self, other), self._marks)

    def __radd__(self, other: Any) -> Any:
        if not isinstance(other, str):
            return NotImplemented
        return CallerText(str.__add__(other, self), self._marks)

    def join(self, parts: Iterable[str], /) -> str:
        """As str's."""
        return CallerText(str.join(self, parts), self._marks)

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        """As str's."""
        if not old:
            return self._marks.mark(self._plain.replace("", _plain(new) or "", count))
        return CallerText(new, self._marks).join(self.split(old, count))

    def _changed(self, change: Callable[[str], str]) -> str:
        """Another case: the caller's characters stay the caller's."""
        text = change(self._plain)
        if len(text) != len(self):
            return self._marks.mark(text)
        mine = self._marks.mark(text)
        pairs = zip(str.__iter__(self), str.__iter__(mine), text, strict=True)
        chars = [mark if is_marked(was) else char for was, mark, char in pairs]
        return CallerText("".join(chars), self._marks, text)

    def lower(self) -> str:
        """As str's."""
        return self._changed(str.lower)

    def upper(self) -> str:
        """As str's."""
        return self._changed(str.upper)

    def title(self) -> str:
        """As str's."""
        return self._changed(str.title)

    def capitalize(self) -> str:
        """As str's."""
        return self._changed(str.capitalize)

    def swapcase(self) -> str:
        """As str's."""
        return self._changed(str.swapcase)

    def casefold(self) -> str:
        """As str's."""
        return self._changed(str.casefold)

    def __html__(self) -> str:
        """For `escape`, and for what Jinja adds to safe text."""
        pairs = zip(str.__iter__(self), self._plain, strict=True)
        mark = self._marks.mark
        return "".join(mark(str(escape(p))) if is_marked(c) else str(escape(p)) for c, p in pairs)

    # -- questions ---------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and self._plain == _plain(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._plain)

    def __lt__(self, other: str) -> bool:
        return self._plain < (_plain(other) or "")

    def __gt__(self, other: str) -> bool:
        return self._plain > (_plain(other) or "")

    def __le__(self, other: str) -> bool:
        return not self > other

    def __ge__(self, other: str) -> bool:
        return not self < other

    def __contains__(self, part: object) -> bool:
        return _plain(part) in self._plain


def _plain(value: Any) -> Any:
    """What a str method is given, without marks."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value._plain if isinstance(value, CallerText) else value


def _asked(name: str) -> Callable[..., Any]:
    method = getattr(str, name)

    def ask(self: CallerText, *args: Any) -> Any:
        return method(self._plain, *map(_plain, args))

    ask.__name__ = name
    return ask


for _name in (
    *("startswith", "endswith", "find", "rfind", "index", "rindex", "count"),
    *("isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower"),
    *("isnumeric", "isprintable", "isspace", "istitle", "isupper"),
):
    setattr(CallerText, _name, _asked(_name))
