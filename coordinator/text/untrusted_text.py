"""Marks the client's text in a rendered prompt, so that it cannot become a special token.

    client's strings --Marks.mark--> UntrustedText --template--> rendered --Marks.plain--> prompt
                                                                    '---> marked characters

Each character of the client that may be part of a special token is replaced by a lone surrogate,
which no valid text contains. A special token is the template's own if none of its characters is
marked. So whatever the template does with a text (cut it, join it, change its case), the client's
part of the result cannot become a special token.

Templates inspect texts (`'</think>' in content`). UntrustedText is a str that holds the marked
characters, but answers queries about the plain ones. An operation that returns a plain str (a Jinja
filter) keeps the marks, so safety does not depend on the class; later queries then see the marks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, SupportsIndex

from markupsafe import escape

# Letters that have another case, ligatures included.
_CASED = [chr(i) for i in (*range(0x2200), *range(0xFB00, 0xFB18)) if chr(i).isalpha()]
# Marks are low surrogates: 0xDC80 + the character for ASCII, consecutive ones for others.
_ASCII, _OTHERS, _LAST = 0xDC80, 0xDD00, 0xDFFF
# JSON escapes these two, and templates strip white space, so they stay unmarked.
_UNMARKED = '"\\'


class Marks:
    """The marked characters of one vocabulary."""

    def __init__(self, special: Iterable[str]) -> None:
        found = {c for token in special for c in token if not c.isspace()} - {*_UNMARKED}
        # Also characters that become one when a template changes their case (Kelvin sign -> k).
        cases = {c for c in _CASED if found & {*c.lower(), *c.upper(), *c.title(), *c.casefold()}}
        chars = sorted(found | cases)
        ascii_chars = [c for c in chars if c.isascii()]
        others = [c for c in chars if not c.isascii()]
        pairs = [(ord(c), _ASCII + ord(c)) for c in ascii_chars]
        pairs += zip(map(ord, others), range(_OTHERS, _LAST + 1), strict=False)
        self._to_mark = dict(pairs)
        self._to_plain = {mark: char for char, mark in pairs}
        # The same for bytes: 'surrogateescape' maps bytes above 127 to U+DC80 to U+DCFF.
        self._high = bytes(i | 0x80 if i in self._to_mark else i for i in range(256))
        self._low = bytes(i & 0x7F for i in range(256))

    def mark(self, text: str) -> UntrustedText:
        """`text` with its characters marked."""
        text = str.__str__(without_surrogates(text))
        if text.isascii():  # ten times as fast
            data = text.encode("ascii").translate(self._high)
            return UntrustedText(data.decode("ascii", "surrogateescape"), self, text)
        return UntrustedText(text.translate(self._to_mark), self, text)

    def plain(self, text: str) -> str:
        """The text without marks; its length does not change."""
        try:
            data = str.encode(text, "ascii", "surrogateescape")
        except UnicodeEncodeError:
            return str.translate(text, self._to_plain)
        return data.translate(self._low).decode("ascii")

    def mark_all(self, value: Any) -> Any:
        """A JSON value with all its strings marked, keys included."""
        if isinstance(value, str):
            return self.mark(value)
        if isinstance(value, Mapping):
            return {self.mark_all(key): self.mark_all(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mark_all(item) for item in value]
        return value


def without_surrogates(text: str) -> str:
    """Join pairs of surrogates; replace lone ones, which UTF-8 cannot represent, by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def is_marked(char: str) -> bool:
    """Whether a character of a rendered prompt is marked."""
    return 0xDC00 <= ord(char) <= 0xDFFF


def joined(parts: Iterable[str]) -> str:
    """Join like "".join, but return UntrustedText if a part is; Jinja joins all output by it."""
    parts = list(parts)
    text = "".join(parts)
    marks = next((p._marks for p in parts if isinstance(p, UntrustedText)), None)
    return UntrustedText(text, marks) if marks else text


