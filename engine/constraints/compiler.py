"""Constraints -> grammars, in threads of their own, cached; or the reason why not.

    matcher(constraint, tokens):  known? -> a copy        being compiled? -> wait for that
                                  else compile, once however many ask
    fitting(schema):              the same for one schema of several, or the part that compiles

A grammar is refused where it is too long, too deep or too costly for the limits below, so that no
constraint can hold up an engine: they bound what a mask costs, too. A compilation that takes longer
than its callers wait goes on, and what it found is known to the next.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from engine.checkpoint.added_tokens import merged_tokenizer
from engine.constraints.deep_threads import DeepThreads
from engine.constraints.leniency import loosened
from engine.constraints.matcher import Matcher, brief
from engine.constraints.numbers import NumberScanner, NumberTokens, step_of
from engine.constraints.schemas import Refused, held
from engine.constraints.special_tokens import MARK, numbered, unspelled
from engine.errors import InvalidRequest, Unavailable
from engine.types import Constraint, ConstraintKind

MAX_SOURCE_CHARS = 1 << 20  # what the stacks of DeepThreads are made for
COMPILE_S = 10.0
_NUM_THREADS = 2
_MAX_CACHED = 256
_MAX_CACHED_CHARS = 16 << 20  # of their sources
# What a grammar keeps in memory goes with the time it took: 400 MB a second, however short it is
# ("((((a{10}){10}){10}){10}){10}" keeps 30 MB); nobody else says how large it is.
_MAX_CACHED_CPU_S = 1.0
# \d and \w; classes that exclude something, and all other escapes, stay as they are. One pass: a
# class that is not closed reaches to the end, where the library refuses it.
_CLASS_ESCAPE = re.compile(r"\[\^\]?(?:\\.|[^\]\\])*+(?:\]|\\?\Z)|\\.", re.DOTALL)
_ASCII = {r"\d": "[0-9]", r"\w": "[0-9A-Za-z_]"}
# A step with a mask that costs more than some ten milliseconds would hold up everybody's.
_LIMITS = LLParserLimits(step_max_items=16_000, step_lexer_fuel=200_000, verbose_errors=False)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Where a model's tokens are told of."""

    folder: Path  # with tokenizer.json
    size: int  # of the model
    eos_token_ids: tuple[int, ...]

    def build(self) -> LLTokenizer:
        """Takes a fifth of a second, and the interpreter with it."""
        text = unspelled(merged_tokenizer(self.folder))
        return LLTokenizer(text, n_vocab=self.size, eos_token=list(self.eos_token_ids) or None)


@dataclass(frozen=True, slots=True)
class _Compiled:
    """What became of a constraint: a grammar that nobody advances, or a reason."""

    num_chars: int
    template: LLMatcher | None
    reason: str = ""
    cpu_s: float = 0.0
    scanner: NumberScanner | None = None
    schema: str = ""  # instead of a grammar: what of a schema compiles


@dataclass(frozen=True, slots=True)
class _Compiling:
    """A compilation under way, on its thread and as the loop sees it."""

    work: Future[_Compiled]
    done: asyncio.Future[_Compiled]


