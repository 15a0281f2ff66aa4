"""Grammars without a model: which schemas compile, what they take, and texts sampled from them."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.base.errors import InvalidRequest
from engine.base.types import Constraint, ConstraintKind
from engine.checkpoint.source import resolve
from engine.constraints import Compiler, Vocabulary
from tests.ecosystem.conformance.checking import NotChecked, fault, validator
from tests.ecosystem.conformance.sources import Case, Instance, canonical

VOCAB = 49152
ENDS = (2, 0)
_LONGEST = 250  # tokens of a sampled text
_MOST_MEMBERS = 5  # whose orders are tried


@dataclass(frozen=True)
class Grammar:
    """What became of one schema."""

    name: str
    refused: str  # why; "": it compiles
    taken: tuple[tuple[bool, bool, str], ...]  # instances: valid, taken, why not
    num_drawn: int = 0  # texts that came to an end
    num_cut: int = 0  # that did not
    wrong: tuple[str, ...] = ()  # not valid
    not_checked: str = ""  # why jsonschema could not look


class Texts:
    """The vocabulary as text, and which tokens bring a text to its end."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        tokenizer = vocabulary.build()
        self.encode = tokenizer.tokenize_str
        self.of = [tokenizer.decode_bytes([token]) for token in range(VOCAB)]
        self.marks = self._those('"}],:{[0123456789-.eE \\', 3)
        self.short = self._those("".join(map(chr, range(32, 127))), 2)

    def _those(self, characters: str, longest: int) -> NDArray[np.bool_]:
        allowed = set(characters.encode())
        return np.array([0 < len(t) <= longest and allowed.issuperset(t) for t in self.of])


def study(cases: Sequence[Case], num_walks: int, seed: int) -> list[Grammar]:
    """All of them, one after the other."""
    vocabulary = Vocabulary(resolve("smollm2").folder, VOCAB, ENDS)
    return asyncio.run(_study(cases, vocabulary, num_walks, seed))


async def _study(
    cases: Sequence[Case], vocabulary: Vocabulary, num_walks: int, seed: int
) -> list[Grammar]:
    compiler, texts = Compiler(vocabulary), Texts(vocabulary)
    try:
        rng = random.Random(seed)
        return [await _one(compiler, texts, case, num_walks, rng) for case in cases]
    finally:
        compiler.close()


async def _one(
    compiler: Compiler, texts: Texts, case: Case, num_walks: int, rng: random.Random
) -> Grammar:
    constraint = Constraint(ConstraintKind.JSON_SCHEMA, case.source)
    try:
        await compiler.matcher(constraint)
    except InvalidRequest as error:
        return Grammar(case.name, error.description, ())

    async def takes(text: str) -> bool:
        matcher = await compiler.matcher(constraint)
        return matcher.advance(texts.encode(text)) and matcher.library.is_accepting()

    taken = []
    for instance in case.instances:
        fits = await takes(instance.text)
        why = "" if fits or not instance.valid else await _why(case, instance, takes)
        taken.append((instance.valid, fits, why))
    wrong, num_drawn, not_checked = [], 0, ""
    try:
        checker = validator(case)
        for _ in range(num_walks):
            matcher = await compiler.matcher(constraint)
            text = _draw(matcher.library, texts, rng)
            num_drawn += text is not None
            if text is not None and (error := fault(checker, text)):
                wrong.append(f"{text}: {error}")
    except NotChecked as error:
        not_checked = str(error)
    num_cut = 0 if not_checked else num_walks - num_drawn
    return Grammar(case.name, "", tuple(taken), num_drawn, num_cut, tuple(wrong), not_checked)


def _draw(library, texts: Texts, rng: random.Random) -> str | None:
    """A text of the grammar, short ends preferred; None: it came to none."""
    tokens: list[int] = []
    while not library.is_stopped() and len(tokens) < _LONGEST:
        bits = np.frombuffer(library.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[:VOCAB].astype(bool)
        if allowed[list(ENDS)].any() and (rng.random() < 0.7 or len(tokens) > _LONGEST // 2):
            break
        allowed[list(ENDS)] = False
        if not allowed.any():
            break
        for share, those in ((0.75, texts.marks), (0.9, texts.short)):
            if rng.random() < share and (allowed & those).any():
                allowed &= those
                break
        token = int(rng.choice(np.flatnonzero(allowed)))
        if not library.consume_token(token):
            return None
        tokens.append(token)
    if not library.is_accepting():
        return None
    return b"".join(texts.of[token] for token in tokens).decode()


async def _why(case: Case, instance: Instance, takes) -> str:
    """Why a valid instance is not taken: found by what is taken in its place."""
    value = json.loads(instance.text)
    for whole in _with_whole_numbers(value):
        if await takes(canonical(whole)):
            return "1.0 where 1 is written"
    if isinstance(value, dict) and len(value) <= _MOST_MEMBERS:
        for members in itertools.permutations(value.items()):
            if await takes(canonical(dict(members))):
                return "members in another order than the schema's"
    return "a format is held, not only noted" if '"format"' in case.source else "other"


def _with_whole_numbers(value: object) -> Iterator[object]:
    """The value with 1 for each 1.0, where it has such."""
    text = json.dumps(value)
    whole = json.loads(text, parse_float=lambda number: json.loads(number.removesuffix(".0")))
    if json.dumps(whole) != text:
        yield whole
