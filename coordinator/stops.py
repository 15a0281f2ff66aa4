"""Stop strings, which may straddle tokens: what may be released, and where an answer ends.

The answer ends where a stop string is first *complete* (of two completed by the same character, the
longer one), as if it had been read character by character; so neither the cut between tokens nor
their grouping into messages changes the result. Text that could still become a stop string is held
back:

    released                      | held: longest suffix that begins a stop string |
    ------------------------------+------------------------------------------------+--> next token

Each stop string has its Knuth-Morris-Pratt automaton (Knuth, Morris, Pratt 1977), whose state is
the length of that suffix: a character costs O(1) a stop string, and no text is searched twice.

A stop string may name special tokens, whose text is often not shown. Such a one has a second
automaton over symbols, where a special token is one symbol, shown or not:

    stop        "\\n<|im_end|>"  ->  "\\n", <|im_end|>
    shown text  "Yes.\\n"            symbols  "Y" "e" "s" "." "\\n" <|im_end|>
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

_SPECIAL = "\0"  # before its name, so that the symbol of a special token is no character


@dataclass(frozen=True, slots=True)
class StopMatch:
    """The stop string that ended an answer."""

    text: str
    num_tokens: int  # tokens up to and including the one whose text completed it


@dataclass(slots=True)
class _Automaton:
    """One stop string: characters, or symbols of which some are special tokens."""

    text: str
    symbols: Sequence[str]
    failures: list[int]
    state: int = 0

    @classmethod
    def of(cls, text: str, symbols: Sequence[str]) -> _Automaton:
        return cls(text, symbols, _failure(symbols))

    def advance(self, symbol: str) -> bool:
        """Whether this symbol completes the stop string."""
        state = self.state
        while state and self.symbols[state] != symbol:
            state = self.failures[state]
        if self.symbols[state] == symbol:
            state += 1
        is_whole = state == len(self.symbols)
        # Whole, it begins nothing but what overlaps it.
        self.state = self.failures[state] if is_whole else state
        return is_whole


class StopChecker:
    """One answer's stop strings. Fed one token's text at a time, in order.

    A stop string counts only if its last character belongs to a token after the first
    `min_tokens` (its first may not, as in vLLM).
    """

    __slots__ = (
        "_held",
        "_include",
        "_is_idle",
        "_min_tokens",
        "_named",
        "_num_tokens",
        "_plain",
        "_starts",
        "_tape",
        "match",
    )

    def __init__(
        self,
        stops: Sequence[str],
        include_stop: bool = False,
        min_tokens: int = 0,
        special_names: Collection[str] = (),  # of all special tokens
    ) -> None:
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        ordered = sorted(set(stops), key=len, reverse=True)  # the longer one wins
        self._plain = [_Automaton.of(stop, stop) for stop in ordered]
        split = [(stop, _symbols(stop, special_names)) for stop in ordered]
        self._named = [
            _Automaton.of(stop, symbols)
            for stop, symbols in split
            if any(len(symbol) > 1 for symbol in symbols)
        ]
        # Shown text of the last symbols, as many as a stop string may have.
        size = max((len(each.symbols) for each in self._named), default=0)
        self._tape: deque[str] = deque(maxlen=size)
        self._starts = {each.symbols[0] for each in (*self._plain, *self._named)}
        self._is_idle = True  # no automaton is within its stop string
        self._held = ""
        self._include = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self.match: StopMatch | None = None  # set once; nothing is released after it

    def names(self, special: str) -> bool:
        """Whether a stop string names this special token."""
        return any(_SPECIAL + special in each.symbols for each in self._named)

    def push(self, text: str, special: str = "", shown: str = "") -> str:
        """Text that may be released after one more token, whose own text is `text`.

        Behind that, the token may be a `special` one, of which `shown` is shown.
        """
        if self.match is not None:
            return ""
        self._num_tokens += 1
        return self._feed(text, special, shown)

    def flush(self, text: str = "") -> str:
        """The rest of an answer that ended otherwise; `text` is what the detokenizer still had."""
        if self.match is not None:
            return ""
        rest = self._feed(text)
        rest, self._held = rest + self._held, ""
        return rest

    def _feed(self, text: str, special: str = "", shown: str = "") -> str:
        if self._is_idle and not special and self._starts.isdisjoint(text):
            return text  # most tokens begin no stop string
        window = self._held + text + shown
        counts = self._num_tokens > self._min_tokens
        end = len(self._held)
        for char, symbol in (
            _read(text, special, shown) if special else zip(text, text, strict=True)
        ):
            end += len(char)
            found = self._advance(char, symbol, shown)
            if found and counts:
                stop, num_shown = found
                self.match = StopMatch(stop, self._num_tokens)
                self._held = ""
                return window[: end - num_shown] + (stop if self._include else "")
        keep = max((each.state for each in self._plain), default=0)
        for each in self._named:
            keep = max(keep, self._num_shown(each.state))
        self._held = window[len(window) - keep :]
        self._is_idle = not keep and not any(each.state for each in self._named)
        return window[: len(window) - keep]

    def _advance(self, char: str, symbol: str, shown: str) -> tuple[str, int] | None:
        """The longest stop string that ends here, and how many characters of it are shown."""
        found = None
        if char:
            for each in self._plain:
                if each.advance(char) and found is None:
                    found = each.text, len(each.text)
        if symbol and self._named:
            self._tape.append(char if len(symbol) == 1 else shown)
            for each in self._named:
                if each.advance(symbol) and (found is None or len(each.text) > len(found[0])):
                    found = each.text, self._num_shown(len(each.symbols))
        return found

    def _num_shown(self, num_symbols: int) -> int:
        """Characters shown of the last symbols."""
        size = len(self._tape)
        return sum(len(self._tape[i]) for i in range(size - num_symbols, size))


def _read(text: str, special: str, shown: str) -> Iterator[tuple[str, str]]:
    """Shown character, and the symbol that it completes, if any."""
    for char in text:
        yield char, char
    for i, char in enumerate(shown, start=1):
        yield char, _SPECIAL + special if i == len(shown) else ""
    if special and not shown:
        yield "", _SPECIAL + special


def _symbols(stop: str, special_names: Collection[str]) -> list[str]:
    """Its characters, and the special tokens that it names as one symbol each."""
    sizes = sorted({len(name) for name in special_names}, reverse=True)
    symbols, at = [], 0
    while at < len(stop):
        found = (stop[at : at + size] for size in sizes)
        name = next((name for name in found if name in special_names), "")
        symbols.append(_SPECIAL + name if name else stop[at])
        at += len(name) or 1
    return symbols


def _failure(symbols: Sequence[str]) -> list[int]:
    """[len + 1]: for each prefix length, the longest proper prefix that is also its suffix."""
    failure = [0] * (len(symbols) + 1)
    state = 0
    for i in range(1, len(symbols)):
        while state and symbols[state] != symbols[i]:
            state = failure[state]
        if symbols[state] == symbols[i]:
            state += 1
        failure[i + 1] = state
    return failure
