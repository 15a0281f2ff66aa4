"""Constraints are compiled, cached or refused with a reason; masks are functions of the tokens."""

from __future__ import annotations

import asyncio
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from engine.base.errors import InvalidRequest
from engine.base.types import Constraint, ConstraintKind
from engine.checkpoint.source import resolve
from engine.constraints import Checker, Compiler, Masks, Matcher, Vocabulary
from engine.constraints import compiler as compiler_module
from engine.constraints.masks import MaskRequest

VOCAB = 49152
PERSON = {
    "type": "object",
    "properties": {
        "the first name": {"type": "string"},
        "age in years": {"type": "integer", "minimum": 0},
        "kind": {"enum": ["friend", "foe"]},
    },
    "required": ["the first name", "age in years", "kind"],
    "additionalProperties": False,
}
TEXT = '{"the first name": "Bob", "age in years": 42, "kind": "friend"}'


def schema(value: object) -> Constraint:
    return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(value))


def regex(source: str) -> Constraint:
    return Constraint(ConstraintKind.REGEX, source)


def lark(source: str) -> Constraint:
    return Constraint(ConstraintKind.LARK, source)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(resolve("smollm2").folder, VOCAB, (2, 0))


@pytest.fixture(scope="module")
def compiler(vocabulary: Vocabulary) -> Iterator[Compiler]:
    made = Compiler(vocabulary)
    yield made
    made.close()


@pytest.fixture(scope="module")
def encode(vocabulary: Vocabulary) -> object:
    return vocabulary.build().tokenize_str


