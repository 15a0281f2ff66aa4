"""Stop strings: what text may be released, and where an output ends.

An output ends where a stop string is first *complete* (of two completed by the same character, the
longer one), as if the text were read character by character. So neither the split into tokens nor
their grouping into messages changes the result. Text that may become a stop string is held back:

    released                      | held: longest suffix that begins a stop string |
    ------------------------------+------------------------------------------------+--> next token

All stop strings of a request share one Aho-Corasick automaton (Aho and Corasick 1975), whose state
is the node of that suffix. A character costs O(1) for any number of stop strings, and no text is
searched twice. The automaton is built once a request; each choice has its own state.

Stop strings that contain special tokens, whose text is often not shown, have a second automaton
over symbols, in which a special token is one symbol, shown or not:

    stop        "\\n<|im_end|>"  ->  "\\n", <|im_end|>
    shown text  "Yes.\\n"            symbols  "Y" "e" "s" "." "\\n" <|im_end|>
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import islice

_SPECIAL = "\0"  # prefix of the symbol of a special token, which so differs from characters


@dataclass(frozen=True, slots=True)
class StopMatch:
    """The stop string that ended an output."""

    text: str
    num_tokens: int  # tokens up to and including the one that completed it


class _Automaton:
    """Stop strings as sequences of symbols. Immutable; a state is a node's number, initially 0.

    Nodes are prefixes of the stop strings, ordered by length.
    """

    def __init__(self, stops: Sequence[tuple[str, Sequence[str]]]) -> None:
        self._next: list[dict[str, int]] = [{}]  # by node: symbol -> node
        self.depth = [0]  # symbols of a node's prefix
        ends: dict[int, tuple[str, int]] = {}  # (stop string, its number of symbols)
        tips = [0] * len(stops)
        for length in range(max((len(symbols) for _, symbols in stops), default=0)):
            for i, (text, symbols) in enumerate(stops):
                if length >= len(symbols):
                    continue
                children = self._next[tips[i]]
                if (node := children.get(symbols[length])) is None:
                    node = children[symbols[length]] = len(self._next)
                    self._next.append({})
                    self.depth.append(length + 1)
                tips[i] = node
                if length + 1 == len(symbols):
                    ends[node] = text, len(symbols)
        size = len(self._next)
        self._suffix = [0] * size  # by node: the longest proper suffix that is a node
        # By node: the longest stop string that its prefix ends with, and its number of symbols.
        self.found: list[tuple[str, int] | None] = [None] * size
        self.rest = list(range(size))  # by node: the state after it; a leaf continues nothing
        for node in range(size):
            for symbol, child in self._next[node].items():
                self._suffix[child] = self.step(self._suffix[node], symbol) if node else 0
            shorter = self._suffix[node]
            self.found[node] = ends.get(node) or self.found[shorter]
            if node and not self._next[node]:
                self.rest[node] = self.rest[shorter]

    def step(self, node: int, symbol: str) -> int:
        """The node of the longest prefix that the text ends with after one more symbol."""
        following = self._next
        while (found := following[node].get(symbol)) is None:
            if not node:
                return 0
            node = self._suffix[node]
        return found

    @property
    def starts(self) -> Collection[str]:
        """First symbols of the stop strings."""
        return self._next[0].keys()


class StopSet:
    """The stop strings of a request, prepared once for all of its choices. Immutable."""

    def __init__(self, stops: Sequence[str], special_names: Collection[str] = ()) -> None:
        """`special_names`: the texts of all special tokens."""
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        unique = set(stops)
        self.plain = _Automaton([(stop, stop) for stop in unique])
        split = [(stop, _symbols(stop, special_names)) for stop in unique] if special_names else []
        named = [(stop, symbols) for stop, symbols in split if max(map(len, symbols)) > 1]
        self.named = _Automaton(named) if named else None
        self.names = {symbol for _, symbols in named for symbol in symbols if len(symbol) > 1}
        # The number of last symbols whose shown text a checker remembers.
        self.tape_size = max((len(symbols) for _, symbols in named), default=0)
        self.starts = {*self.plain.starts, *(self.named.starts if self.named else ())}


NO_STOPS = StopSet(())


class StopChecker:
    """Finds the stop strings of one output, from the texts of its tokens in order.

    A stop string counts only if its last character belongs to a token after the first
    `min_tokens`; its first character may belong to an earlier one, as in vLLM.
    """

    def __init__(
        self, stops: StopSet = NO_STOPS, include_stop: bool = False, min_tokens: int = 0
    ) -> None:
        self._stops = stops
        self._plain = self._named = 0  # states
        self._tape: deque[str] = deque(maxlen=stops.tape_size)
        self._held = ""
        self._include = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self.match: StopMatch | None = None  # once set, nothing is released

    def fork(self) -> StopChecker:
        """A copy with the same state."""
        other = copy(self)
        other._tape = self._tape.copy()
        return other

    def names(self, special: str) -> bool:
        """Whether a stop string contains this special token."""
        return _SPECIAL + special in self._stops.names

    def push(self, text: str, special: str = "", shown: str = "") -> str:
        """The text that may be released after one more token with the text `text`.

        If the token is the special token `special`, `shown` is the text that the output has of it.
        """
        if self.match is not None:
            return ""
        self._num_tokens += 1
        return self._feed(text, special, shown)

    def flush(self, text: str = "") -> str:
        """The rest of an output without stop string; `text` is the rest of the detokenizer."""
        if self.match is not None:
            return ""
        rest = self._feed(text)
        rest, self._held = rest + self._held, ""
        return rest

    def _feed(self, text: str, special: str = "", shown: str = "") -> str:
        stops = self._stops
        is_idle = not self._plain and not self._named
        if is_idle and not special and stops.starts.isdisjoint(text):
            return text  # the usual case: no stop string begins here
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
        keep = stops.plain.depth[self._plain]
        if stops.named:
            keep = max(keep, self._num_shown(stops.named.depth[self._named]))
        self._held = window[len(window) - keep :]
        return window[: len(window) - keep]

    def _advance(self, char: str, symbol: str, shown: str) -> tuple[str, int] | None:
        """(the longest stop string that ends here, how many of its characters are shown)."""
        found = None
        if char:
            plain = self._stops.plain
            node = plain.step(self._plain, char)
            self._plain = plain.rest[node]
            found = plain.found[node]
        named = self._stops.named
        if symbol and named:
            self._tape.append(char if len(symbol) == 1 else shown)
            node = named.step(self._named, symbol)
            self._named = named.rest[node]
            end = named.found[node]
            if end and (found is None or len(end[0]) > len(found[0])):
                found = end[0], self._num_shown(end[1])
        return found

    def _num_shown(self, num_symbols: int) -> int:
        """The number of characters that are shown of the last symbols."""
        return sum(map(len, islice(reversed(self._tape), num_symbols)))


def _read(text: str, special: str, shown: str) -> Iterator[tuple[str, str]]:
    """(shown character, the symbol that it completes); either may be ""."""
    for char in text:
        yield char, char
    for i, char in enumerate(shown, start=1):
        yield char, _SPECIAL + special if i == len(shown) else ""
    if special and not shown:
        yield "", _SPECIAL + special


def _symbols(stop: str, special_names: Collection[str]) -> list[str]:
    """The symbols of a stop string: characters and special tokens."""
    sizes = sorted({len(name) for name in special_names}, reverse=True)
    symbols, at = [], 0
    while at < len(stop):
        found = (stop[at : at + size] for size in sizes)
        name = next((name for name in found if name in special_names), "")
        symbols.append(_SPECIAL + name if name else stop[at])
        at += len(name) or 1
    return symbols
