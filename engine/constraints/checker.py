"""Whether a constraint can be used, found out in processes that have limits (sandbox.py).

    tried(constraint)     known? -> that      being tried? -> wait for that      else try it once
    fitting(schema)       the same for one schema of several, or the part of it that compiles

A try is ended when all that wait for it have gone, and after COMPILE_S. What reached a limit is
refused from then on without another try.
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
from engine.constraints.known import Known
from engine.constraints.runner import MOST_BYTES, QUICK_CPU_S, Job
from engine.constraints.sandbox import Ended, Sandbox
from engine.telemetry.log import get_logger

_log = get_logger(__name__)
COMPILE_S = 10.0
MOST_CPU_S = 2.0
_FIRST_CPU_S = 0.05  # within which ordinary schemas compile
_MAX_KNOWN = 256
_MAX_KNOWN_CHARS = 16 << 20
Count = Callable[[str], None]


class Checker:
    """Lives on an event loop. `count` is called with the outcome of each try: compiled,
    refused, cpu_time, memory, depth, lost, abandoned or busy.
    """

    def __init__(
        self, vocabulary: Vocabulary, count: Count | None = None, cpu_s: float = MOST_CPU_S
    ) -> None:
        self._sandbox = Sandbox(vocabulary)
        self.count: Count = count or (lambda outcome: None)
        self._cpu_s = cpu_s
        self.known: Known[Grammar] = Known(
            lambda found: (found.num_chars,), (_MAX_KNOWN_CHARS,), _MAX_KNOWN
        )

    async def tried(self, constraint: Constraint, answers: Sequence[Sequence[int]] = ()) -> Grammar:
        """Its grammar, also behind the tokens of each of `answers`, or the reason why not.

        Raises Unavailable where that is not known in time.
        """
        job = partial(grammar.grammar_of, constraint=constraint)
        found = await self._within(self.known.get(digest(constraint), partial(self._try, job)))
        if not answers or found.reason:
            return found
        job = partial(job, answers=[tuple(tokens) for tokens in answers])
        return await self._within(self._try(job))

    async def fitting(self, schema: str, lenient: bool) -> Grammar:
        """The schema, made by `held`, as a text, if it compiles; else, if it is lenient, the part
        that does. Raises Unavailable as above.
        """
        person = b"lenient" if lenient else b"strict"
        key = hashlib.blake2b(schema.encode(), digest_size=16, person=person).digest()
        job = partial(grammar.fitting, schema=schema, lenient=lenient)
        return await self._within(self.known.get(key, partial(self._try, job)))

    def prepare(self) -> None:
        """Start the processes now; else the first constraint does."""
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
        """One try in three steps; what was lost in one is tried in the next."""
        for slow, most_s in ((False, _FIRST_CPU_S), (False, QUICK_CPU_S), (True, self._cpu_s)):
            cpu_s = min(most_s, self._cpu_s)
            trial = self._sandbox.submit(job, cpu_s, slow=slow)
            try:
                outcome = await asyncio.wrap_future(trial.future)
            except asyncio.CancelledError:
                trial.abandon()
                self.count("abandoned")
                raise
            if slow or outcome.ended not in (Ended.CPU_TIME, Ended.LOST):
                break
            if outcome.ended is Ended.LOST:
                self.count(outcome.ended.value)
        if (found := outcome.grammar) is not None:
            self.count("refused" if found.reason else "compiled")
            return replace(found, cpu_s=outcome.cpu_s)
        self.count(outcome.ended.value)
        if outcome.ended is Ended.LOST:
            raise Unavailable("the compiler of constraints was lost", retry_after_s=1.0)
        reason = self._limit(outcome.ended)
        _log.warning("a constraint reached a limit", limit=outcome.ended.value, reason=reason)
        return Grammar(reason=reason, cpu_s=outcome.cpu_s)

    def _limit(self, ended: Ended) -> str:
        match ended:
            case Ended.CPU_TIME:
                return f"takes longer than {self._cpu_s:g} s of CPU time to compile"
            case Ended.MEMORY:
                return f"takes more than {MOST_BYTES >> 20} MiB of memory to compile"
        return "nested too deeply"


def refusal(found: Grammar) -> InvalidRequest:
    """The error of a grammar that cannot be used."""
    if found.misfit >= 0 and not found.reason:
        return InvalidRequest("tokens", "they do not fit the constraint")
    return InvalidRequest("constraint", found.reason)


def busy() -> Unavailable:
    """There was no time for it."""
    return Unavailable("the compilers of constraints are busy", retry_after_s=COMPILE_S / 2)


def digest(constraint: Constraint) -> bytes:
    """What a constraint is known by."""
    kind = constraint.kind.value.encode()
    source = f"{constraint.lead}\0{constraint.source}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(source, digest_size=16, person=kind).digest()
