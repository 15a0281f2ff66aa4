"""Bounds the digits of JSON numbers by removing tokens from masks.

llguidance bounds white space, but not digits, and a model at temperature 0 may write 0.8888... up
to max_tokens. A scanner reads the output's text beside the matcher and counts the digits of the
current number:

    -123.4567e+89      whole, fraction, exponent: at most MAX_DIGITS of each

At the bound the mask loses the tokens that begin with a digit, if other tokens remain: the number
can end. If none remain, the digit is chosen so that the schema soon allows an end: not 0 after
0.500 above an exclusive minimum of 0.5; for `multipleOf`, the digits that lead to a common multiple
of all steps in the schema. The mask never becomes empty, and never allows what the grammar forbids.

The state of a scanner is a function of the tokens that it has read.
"""

from __future__ import annotations

import copy
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
_MAX_STEP = 1 << 256  # of the common multiple of all steps of a schema
_DIGITS = frozenset(b"0123456789")
_QUOTE, _ESCAPE, _POINT, _ZERO = b'"\\.0'
_SIGNS, _MARKS = frozenset(b"+-"), frozenset(b"eE")


class Part(IntEnum):
    """The part of a number in which a text ends."""

    NONE = 0
    WHOLE = 1
    FRACTION = 2
    EXPONENT = 3


# Enough for every unsigned 64-bit integer; for 17 significant digits after six zeros (smaller
# numbers are usually written with exponents); for every exponent of a double.
MAX_DIGITS = {Part.WHOLE: 20, Part.FRACTION: 24, Part.EXPONENT: 3}


def json_after(trigger: str) -> str:
    """First line of a Lark grammar whose outputs are JSON after `trigger` ("": from the start)."""
    return f"// JSON after {json.dumps(trigger)}\n"


def step_of(source: str) -> int:
    """An integer whose multiples are multiples of each `multipleOf` in a schema; 1 if none has."""
    step = 1
    for text in dict.fromkeys(_STEP.findall(source)):  # in one order in all processes
        try:
            value = float(text)  # as llguidance reads it
        except ValueError:
            continue
        if 0 < value < _MAX_STEP:
            common = math.lcm(step, Fraction(repr(value)).numerator)
            step = common if common < _MAX_STEP else step
    return step


class NumberScanner:
    """The position of one output in its current number."""

    __slots__ = (
        *("_escaped", "_in_string", "_remainder", "_step", "_tail", "_trigger"),
        *("num_digits", "part"),
    )

    def __init__(self, trigger: str = "", step: int = 1) -> None:
        """The text is JSON after `trigger`; `step` is the result of `step_of`."""
        self.part, self.num_digits = Part.NONE, 0
        self._step, self._remainder = step, 0  # remainder of the digits before the point
        self._in_string = self._escaped = False
        self._trigger, self._tail = trigger.encode(), b""

    @classmethod
    def of_lark(cls, source: str, prologue: str = "") -> NumberScanner | None:
        """The scanner of a grammar that begins with the line of `json_after`, else None.

        JSON from the start begins after the text that a prologue names in the same way.
        """
        match, before = _CALLS.match(source), _CALLS.match(prologue)
        if not match:
            return None
        trigger = json.loads(match[1]) or (json.loads(before[1]) if before else "")
        return cls(trigger, step_of(source))

    def copy(self) -> NumberScanner:
        """Another scanner in the same state."""
        return copy.copy(self)

    @property
    def next_digit_to_multiple(self) -> int:
        """The first of the fewest digits (at least one) that lead to a multiple of the step."""
        power = 1
        while True:
            power *= 10
            rest = -self._remainder * power % self._step
            if rest < power:
                return rest * 10 // power

    def feed(self, text: bytes) -> None:
        """Read the next text of the output."""
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
    """The digits of a vocabulary's tokens. Shared by all matchers."""

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
        # Mask rows: [n] tokens that begin with more than n digits; tokens that begin with a zero;
        # [d] tokens that are the digit d.
        self._longer = [
            _mask(size, [t for n, tokens in leading.items() if n > maximum for t in tokens])
            for maximum in range(self._longest)
        ]
        self._zeros = _mask(size, zeros)
        self._digits = [_mask(size, tokens) for tokens in digits]

    def text(self, token: int) -> bytes:
        """The bytes of a token; b"" of an unknown one."""
        return self._texts[token] if 0 <= token < len(self._texts) else b""

    def bound(self, rows: _Row, scanner: NumberScanner, draft: Sequence[int]) -> None:
        """Remove from `rows` [1 + len(draft), words] the tokens that make a number too long.

        Row i is the mask after the first i tokens of `draft`.
        """
        position = scanner.copy() if draft else scanner
        for i, row in enumerate(rows):
            if i:
                position.feed(self.text(draft[i - 1]))
            if position.part:
                self._bound(row, position)

    def _bound(self, row: _Row, position: NumberScanner) -> None:
        left = max(0, MAX_DIGITS[position.part] - position.num_digits)
        if left >= self._longest:
            return
        if _keep(row, ~self._longer[left]) or left:
            return
        if position.part is Part.WHOLE:
            _keep(row, self._digits[position.next_digit_to_multiple])
        else:
            _keep(row, ~self._zeros if position.part is Part.FRACTION else self._zeros)


def _mask(size: int, tokens: Sequence[int]) -> _Row:
    row = np.zeros(-(-size // 32), np.uint32)
    for token in tokens:
        row[token // 32] |= np.uint32(1 << token % 32)
    return row.view(np.int32)


def _keep(row: _Row, allowed: _Row) -> bool:
    """Restrict `row` to `allowed`, unless nothing would remain. True: it is restricted."""
    size = min(len(row), len(allowed))
    kept = row[:size] & allowed[:size]
    if not kept.any():
        return False
    row[:size] = kept
    return True
