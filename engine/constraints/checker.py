"""Checks whether a constraint can be used, by compiling it in processes with limits (sandbox.py).

    check(constraint)          cached? -> the result    in flight? -> await it    else compile once
    compilable_schema(schema)  the same for one schema of several, or the part of it that compiles

A compilation is cancelled when no caller waits for it, and after COMPILE_S. A constraint that
reached a limit is refused from the cache.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from engine.base.errors import InvalidRequest, Unavailable
from engine.base.types import Constraint
from engine.constraints import grammar
from engine.constraints.grammar import Grammar, Vocabulary
from engine.constraints.runner import MAX_BYTES, QUICK_CPU_S, Job
from engine.constraints.sandbox import JobEnd, Sandbox
from engine.constraints.single_flight_cache import SingleFlightCache
from engine.telemetry.log import get_logger

_log = get_logger(__name__)
COMPILE_S = 10.0
MAX_CPU_S = 2.0
_FIRST_CPU_S = 0.05  # within which ordinary schemas compile
_MAX_KNOWN = 256
_MAX_KNOWN_CHARS = 16 << 20
Count = Callable[[str], None]


class Checker:
    """Owned by one event loop. `count` gets the outcome of each compilation: compiled, refused,
    cpu_time, memory, depth, lost, abandoned or busy.
    """

    def __init__(
        self, vocabulary: Vocabulary, count: Count | None = None, cpu_s: float = MAX_CPU_S
    ) -> None:
        self._sandbox = Sandbox(vocabulary)
        self.count: Count = count or (lambda outcome: None)
        self._cpu_s = cpu_s
        self.cache: SingleFlightCache[Grammar] = SingleFlightCache(
            lambda found: (found.num_chars,), (_MAX_KNOWN_CHARS,), _MAX_KNOWN
        )

    async def check(self, constraint: Constraint, outputs: Sequence[Sequence[int]] = ()) -> Grammar:
        """The constraint's grammar, also after the tokens of each of `outputs`, or why not.

        Raises Unavailable after COMPILE_S.
        """
        job = partial(grammar.grammar_of, constraint=constraint)
        found = await self._within(self.cache.get(digest(constraint), partial(self._try, job)))
        if not outputs or found.reason:
            return found
        job = partial(job, outputs=[tuple(tokens) for tokens in outputs])
        return await self._within(self._try(job))

    async def compilable_schema(self, schema: str, lenient: bool) -> Grammar:
        """A schema of `prepare_schema` if it compiles; else, if lenient, the part that does.

        Raises Unavailable after COMPILE_S.
        """
        person = b"lenient" if lenient else b"strict"
        key = hashlib.blake2b(schema.encode(), digest_size=16, person=person).digest()
        job = partial(grammar.compilable_schema, schema=schema, lenient=lenient)
        return await self._within(self.cache.get(key, partial(self._try, job)))

    def prepare(self) -> None:
        """Start the processes now; otherwise the first constraint starts them."""
        self._sandbox.prepare()

    def close(self) -> None:
        """End the processes."""
        self._sandbox.close()

    async def _within(self, found: Coroutine[Any, Any, Grammar]) -> Grammar:
        try:
            return await asyncio.wait_for(found, COMPILE_S)
        except TimeoutError:
            self.count("busy")
            raise busy() from None

    async def _try(self, job: Job) -> Grammar:
        """Compile with three growing CPU limits; a lost job is submitted again with the next."""
        for slow, max_s in ((False, _FIRST_CPU_S), (False, QUICK_CPU_S), (True, self._cpu_s)):
            cpu_s = min(max_s, self._cpu_s)
            trial = self._sandbox.submit(job, cpu_s, slow=slow)
            try:
                outcome = await asyncio.wrap_future(trial.future)
            except asyncio.CancelledError:
                trial.abandon()
                self.count("abandoned")
                raise
            if slow or outcome.end not in (JobEnd.CPU_TIME, JobEnd.LOST):
                break
            if outcome.end is JobEnd.LOST:
                self.count(outcome.end.value)
        if (found := outcome.grammar) is not None:
            self.count("refused" if found.reason else "compiled")
            return replace(found, cpu_s=outcome.cpu_s)
        self.count(outcome.end.value)
        if outcome.end is JobEnd.LOST:
            raise Unavailable("the constraint compiler was lost", retry_after_s=1.0)
        reason = self._limit(outcome.end)
        _log.warning("a constraint reached a limit", limit=outcome.end.value, reason=reason)
        return Grammar(reason=reason, cpu_s=outcome.cpu_s)

    def _limit(self, end: JobEnd) -> str:
        match end:
            case JobEnd.CPU_TIME:
                return f"takes longer than {self._cpu_s:g} s of CPU time to compile"
            case JobEnd.MEMORY:
                return f"takes more than {MAX_BYTES >> 20} MiB of memory to compile"
        return "nested too deeply"


def refusal(found: Grammar) -> InvalidRequest:
    """The error for a grammar that cannot be used."""
    if found.mismatch_index >= 0 and not found.reason:
        return InvalidRequest("tokens", "they do not fit the constraint")
    return InvalidRequest("constraint", found.reason)


def busy() -> Unavailable:
    """The error for a compilation that exceeded COMPILE_S."""
    return Unavailable("the constraint compilers are busy", retry_after_s=COMPILE_S / 2)


def digest(constraint: Constraint) -> bytes:
    """The cache key of a constraint."""
    kind = constraint.kind.value.encode()
    parts = (constraint.leading_text, constraint.prologue, constraint.source)
    source = "\0".join(parts).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(source, digest_size=16, person=kind).digest()
