"""Numbers in JSON come to an end: the masks stop offering digits where a number has enough of them.

llguidance bounds white space, but not digits, and a model at temperature 0 writes 0.8888... until
its tokens run out. A scanner reads the answer's text beside the matcher and counts the digits of
the number that is being written:

    -123.4567e+89      whole, fraction, exponent: MOST_DIGITS of each, counted on their own

At the bound the mask loses the tokens that begin with more digits, as long as something is left:
the number can end. Where it cannot, it is brought to an end that its schema allows: 0.500 above an
exclusive minimum of 0.5 needs a digit that is not 0; where a multiple is asked for, the next digits
are those that make the number one, of all steps in the schema at once. So no number that a schema
asks for is lost, and nothing that the grammar forbids is offered.

A scanner is a function of the tokens that it has read, as a matcher is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from enum import IntEnum
from fractions import Fraction

import numpy as np
from llguidance import LLTokenizer
from numpy.typing import NDArray

_Row = NDArray[np.int32]
_CALLS = re.compile(r'// JSON after (".*")\n')
_STEP = re.compile(r'"multipleOf"\s*:\s*([0-9][0-9.eE+-]*)')
_MOST_STEP = 1 << 256  # of all of a schema together
_DIGITS = frozenset(b"0123456789")
_QUOTE, _ESCAPE, _POINT, _ZERO = b'"\\.0'
_SIGNS, _MARKS = frozenset(b"+-"), frozenset(b"eE")


class Part(IntEnum):
    """Where in a number a text stands."""

    NONE = 0
    WHOLE = 1
    FRACTION = 2
    EXPONENT = 3


# All unsigned 64-bit integers; 17 significant digits behind six zeros, from where on exponents are
# usual; all exponents of doubles.
MOST_DIGITS = {Part.WHOLE: 20, Part.FRACTION: 24, Part.EXPONENT: 3}


def json_after(trigger: str) -> str:
    """The first line of a Lark grammar whose answers are JSON behind this text (or all of them)."""
    return f"// JSON after {json.dumps(trigger)}\n"


def step_of(source: str) -> int:
    """A whole number whose multiples are multiples of each `multipleOf` in a schema; 1: of none."""
    step = 1
    for text in set(_STEP.findall(source)):
        try:
            value = float(text)  # as the library reads it
        except ValueError:
            continue
        if 0 < value < _MOST_STEP:
            wider = math.lcm(step, Fraction(repr(value)).numerator)
            step = wider if wider < _MOST_STEP else step
    return step


class NumberScanner:
    """The place of one answer in its numbers."""

    __slots__ = (
        *("_escaped", "_in_string", "_remainder", "_step", "_tail", "_trigger"),
        *("num_digits", "part"),
    )

    def __init__(self, trigger: str = "", step: int = 1) -> None:
        """The text is JSON behind `trigger`; `step` is that of `step_of`."""
        self.part, self.num_digits = Part.NONE, 0
        self._step, self._remainder = step, 0  # of the digits before the point
        self._in_string = self._escaped = False
        self._trigger, self._tail = trigger.encode(), b""

    @classmethod
    def of_lark(cls, source: str) -> NumberScanner | None:
        """That of a grammar with the line of `json_after`."""
        found = _CALLS.match(source)
        return cls(json.loads(found[1]), step_of(source)) if found else None

    def copy(self) -> NumberScanner:
        """Another one at the same place."""
        other = NumberScanner.__new__(NumberScanner)
        for name in self.__slots__:
            setattr(other, name, getattr(self, name))
        return other

    @property
    def to_multiple(self) -> int:
        """The next digit on the shortest way to a multiple of the step, at least one digit long."""
        power = 1
        while True:
            power *= 10
            rest = -self._remainder * power % self._step
            if rest < power:
                return rest * 10 // power

    def feed(self, text: bytes) -> None:
        """The answer goes on with this text."""
        if self._trigger:
            before, found, text = (self._tail + text).partition(self._trigger)
            if not found:
                self._tail = before[-len(self._trigger) + 1 :] if len(self._trigger) > 1 else b""
                return
            self._trigger = self._tail = b""
        for char in text:
            self._feed(char)

    def _feed(self, char: int) -> None:
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == _ESCAPE:
                self._escaped = True
            elif char == _QUOTE:
                self._in_string = False
        elif char in _DIGITS:
            self._to(self.part or Part.WHOLE, self.num_digits + 1)
            if self.part is Part.WHOLE and self._step > 1:
                before = self._remainder if self.num_digits > 1 else 0
                self._remainder = (10 * before + char - _ZERO) % self._step
        elif char == _POINT and self.part is Part.WHOLE:
            self._to(Part.FRACTION)
        elif char in _MARKS and self.part in (Part.WHOLE, Part.FRACTION):
            self._to(Part.EXPONENT)
        elif not (char in _SIGNS and self.part is Part.EXPONENT and not self.num_digits):
            self._to(Part.NONE)
            self._in_string = char == _QUOTE

    def _to(self, part: Part, num_digits: int = 0) -> None:
        self.part, self.num_digits = part, num_digits


class NumberTokens:
    """What the tokens of a vocabulary do to a number. Shared by all matchers."""

    def __init__(self, tokenizer: LLTokenizer, size: int) -> None:
        self._texts = [tokenizer.decode_bytes([token]) for token in range(size)]
        leading: dict[int, list[int]] = {}
        zeros = []
        digits: list[list[int]] = [[] for _ in range(10)]
        for token, text in enumerate(self._texts):
            if text[:1].isdigit():
                rest = text.lstrip(b"0123456789")
                leading.setdefault(len(text) - len(rest), []).append(token)
                if text[0] == _ZERO:
                    zeros.append(token)
                if len(text) == 1:
                    digits[int(text)].append(token)
        self._longest = max(leading, default=0)
        # Rows of masks: tokens that begin with more than so many digits; that begin with a zero;
        # that are one digit.
        self._longer = [
            _mask(size, [t for n, tokens in leading.items() if n > most for t in tokens])
            for most in range(self._longest)
        ]
        self._zeros = _mask(size, zeros)
        self._digits = [_mask(size, tokens) for tokens in digits]

    def text(self, token: int) -> bytes:
        """Of a token; nothing of one that is not known."""
        return self._texts[token] if 0 <= token < len(self._texts) else b""

    def bound(self, rows: _Row, scanner: NumberScanner, draft: Sequence[int]) -> None:
        """Take from the masks of an answer what would make a number too long.

        Row i is the mask behind the first i tokens of `draft`.
        """
        place = scanner.copy() if draft else scanner
        for i, row in enumerate(rows):
            if i:
                place.feed(self.text(draft[i - 1]))
            if place.part:
                self._bound(row, place)

    def _bound(self, row: _Row, place: NumberScanner) -> None:
        left = max(0, MOST_DIGITS[place.part] - place.num_digits)
        if left >= self._longest:
            return
        if _keep(row, ~self._longer[left]) or left:
            return
        if place.part is Part.WHOLE:
            _keep(row, self._digits[place.to_multiple])
        else:
            _keep(row, ~self._zeros if place.part is Part.FRACTION else self._zeros)


def _mask(size: int, tokens: Sequence[int]) -> _Row:
    row = np.zeros(-(-size // 32), np.uint32)
    for token in tokens:
        row[token // 32] |= np.uint32(1 << token % 32)
    return row.view(np.int32)


def _keep(row: _Row, wanted: _Row) -> bool:
    """Only what is wanted, if there is any of it."""
    size = min(len(row), len(wanted))
    kept = row[:size] & wanted[:size]
    if not kept.any():
        return False
    row[:size] = kept
    return True