class UntrustedText(str):
    """A str with marks whose methods behave as if it had none, and return marked text."""

    __slots__ = ("_marks", "_unmarked")
    _marks: Marks
    _unmarked: str | None

    def __new__(cls, text: str, marks: Marks, plain: str | None = None) -> UntrustedText:  # noqa: D102
        self = super().__new__(cls, text)
        self._marks = marks
        self._unmarked = plain
        return self

    @property
    def _plain(self) -> str:
        if self._unmarked is None:
            self._unmarked = self._marks.plain(self)
        return self._unmarked

    # -- parts -------------------------------------------------------------------------------------

    def _cut(self, begin: int, end: int) -> UntrustedText:
        return UntrustedText(str.__getitem__(self, slice(begin, end)), self._marks)

    def _cuts(self, pieces: Iterable[str]) -> list[Any]:
        """The marked form of pieces that occur in this order in the plain text."""
        out, at = [], 0
        for piece in pieces:
            at = self._plain.index(piece, at)
            out.append(self._cut(at, at + len(piece)))
            at += len(piece)
        return out

    def __str__(self) -> str:
        return self

    def __repr__(self) -> str:
        return UntrustedText(self._marks.mark(repr(self._plain)), self._marks)

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        return UntrustedText(str.__getitem__(self, key), self._marks)

    def __iter__(self) -> Iterator[str]:
        return (self._cut(i, i + 1) for i in range(len(self)))

    def strip(self, chars: str | None = None, /) -> str:
        """As str's."""
        return self.rstrip(chars).lstrip(chars)

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

    # -- derived texts -----------------------------------------------------------------------------

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, str):
            return NotImplemented
        return UntrustedText(str.__add__(self, other), self._marks)

    def __radd__(self, other: Any) -> Any:
        if not isinstance(other, str):
            return NotImplemented
        return UntrustedText(str.__add__(other, self), self._marks)

    def join(self, parts: Iterable[str], /) -> str:
        """As str's."""
        return UntrustedText(str.join(self, parts), self._marks)

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        """As str's."""
        if not old:
            return self._marks.mark(self._plain.replace("", _plain(new) or "", count))
        return UntrustedText(new, self._marks).join(self.split(old, count))

    def _changed(self, change: Callable[[str], str]) -> str:
        """Change the case; marked characters stay marked."""
        text = change(self._plain)
        if len(text) != len(self):
            return self._marks.mark(text)
        marked = self._marks.mark(text)
        pairs = zip(str.__iter__(self), str.__iter__(marked), text, strict=True)
        chars = [mark if is_marked(was) else char for was, mark, char in pairs]
        return UntrustedText("".join(chars), self._marks, text)

    def __html__(self) -> str:
        """Used by `escape`, and by Jinja for text that is added to safe text."""
        pairs = zip(str.__iter__(self), self._plain, strict=True)
        mark = self._marks.mark
        return "".join(mark(str(escape(p))) if is_marked(c) else str(escape(p)) for c, p in pairs)


def _plain(value: Any) -> Any:
    """An argument of a str method, without marks."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value._plain if isinstance(value, UntrustedText) else value


Method = Callable[..., Any]


def _query(method: Method) -> Method:
    return lambda self, *args: method(self._plain, *map(_plain, args))


def _cut_of_start(method: Method) -> Method:
    def cut(self: UntrustedText, *args: Any) -> UntrustedText:
        return self._cut(len(self) - len(method(self._plain, *map(_plain, args))), len(self))

    return cut


def _cut_of_end(method: Method) -> Method:
    return lambda self, *args: self._cut(0, len(method(self._plain, *map(_plain, args))))


def _change(method: Method) -> Method:
    return lambda self: self._changed(method)


_KINDS: dict[Callable[[Method], Method], str] = {
    _query: "__eq__ __ne__ __lt__ __le__ __gt__ __ge__ __hash__ __contains__ startswith endswith"
    " find rfind index rindex count isalnum isalpha isascii isdecimal isdigit isidentifier islower"
    " isnumeric isprintable isspace istitle isupper",
    _cut_of_start: "lstrip removeprefix",
    _cut_of_end: "rstrip removesuffix",
    _change: "lower upper title capitalize swapcase casefold",
}
for _make, _names in _KINDS.items():
    for _name in _names.split():
        setattr(UntrustedText, _name, _make(getattr(str, _name)))
