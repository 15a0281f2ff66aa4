"""What is asked, and what the undisturbed answer is.

    got == record ----> equal
    got != record ----> Differs; before the next try a whole cluster answers all requests
                          its answer == record: the failure stands
                          another one:          records are of another machine, and are replaced

Scenarios ask whether a fault changes answers, other tests whether they are right. So records are
the answers of a cluster in which nothing was broken, in tests/data/answers (`--record-answers`). A
request without a record is asked at the start. With our kernels a comparison is of bits. In float32
on torch a difference is held against law 1's near-ties, by a plain loop in this process.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from coordinator.client import AsyncClient, Done, TextDelta
from tests.support.cluster import NATIVE
from tests.support.greedy import GREEDY
from tests.support.recorded import FOLDER, digest, read_records, write_records

_TEXTS = [case["prompt"] for case in GREEDY]
_RECORDS = FOLDER / "faults.json"
_ASKED_AT_ONCE = 6
_SCHEMA = {
    "type": "object",
    "properties": {
        "kind_of_thing": {"enum": ["a person", "a place", "something else"]},
        "description": {"type": "string", "minLength": 40, "maxLength": 80},
        "how_many_there_are": {"type": "integer", "minimum": 0, "maximum": 9999},
        "words": {
            "type": "array",
            "items": {"type": "string", "minLength": 3, "maxLength": 12},
            "minItems": 6,
            "maxItems": 6,
        },
    },
    "required": ["kind_of_thing", "description", "how_many_there_are", "words"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},  # a small model would fill pages with it
}
_FORMS: dict[str, dict[str, Any]] = {
    "json": {"json_schema": json.dumps(_SCHEMA)},
    "regex": {"regex": r"([a-z]{3,6} ){25}and that was (it|all)\."},
}


@dataclass(frozen=True, slots=True)
class Case:
    """One request, but for what does not change its answer."""

    name: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Mapping[str, Any] = field(default_factory=dict)
    num_choices: int = 1
    constraint: Mapping[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """As the client library takes them. What is not held to anything has always the full
        length, so that a scenario can time it.
        """
        ends = {} if self.constraint else {"ignore_eos": True}
        choices = {"n": self.num_choices} if self.num_choices > 1 else {}
        given = {**self.sampling, **choices, **self.constraint}
        return {"max_tokens": self.max_tokens, **ends, **given}

    @property
    def key(self) -> str:
        """Of all that decides the answer."""
        return digest([self.prompt, sorted(self.options.items()), NATIVE])


def _text(length: int, start: int = 0) -> tuple[int, ...]:
    """So many tokens of the first text that has them."""
    return tuple(next(t for t in _TEXTS if len(t) >= start + length)[start : start + length])


def _sampled(seed: int) -> dict[str, Any]:
    return {"temperature": 0.8, "top_p": 0.95, "seed": seed}


def _cases() -> dict[str, Case]:
    """By name. A salt makes any of them a new prompt to the prefix caches."""
    found: list[Case] = []
    found.append(Case("long-0", _text(832), 64))
    found.append(Case("long-1-sampled", _text(832, 600), 64, _sampled(2)))
    found.append(Case("long-2", _text(500, 100), 24))
    found.append(Case("long-2-sampled", _text(500, 100), 24, _sampled(3)))
    shorts = [(100, 0, 120), (129, 200, 120), (64, 400, 160)]  # length, start, tokens to write
    for i, (length, start, tokens) in enumerate(shorts):
        found.append(Case(f"short-{i}", _text(length, start), tokens))
        found.append(Case(f"short-{i}-sampled", _text(length, start), tokens, _sampled(i + 10)))
    # Around the borders of a block; all begin as long-0 does.
    for length in (1, 15, 16, 17, 32, 33, 512, 513):
        found.append(Case(f"edge-{length}", _text(832)[:length], 8))
    # Held to a form which takes 60 tokens and more, part of it without a choice (jump-ahead).
    found.append(Case("json-0", _text(90, 20), 260, {}, 1, _FORMS["json"]))
    for name, form in _FORMS.items():
        found.append(Case(f"{name}-0-sampled", _text(90, 20), 260, _sampled(31), 1, form))
    # Several choices of one prompt, each with a seed of its own.
    found.append(Case("four-0-sampled", _text(100, 60), 80, _sampled(41), 4))
    found.append(Case("three-long-sampled", _text(500, 30), 40, _sampled(42), 3))
    found.append(Case("two-json-sampled", _text(70, 90), 260, _sampled(43), 2, _FORMS["json"]))
    for i in range(4):  # cheap background load
        found.append(Case(f"load-{i}", _text(40 + 16 * i, 300), 24, _sampled(i) if i % 2 else {}))
    return {case.name: case for case in found}


CASES = _cases()


@dataclass(slots=True)
class Choice:
    """One of an answer's choices."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""


@dataclass(frozen=True, slots=True)
class Pace:
    """What four long prompts take on a cluster that lost a prefill worker just before they came."""

    first_token_s: float  # the slowest
    cluster: Path  # its folder
    measured_s: float  # monotonic

    def holds(self, cluster: Path) -> bool:
        """Others use the machine too: in a few minutes it is another one."""
        return cluster == self.cluster and time.monotonic() - self.measured_s < 240.0


class Differs(AssertionError):
    """Tokens differ from a recorded answer."""


