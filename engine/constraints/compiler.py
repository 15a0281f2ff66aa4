"""Constraints -> matchers in this process, in threads of their own, cached; or the reason why not.

    matcher(constraint, tokens):  known? -> a copy        being compiled? -> wait for that
                                  else try it in another process, then compile it here, once

Only a grammar that compiled within the limits of checker.py is compiled here, where a compilation
cannot be ended: it does the same work again, and the interpreter is free meanwhile.
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
from engine.constraints.checker import (
    COMPILE_S,
    MOST_CPU_S,
    Checker,
    Count,
    busy,
    digest,
    refusal,
)
from engine.constraints.grammar import LIMITS, Grammar, Vocabulary, fault, misfit
from engine.constraints.known import Known
from engine.constraints.matcher import Kin, Matcher
from engine.constraints.numbers import NumberScanner, NumberTokens

_NUM_THREADS = 2
_MAX_CACHED = 256
_MAX_CACHED_CHARS = 16 << 20  # of their sources
# What a grammar keeps in memory goes with the time it took: 400 MB a second, however short it is
# ("((((a{10}){10}){10}){10}){10}" keeps 30 MB); nobody else says how large it is.
_MAX_CACHED_CPU_S = 1.0
_MAX_ADVANCE_CPU_S = 2.0  # of the tokens that an answer begins with


@dataclass(frozen=True, slots=True)
class _Compiled:
    """What became of a constraint: a grammar that nobody advances, or a reason."""

    num_chars: int
    template: LLMatcher | None
    refused: Grammar
    cpu_s: float = 0.0
    scanner: NumberScanner | None = None
    kin: Kin = field(default_factory=Kin)


class Compiler:
    """Grammars over one vocabulary. Lives on an event loop; its work is done in its threads."""

    def __init__(self, vocabulary: Vocabulary, count: Count | None = None) -> None:
        # A coordinator that tried it first is stricter, so that what it takes is taken here.
        self._checker = Checker(vocabulary, count, 2 * MOST_CPU_S)
        self._threads = BigStackThreads(_NUM_THREADS, "grammars")
        self._tokenizer = self._threads.submit(vocabulary.build)
        self._numbers = self._threads.submit(self._number_tokens)
        self.known: Known[_Compiled] = Known(
            lambda compiled: (compiled.num_chars, compiled.cpu_s),
            (_MAX_CACHED_CHARS, _MAX_CACHED_CPU_S),
            _MAX_CACHED,
        )

    async def matcher(self, constraint: Constraint, tokens: Sequence[int] = ()) -> Matcher:
        """Where an answer stands that begins with `tokens`.

        Raises InvalidRequest: of "constraint" if that cannot be used, of "tokens" if they do not
        fit it; Unavailable where that is not known in time.
        """
        try:
            async with asyncio.timeout(COMPILE_S):
                compiled = await self.known.get(
                    digest(constraint), partial(self._compile, constraint)
                )
                if compiled.template is None:
                    raise refusal(compiled.refused)
                scanner = compiled.scanner and compiled.scanner.copy()
                library, numbers = compiled.template.deep_copy(), self._numbers.result(0)
                matcher = Matcher(library, numbers, scanner, compiled.kin)
                if tokens:
                    await self._advance(matcher, tokens)
                return matcher
        except TimeoutError:
            raise busy() from None

    def forget(self, constraint: Constraint) -> None:
        """Compile it anew the next time: its copies share what they have learned, and the limits
        on that.
        """
        self.known.drop(digest(constraint))

    def prepare(self) -> None:
        """Start the processes now; else the first constraint does."""
        self._checker.prepare()

    def close(self) -> None:
        """End the processes, and the threads after what they are doing."""
        self._checker.close()
        self._threads.close()

    async def _compile(self, constraint: Constraint) -> _Compiled:
        grammar = await self._checker.tried(constraint)
        if grammar.reason:
            return _Compiled(0, None, grammar)
        work = self._threads.submit(partial(self._compile_here, grammar))
        return await asyncio.wrap_future(work)

    async def _advance(self, matcher: Matcher, tokens: Sequence[int]) -> None:
        left = threading.Event()  # set: the wait for it is over
        work = self._threads.submit(partial(_advance, matcher, tokens, left))
        try:
            error = await asyncio.wrap_future(work)
        finally:
            left.set()
        if error:
            raise error

    # -- in the threads ----------------------------------------------------------------------------

    def _compile_here(self, grammar: Grammar) -> _Compiled:
        tokenizer = self._tokenizer.result()
        begun_s = time.thread_time()
        template = LLMatcher(tokenizer, grammar.text, log_level=0, limits=LIMITS)
        if reason := fault(template):
            return _Compiled(0, None, Grammar(reason=reason))
        self._numbers.result()
        cpu_s = time.thread_time() - begun_s
        return _Compiled(len(grammar.text), template, grammar, cpu_s, grammar.scanner)

    def _number_tokens(self) -> NumberTokens | None:
        try:
            tokenizer = self._tokenizer.result()
        except Exception:  # each trial gives the reason
            return None
        return NumberTokens(tokenizer, tokenizer.vocab_size)


def _advance(
    matcher: Matcher, tokens: Sequence[int], left: threading.Event
) -> InvalidRequest | None:
    """Take tokens one by one: other threads get the interpreter in between."""
    until_s = time.thread_time() + _MAX_ADVANCE_CPU_S
    for token in tokens:
        if left.is_set() or time.thread_time() > until_s:
            what = f"{len(tokens)} tokens take longer than {_MAX_ADVANCE_CPU_S:g} s of CPU time"
            return InvalidRequest("constraint", what)
        if not matcher.advance([token]):
            if matcher.is_too_costly:
                return InvalidRequest("constraint", matcher.error)
            return refusal(Grammar(reason=misfit(matcher.library), misfit=0))
    return None