def bits(row: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()


def masks_of(masks: Masks, requests: list[MaskRequest]) -> list[list[list[int]]]:
    found = masks.wait(masks.begin(dict(enumerate(requests))))
    return [[bits(row) for row in found[i]] for i in range(len(requests))]


async def test_a_matching_text_is_accepted_to_its_end(compiler: Compiler, encode) -> None:
    matcher = await compiler.matcher(schema(PERSON))
    tokens = encode(TEXT)
    assert matcher.num_valid(tokens) == len(tokens)
    for i, token in enumerate(tokens):
        assert not matcher.ended, i
        assert matcher.advance([token])
    assert matcher.ended
    assert matcher.error == ""
    assert masks_of(Masks(VOCAB), [MaskRequest(matcher, [])]) == [[[0, 2]]]
    assert matcher.num_valid([5]) == 0


async def test_an_end_is_allowed_where_the_text_could_go_on(compiler: Compiler, encode) -> None:
    for end in (2, 0):
        matcher = await compiler.matcher(regex("[0-9]+"), encode("12"))
        allowed = masks_of(Masks(VOCAB), [MaskRequest(matcher, [])])[0][0]
        assert {0, 2} < set(allowed)
        assert not matcher.ended
        assert matcher.num_valid([end, 5]) == 1
        assert matcher.advance([end])
        assert matcher.ended
        assert matcher.error == ""


async def test_text_that_looks_like_special_tokens_is_text(compiler: Compiler) -> None:
    spelled = ("<|im_end|>", "a<filename>b", "<repo_name><|endoftext|>")
    constraints = [schema({"const": text}) for text in spelled]
    constraints += [regex(re.escape(text)) for text in spelled]
    constraints += [lark(f"start: {json.dumps(text)}") for text in spelled]
    one = {"properties": {"<filename>": {"const": 1}}, "required": ["<filename>"]}
    tight = {"additionalProperties": False, "x-guidance": {"whitespace_flexible": False}}
    constraints.append(schema({"type": "object", **one, **tight}))
    for constraint in constraints:
        matcher, masks = await compiler.matcher(constraint), Masks(VOCAB)
        for _ in range(40):
            if matcher.ended:
                break
            allowed = masks_of(masks, [MaskRequest(matcher, [])])[0][0]
            assert min(allowed) > 16, constraint  # the first 17 are special
            assert matcher.advance([allowed[0]])
        assert matcher.ended
        assert matcher.error == "", constraint


async def test_a_grammar_may_name_special_tokens(compiler: Compiler) -> None:
    for source in (
        'start: "a" <filename> // not "<|im_end|>\n',
        'start: "a" <[6]>',
        "start: /a/ <filename>",
    ):
        matcher = await compiler.matcher(lark(source), [81])
        assert masks_of(Masks(VOCAB), [MaskRequest(matcher, [])]) == [[[6]]], source
    with pytest.raises(InvalidRequest, match='unknown special token: "<none>"'):
        await compiler.matcher(lark("start: <none>"))


@pytest.mark.parametrize(
    ("source", "good", "bad"),
    [
        (r"\d{2}[\d.]\w", ["121a", "12._"], ["1\u06611a", "12\u0661a", "12.é", "12.\U0001f189"]),
        (r"[^\d][^]\d]", ["ab", "éé"], ["1a", "a1", "\u0661a", "a\u0661", "a]"]),
        (r"\\d[\\d]\D\W", [r"\dd++", "\\d\\é+"], [r"\1d++", r"\d1++", r"\dd1+", r"\dd+é"]),
    ],
)
async def test_digits_and_letters_of_a_regex_are_those_of_ascii(
    compiler: Compiler, encode, source: str, good: list[str], bad: list[str]
) -> None:
    for text, fits in [*((t, True) for t in good), *((t, False) for t in bad)]:
        matcher = await compiler.matcher(regex(source))
        assert (matcher.advance(encode(text)) and matcher.advance([2])) is fits, text


async def test_forced_tokens_are_returned(compiler: Compiler, encode) -> None:
    matcher = await compiler.matcher(schema(PERSON), encode('{"'))
    forced = matcher.forced()
    assert len(forced) >= 3
    assert forced == encode('{"the first name')[1 : 1 + len(forced)]
    assert matcher.num_valid(forced) == len(forced)
    assert masks_of(Masks(VOCAB), [MaskRequest(matcher, forced)])[0][: len(forced)] == [
        [t] for t in forced
    ]


async def test_tokens_that_do_not_fit_are_refused(compiler: Compiler, encode) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await compiler.matcher(schema(PERSON), encode("Once upon a time"))
    assert caught.value.field == "tokens"
    assert not (await compiler.matcher(regex("a"))).advance(encode("b"))


async def test_a_limit_that_shows_only_with_the_tokens_is_the_constraints(
    compiler: Compiler, encode
) -> None:
    """A matcher that is rebuilt from the tokens reports the same limit."""
    with pytest.raises(InvalidRequest, match="too many") as caught:
        await compiler.matcher(regex("(a{0,99}){0,99}"), encode("a") * 200)
    assert caught.value.field == "constraint"


@pytest.mark.parametrize("seed", range(4))
async def test_masks_are_a_function_of_the_tokens(compiler: Compiler, encode, seed: int) -> None:
    """One by one, all at once, after wrong drafts, beside others: the masks are equal."""
    rng = random.Random(seed)
    grammars = [
        (schema(PERSON), TEXT),
        (regex(r"[a-z]{3,8}( [a-z]{1,9}){3}\."), "once upon a time."),
        (lark('start: "(" inner ")"\ninner: /[a-z]+/ | start inner?'), "((abc)def)"),
        (lark('start: "yes" | "no" | "n\\u00f6 \\ud83d\\ude00"'), "nö 😀"),
    ]
    masks = Masks(VOCAB)
    walked: list[tuple[Constraint, list[int], Matcher]] = []
    for constraint, text in grammars:
        matcher = await compiler.matcher(constraint)
        walked.append((constraint, encode(text), matcher))
    longest = max(len(tokens) for _, tokens, _ in walked)
    for at in range(longest):
        requests, allowed = [], []
        for constraint, tokens, matcher in walked:
            if at >= len(tokens):
                continue
            guess = tokens[at : at + rng.randrange(6)]
            if rng.random() < 0.5:
                guess = [*guess, rng.randrange(VOCAB)]
            guess = guess[: matcher.num_valid(guess)]
            requests.append(MaskRequest(matcher, guess))
            rows = []
            for length in range(len(guess) + 1):
                fresh = await compiler.matcher(constraint, [*tokens[:at], *guess[:length]])
                rows += masks_of(masks, [MaskRequest(fresh, [])])[0]
            allowed.append(rows)
        assert masks_of(masks, requests) == allowed
        for _, tokens, matcher in walked:
            if at < len(tokens):
                assert matcher.advance([tokens[at]])
    assert all(matcher.ended for _, _, matcher in walked)


REFUSED = [
    (Constraint(ConstraintKind.JSON_SCHEMA, '{"type":'), "not JSON"),
    (Constraint(ConstraintKind.JSON_SCHEMA, "NaN"), "not JSON"),
    (Constraint(ConstraintKind.JSON_SCHEMA, "[" * 5000 + "]" * 5000), "nested too deeply"),
    (Constraint(ConstraintKind.JSON_SCHEMA, '{}}, {"lark_grammar": "start: /x/"}'), "not JSON"),
    (schema(False), "Unsatisfiable"),
    (schema([1]), "object or boolean"),
    (schema({"type": "nope"}), "Invalid type"),
    (schema({"not": {"type": "string"}}), 'Unimplemented keys: ["not"]'),
    (schema({"$ref": "http://example.com/schema"}), "http://example.com/schema"),
    (schema({"type": "string", "pattern": "(?=a)b"}), "look-around"),
    (schema({"type": "string", "format": 5}), "Expected string for 'format'"),
    (schema({"type": "integer", "minimum": 5, "maximum": 3}), "minimum (5)"),
    (schema({"enum": ["x" * 100] * 11_000}), "expected at most"),
    (regex("("), "unclosed group"),
    (regex("a?" * 2000), "precomputation failed"),
    (lark("start: b"), 'unknown name: "b"'),
    (lark('x: "a"'), "no start rule"),
    (lark('{"grammars": [{"json_schema": {}}]}'), "expecting rule"),
    (lark("start: <|nothing|>"), "unknown special token"),
    # Compiles, but a step's mask would cost too much.
    (lark("start: " + " ".join(['("a"|"b"|/c+/)*'] * 1000)), "Too many items"),
]


@pytest.mark.parametrize(("constraint", "reason"), REFUSED, ids=[r for _, r in REFUSED])
async def test_what_cannot_be_used_is_refused_with_the_reason(
    compiler: Compiler, constraint: Constraint, reason: str
) -> None:
    for _ in range(2):  # the second time from the cache
        with pytest.raises(InvalidRequest) as caught:
            await compiler.matcher(constraint)
        assert caught.value.field == "constraint"
        assert reason in caught.value.description
        assert len(caught.value.description) < 400
        assert "\n" not in caught.value.description


async def test_concurrent_requests_compile_once(compiler: Compiler) -> None:
    before = compiler.cache.num_computed
    allowed = schema({"type": "object", "properties": {"once": {"type": "string"}}})
    matchers = await asyncio.gather(*(compiler.matcher(allowed) for _ in range(20)))
    assert len({id(m.library) for m in matchers}) == 20
    await compiler.matcher(allowed)
    assert compiler.cache.num_computed == before + 1
    compiler.forget(allowed)
    await compiler.matcher(allowed)
    assert compiler.cache.num_computed == before + 2


async def test_the_cache_key_includes_the_kind(compiler: Compiler) -> None:
    await compiler.matcher(regex("true"))
    await compiler.matcher(Constraint(ConstraintKind.JSON_SCHEMA, "true"))
    with pytest.raises(InvalidRequest):
        await compiler.matcher(lark("true"))


async def test_the_cache_is_bounded(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler_module, "_MAX_CACHED", 3)
    made = Compiler(vocabulary)
    try:
        for i in (0, 1, 2, 0, 3, 4):  # 0 is used again; 1 and 2 are evicted
            await made.matcher(regex(f"a{i}"))
        assert made.cache.num_computed == 5
        await made.matcher(regex("a0"))
        assert made.cache.num_computed == 5
        await made.matcher(regex("a1"))
        assert made.cache.num_computed == 6
        assert len(made.cache) == 3
        assert made.cache.costs[0] == sum(k.num_chars for k in made.cache._values.values())
    finally:
        made.close()


async def test_few_expensive_grammars_are_cached(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A regex of 30 characters makes a grammar of 30 MB."""
    monkeypatch.setattr(compiler_module, "_MAX_CACHED_CPU_S", 0.02)
    made = Compiler(vocabulary)
    try:
        for i in range(5):
            await made.matcher(regex(f"((((a{{10}}){{10}}){{10}}){{10}}){{10}}{i}"))
            assert len(made.cache) == 1
        for i in range(5):
            await made.matcher(regex(f"a{i}"))
        assert len(made.cache) >= 5
        assert made.cache.costs[1] <= 0.02
    finally:
        made.close()


async def test_an_unsupported_tokenizer_is_a_reason(tmp_path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    made = Compiler(Vocabulary(tmp_path, 10, (1,)))
    try:
        with pytest.raises(InvalidRequest, match="none is possible with this model's tokenizer"):
            await made.matcher(regex("a"))
    finally:
        made.close()
    checker = Checker(Vocabulary(tmp_path, 10, (1,)))
    try:
        for lenient in (False, True):
            found = await checker.compilable_schema('{"x-guidance": {}}', lenient)
            assert "none is possible" in found.reason
    finally:
        checker.close()


_DEEP = """
import asyncio, json, sys
from pathlib import Path
from engine.constraints import Checker, Compiler, Masks, Vocabulary
from engine.constraints.masks import MaskRequest
from engine.base.errors import InvalidRequest
from engine.base.types import Constraint, ConstraintKind

async def main(folder):
    made = Compiler(Vocabulary(Path(folder), 49152, (2,)))
    n = 30_000
    rules = "start: r0\\n" + "".join(f"r{i}: r{i + 1}\\n" for i in range(n)) + f'r{n}: "a"'
    terms = "start: T0\\n" + "".join(f"T{i}: T{i + 1}\\n" for i in range(n)) + f'T{n}: "a"'
    defs = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(2000)}
    refs = json.dumps({"$ref": "#/$defs/d0", "$defs": {**defs, "d2000": {"type": "string"}}})
    nested = "start: " + "(" * 100_000 + '"a"' + ")" * 100_000
    for kind, source in (("lark", rules), ("lark", terms), ("json_schema", refs), ("lark", nested)):
        try:
            matcher = await made.matcher(Constraint(ConstraintKind(kind), source))
        except InvalidRequest as error:
            print(error)
            continue
        masks = Masks(49152)
        masks.wait(masks.begin({1: MaskRequest(matcher, [])}))
        del matcher
    print("alive")

asyncio.run(main(sys.argv[1]))
"""


def test_nesting_of_thousands_does_not_crash(vocabulary: Vocabulary) -> None:
    """On a thread of the usual size each of the first three is a segmentation fault."""
    done = subprocess.run(
        [sys.executable, "-c", _DEEP, str(vocabulary.folder)],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "alive"