class Compiler:
    """Grammars over one vocabulary. Lives on an event loop; its work is done in its threads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.num_compiled = 0
        self._threads = DeepThreads(_NUM_THREADS, "grammars")
        self._tokenizer = self._threads.submit(vocabulary.build)
        self._numbers = self._threads.submit(self._number_tokens)
        self._known: OrderedDict[bytes, _Compiled] = OrderedDict()
        self._num_chars = 0
        self._cpu_s = 0.0
        self._compiling: dict[bytes, _Compiling] = {}

    async def matcher(self, constraint: Constraint, tokens: Sequence[int] = ()) -> Matcher:
        """Where an answer stands that begins with `tokens`.

        Raises InvalidRequest: of "constraint" if that cannot be used, of "tokens" if they do not
        fit it; Unavailable where the threads do not come to it in time.
        """
        compiled = await self._compiled(_digest(constraint), partial(self._compile, constraint))
        if compiled.template is None:
            raise InvalidRequest("constraint", compiled.reason)
        numbers, scanner = self._numbers.result(0), compiled.scanner
        matcher = Matcher(compiled.template.deep_copy(), numbers, scanner and scanner.copy())
        if tokens:
            advance = self._threads.submit(partial(matcher.advance, tokens))
            try:
                fits = await asyncio.wait_for(asyncio.wrap_future(advance), COMPILE_S)
            except TimeoutError:
                raise _busy() from None
            if not fits:
                raise _misfit(matcher.error)
        return matcher

    async def fitting(self, schema: str, lenient: bool) -> str:
        """The schema, made by `held`, if it compiles; else the part that does, if it is lenient.

        Raises InvalidRequest of "constraint", Unavailable as above.
        """
        person = b"lenient" if lenient else b"strict"
        key = hashlib.blake2b(schema.encode(), digest_size=16, person=person).digest()
        found = await self._compiled(key, partial(self._fit, schema, lenient))
        if found.reason:
            raise InvalidRequest("constraint", found.reason)
        return found.schema

    def forget(self, constraint: Constraint) -> None:
        """Compile it anew the next time: its copies share what they have learned, and the limits
        on that.
        """
        self._drop(_digest(constraint))

    def close(self) -> None:
        """End the threads after what they are doing."""
        self._threads.close()

    async def _compiled(self, key: bytes, compile_: Callable[[], _Compiled]) -> _Compiled:
        if (known := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            return known
        compiling = self._compiling.get(key)
        if compiling is None:
            work = self._threads.submit(compile_)
            compiling = self._compiling[key] = _Compiling(work, asyncio.wrap_future(work))
            compiling.done.add_done_callback(partial(self._keep, key))
        try:
            return await asyncio.wait_for(asyncio.shield(compiling.done), COMPILE_S)
        except TimeoutError:
            if not compiling.work.running():
                raise _busy() from None
            reason = f"takes longer than {COMPILE_S:g} s to compile"
            raise InvalidRequest("constraint", reason) from None

    def _keep(self, key: bytes, compiling: asyncio.Future[_Compiled]) -> None:
        del self._compiling[key]
        if compiling.cancelled() or compiling.exception() is not None:
            return
        compiled = compiling.result()
        self.num_compiled += 1
        self._known[key] = compiled
        self._num_chars += compiled.num_chars
        self._cpu_s += compiled.cpu_s
        while (
            len(self._known) > _MAX_CACHED
            or self._num_chars > _MAX_CACHED_CHARS
            or (self._cpu_s > _MAX_CACHED_CPU_S and len(self._known) > 1)
        ):
            self._drop(next(iter(self._known)))

    def _drop(self, key: bytes) -> None:
        if (gone := self._known.pop(key, None)) is not None:
            self._num_chars -= gone.num_chars
            self._cpu_s -= gone.cpu_s

    # -- in the threads ----------------------------------------------------------------------------

    def _compile(self, constraint: Constraint) -> _Compiled:
        num_chars = len(constraint.source)
        if num_chars > MAX_SOURCE_CHARS:
            reason = f"{num_chars} characters; expected at most {MAX_SOURCE_CHARS}"
            return _Compiled(0, None, reason)
        try:
            tokenizer = self._tokenizer.result()
        except Exception as error:  # the library's own, of many kinds
            return _Compiled(0, None, _no_tokenizer(error))
        try:
            grammar = _led(_grammar(constraint, tokenizer), constraint.lead)
        except Refused as error:
            return _Compiled(0, None, brief(str(error)))
        except (ValueError, RecursionError) as error:
            what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            return _Compiled(0, None, f"not JSON: {brief(what)}")
        begun_s = time.thread_time()
        template = LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
        if reason := _fault(template):
            return _Compiled(0, None, reason)
        self._numbers.result()
        cpu_s, scanner = time.thread_time() - begun_s, _scanner(constraint)
        return _Compiled(num_chars, template, cpu_s=cpu_s, scanner=scanner)

    def _fit(self, schema: str, lenient: bool) -> _Compiled:
        try:
            tokenizer = self._tokenizer.result()
        except Exception as error:
            return _Compiled(0, None, _no_tokenizer(error))
        whole = json.loads(schema)
        style = whole.pop("x-guidance")

        def fault(part: dict[str, Any]) -> str:
            source = json.dumps({**part, "x-guidance": style})
            try:
                grammar = LLMatcher.grammar_from_json_schema(source)
            except ValueError as error:  # 1e999
                return str(error)
            return _fault(LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS))

        begun_s = time.thread_time()
        if not (reason := fault(whole)):
            return _Compiled(len(schema), None, schema=schema)
        if not lenient:
            return _Compiled(0, None, reason)
        left = loosened(whole, lambda part: not fault(part), begun_s) | {"x-guidance": style}
        return _Compiled(len(schema), None, schema=json.dumps(left))

    def _number_tokens(self) -> NumberTokens | None:
        try:
            tokenizer = self._tokenizer.result()
        except Exception:  # each compilation gives the reason
            return None
        return NumberTokens(tokenizer, tokenizer.vocab_size)


def _no_tokenizer(error: Exception) -> str:
    return f"none is possible with this model's tokenizer: {brief(str(error))}"


def _fault(template: LLMatcher) -> str:
    """Why a grammar is of no use; ""."""
    first = template.deep_copy()
    if not first.is_error():
        first.compute_bitmask()  # some limits show only here
    return brief(first.get_error().replace(MARK, "")) if first.is_error() else ""


def _scanner(constraint: Constraint) -> NumberScanner | None:
    match constraint.kind:
        case ConstraintKind.JSON_SCHEMA:
            return NumberScanner(step=step_of(constraint.source))
        case ConstraintKind.LARK:
            return NumberScanner.of_lark(constraint.source)
    return None


def _misfit(error: str) -> InvalidRequest:
    """The tokens are to blame where they are what the library names; else one of its limits."""
    if error.startswith(("Parser Error: token", "parser stopped")):
        return InvalidRequest("tokens", "they do not fit the constraint")
    return InvalidRequest("constraint", error)


def _busy() -> Unavailable:
    return Unavailable("the compilers of constraints are busy", retry_after_s=COMPILE_S / 2)


def _digest(constraint: Constraint) -> bytes:
    kind = constraint.kind.value.encode()
    source = f"{constraint.lead}\0{constraint.source}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(source, digest_size=16, person=kind).digest()


def _grammar(constraint: Constraint, tokenizer: LLTokenizer) -> str:
    """As the library takes it: a JSON list of grammars, in which a source is a value or a text.

    Raises Refused; ValueError, RecursionError where a schema is not JSON.
    """
    source = constraint.source
    match constraint.kind:
        case ConstraintKind.JSON_SCHEMA:
            return LLMatcher.grammar_from_json_schema(held(source))
        case ConstraintKind.REGEX:
            return LLMatcher.grammar_from_regex(_in_ascii(source))
        case ConstraintKind.LARK:
            return json.dumps({"grammars": [{"lark_grammar": numbered(source, tokenizer)}]})


def _led(grammar: str, lead: str) -> str:
    """The grammar behind what the tokenizer strips from the start of a text."""
    if not lead:
        return grammar
    whole = json.loads(grammar)
    whole["grammars"][0]["name"] = "led"
    whole["grammars"].insert(0, {"lark_grammar": f"start: {json.dumps(lead)} @led"})
    return json.dumps(whole)


def _in_ascii(regex: str) -> str:
    r"""The same with the \d and \w of ASCII, as vLLM's default compiler reads them.

    The library's are those of all scripts, and a model that is held to them may well write digits
    that no reader takes for numbers. What is allowed only shrinks.
    """
    return _CLASS_ESCAPE.sub(lambda part: _ASCII.get(part[0], part[0]), regex)
