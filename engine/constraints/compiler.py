"""Compiles constraints to matchers, on threads of this process, with a cache.

    matcher(constraint, tokens)   cached? -> a copy    in flight? -> await it
                                  else check it in another process, then compile it here, once

A compilation in this process cannot be cancelled, so only a grammar that compiled within the
limits of checker.py is compiled here. The second compilation releases the GIL.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from llguidance import LLMatcher

from engine.base.errors import InvalidRequest
from engine.base.types import Constraint
from engine.constraints.big_stack_threads import BigStackThreads
from engine.constraints.checker import COMPILE_S, MAX_CPU_S, Checker, Count, busy, digest, refusal
from engine.constraints.grammar import LIMITS, Grammar, Vocabulary, compile_error, mismatch
from engine.constraints.matcher import Matcher, SharedCost
from engine.constraints.numbers import NumberScanner, NumberTokens
from engine.constraints.single_flight_cache import SingleFlightCache

_NUM_THREADS = 2
_MAX_CACHED = 256
_MAX_CACHED_CHARS = 16 << 20  # of their sources
# llguidance does not report the memory of a grammar; it is about 400 MB for each second of
# compilation, however short the text: "((((a{10}){10}){10}){10}){10}" keeps 30 MB.
_MAX_CACHED_CPU_S = 1.0
_MAX_ADVANCE_CPU_S = 2.0  # for the tokens that an output already has


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A compiled template, which is copied and never advanced, or the reason for none."""

    num_chars: int
    template: LLMatcher | None
    refused: Grammar
    cpu_s: float = 0.0
    scanner: NumberScanner | None = None
    shared: SharedCost = field(default_factory=SharedCost)


class Compiler:
    """Grammars over one vocabulary. Owned by one event loop; its threads do the work."""

    def __init__(self, vocabulary: Vocabulary, count: Count | None = None) -> None:
        # Coordinators allow half of this, so a worker accepts what a coordinator accepted.
        self._checker = Checker(vocabulary, count, 2 * MAX_CPU_S)
        self._threads = BigStackThreads(_NUM_THREADS, "grammars")
        self._tokenizer = self._threads.submit(vocabulary.build)
        self._numbers = self._threads.submit(self._number_tokens)
        self.cache: SingleFlightCache[_Compiled] = SingleFlightCache(
            lambda compiled: (compiled.num_chars, compiled.cpu_s),
            (_MAX_CACHED_CHARS, _MAX_CACHED_CPU_S),
            _MAX_CACHED,
        )

    async def matcher(self, constraint: Constraint, tokens: Sequence[int] = ()) -> Matcher:
        """A matcher of the constraint that has taken `tokens`.

        Raises InvalidRequest for "constraint" if it cannot be used, for "tokens" if they do not
        fit it; Unavailable after COMPILE_S.
        """
        try:
            async with asyncio.timeout(COMPILE_S):
                compiled = await self.cache.get(
                    digest(constraint), partial(self._compile, constraint)
                )
                if compiled.template is None:
                    raise refusal(compiled.refused)
                scanner = compiled.scanner and compiled.scanner.copy()
                library, numbers = compiled.template.deep_copy(), self._numbers.result(0)
                matcher = Matcher(library, numbers, scanner, compiled.shared)
                if tokens:
                    await self._advance(matcher, tokens)
                return matcher
        except TimeoutError:
            raise busy() from None

    def forget(self, constraint: Constraint) -> None:
        """Drop the template: copies share its lexer cache, and the limits of that cache."""
        self.cache.drop(digest(constraint))

    def prepare(self) -> None:
        """Start the processes now; otherwise the first constraint starts them."""
        self._checker.prepare()

    def close(self) -> None:
        """End the processes, and each thread after its current call."""
        self._checker.close()
        self._threads.close()

    async def _compile(self, constraint: Constraint) -> _Compiled:
        grammar = await self._checker.check(constraint)
        if grammar.reason:
            return _Compiled(0, None, grammar)
        work = self._threads.submit(partial(self._compile_here, grammar))
        return await asyncio.wrap_future(work)

    async def _advance(self, matcher: Matcher, tokens: Sequence[int]) -> None:
        cancelled = threading.Event()
        work = self._threads.submit(partial(_advance, matcher, tokens, cancelled))
        try:
            error = await asyncio.wrap_future(work)
        finally:
            cancelled.set()
        if error:
            raise error

    # -- in the threads ----------------------------------------------------------------------------

    def _compile_here(self, grammar: Grammar) -> _Compiled:
        tokenizer = self._tokenizer.result()
        begun_s = time.thread_time()
        template = LLMatcher(tokenizer, grammar.text, log_level=0, limits=LIMITS)
        if reason := compile_error(template):
            return _Compiled(0, None, Grammar(reason=reason))
        self._numbers.result()
        cpu_s = time.thread_time() - begun_s
        return _Compiled(len(grammar.text), template, grammar, cpu_s, grammar.scanner)

    def _number_tokens(self) -> NumberTokens | None:
        try:
            tokenizer = self._tokenizer.result()
        except Exception:  # the check of each constraint reports the reason
            return None
        return NumberTokens(tokenizer, tokenizer.vocab_size)


def _advance(
    matcher: Matcher, tokens: Sequence[int], cancelled: threading.Event
) -> InvalidRequest | None:
    """Take tokens one by one, so that other threads get the GIL in between."""
    until_s = time.thread_time() + _MAX_ADVANCE_CPU_S
    for token in tokens:
        if cancelled.is_set() or time.thread_time() > until_s:
            what = f"{len(tokens)} tokens take longer than {_MAX_ADVANCE_CPU_S:g} s of CPU time"
            return InvalidRequest("constraint", what)
        if not matcher.advance([token]):
            if matcher.is_too_costly:
                return InvalidRequest("constraint", matcher.error)
            return refusal(Grammar(reason=mismatch(matcher.library), mismatch_index=0))
    return None