class Oracle:
    """The undisturbed answers, by case."""

    def __init__(
        self, answers: Mapping[str, Sequence[Choice]], recorded: Iterable[str] = ()
    ) -> None:
        """`recorded` are the names of those that are of an earlier run."""
        self._answers = dict(answers)
        self._recorded = set(recorded)
        self._doubt: tuple[str, str] | None = None  # a case whose record differs, and how
        self.pace: Pace | None = None  # measured by the first scenario, in full anew now and then
        self.num_compared = 0
        self.num_tokens = 0

    @classmethod
    def ask(cls, address: str) -> Oracle:
        """Have a healthy cluster answer all of them."""
        return cls(asyncio.run(_ask_all(address, list(CASES.values()))))

    @classmethod
    def load(cls, address: str) -> Oracle:
        """Recorded answers; a healthy cluster answers what has no record."""
        records = read_records(_RECORDS)
        known = {
            name: [Choice(**fields) for fields in records[case.key]]
            for name, case in CASES.items()
            if case.key in records
        }
        unknown = [case for name, case in CASES.items() if name not in known]
        return cls({**known, **asyncio.run(_ask_all(address, unknown))}, known)

    def record(self) -> None:
        """Write the answers as records."""
        write_records(
            _RECORDS, {CASES[n].key: [asdict(c) for c in a] for n, a in self._answers.items()}
        )

    def failure(self, case: Case, message: str) -> AssertionError:
        """What to raise where an answer is another one: Differs where a record may be the cause."""
        if case.name not in self._recorded:
            return AssertionError(message)
        self._doubt = (case.name, message)
        return Differs(message)

    def confirm(self, address: str) -> str:
        """After a difference from a record have a healthy cluster answer all. Raises AssertionError
        where that record was right; else returns what changed ("" without a difference).
        """
        if self._doubt is None:
            return ""
        (name, message), self._doubt = self._doubt, None
        live = Oracle.ask(address)._answers
        other = [name for name, answer in live.items() if answer != self._answers[name]]
        assert name in other, f"{message}; a cluster without a fault gives the recorded answer"
        self._answers, self._recorded = live, set()
        return f"recorded answers are of another machine: {', '.join(other)}"

    def answer(self, case: Case, choice: int = 0) -> list[int]:
        """All its tokens."""
        return list(self._answers[case.name][choice].tokens)

    def text(self, case: Case, choice: int = 0) -> str:
        """What they say."""
        return self._answers[case.name][choice].text

    def difference(self, case: Case, choice: int, got: Sequence[int], first: int = 0) -> str:
        """What is wrong with `got`, tokens of a choice from index `first` on; "" if nothing is."""
        whole = self.answer(case, choice)
        wanted = whole[first : first + len(got)]
        self.num_compared += 1
        self.num_tokens += len(got)
        if wanted == list(got):
            return ""
        at = next((i for i, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b), -1)
        if not NATIVE and self._excused(case, [*whole[:first], *got]):
            return ""
        name = f"{case.name}, choice {choice}"
        if at < 0:
            return f"{name}: {len(got)} tokens from {first} on, there are only {len(wanted)}"
        return (
            f"{name}: token {first + at} is {got[at]}, undisturbed {wanted[at]}"
            f" (of {len(got)} from {first} on)"
        )

    def _excused(self, case: Case, got: list[int]) -> bool:
        if case.num_choices > 1 or case.constraint:
            return False
        verdict = self._loop.judge(_work(case), self.answer(case)[: len(got)], got)
        return bool(verdict.ok)

    @cached_property
    def _loop(self) -> Any:
        import torch

        from engine.checkpoint.source import resolve, weights
        from engine.runner.loader import load_model
        from tests.support.paged import CPU
        from tests.support.plain_loop import PlainLoop

        checkpoint = resolve("smollm2")
        shards = weights(checkpoint, "float32")
        return PlainLoop(load_model(checkpoint.config, shards, torch.float32, CPU))


def _work(case: Case) -> Any:
    from engine.base.kv_layout import hash_salt
    from engine.base.types import SamplingParams, StopParams
    from engine.scheduling.request import EngineRequest

    sampling = SamplingParams(**case.sampling)
    stop = StopParams(max_tokens=case.max_tokens)
    return EngineRequest(case.name, case.prompt, hash_salt(digest="x"), sampling, stop)


async def _ask_all(address: str, cases: Sequence[Case]) -> dict[str, list[Choice]]:
    gate = asyncio.Semaphore(_ASKED_AT_ONCE)

    async def ask(client: AsyncClient, case: Case) -> list[Choice]:
        choices = [Choice() for _ in range(case.num_choices)]
        async with gate:
            async for event in client.generate(case.prompt, timeout_s=120, **case.options):
                if isinstance(event, TextDelta):
                    choices[event.index].tokens += event.token_ids
                    choices[event.index].text += event.text
                elif isinstance(event, Done) and case.constraint:
                    assert event.finish_reason == "stop", f"{case.name} has no end"
        for choice in choices:
            num = len(choice.tokens)
            assert case.constraint or num == case.max_tokens, f"{case.name}: {num}"
        return choices

    async with AsyncClient(address) as client:
        answers = await asyncio.gather(*(ask(client, case) for case in cases))
    return {case.name: choices for case, choices in zip(cases, answers, strict=True)}
