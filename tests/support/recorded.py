"""Answers of an oracle as data, computed anew only where a record is missing or differs.

    got == record ----------------------> equal, and no model is loaded
    got != record, or there is none ----> the oracle answers, and its answer is the judge's measure

An oracle of the default model takes minutes on two cores. Records are made by the same oracle
(`pytest --record-answers`), one file in tests/data/answers for each set of requests. A record is
found by a digest of the request, so that a changed request has none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.base.types import FinishReason
from engine.scheduling.request import EngineRequest
from tests.support.near_tie import TALLY, Outcome, Tally, Verdict
from tests.support.paths import DATA
from tests.support.plain_loop import PlainLoop

FOLDER = DATA / "answers"


@dataclass(frozen=True, slots=True)
class Answer:
    """All tokens of an answer, and why it ended."""

    tokens: tuple[int, ...]
    reason: FinishReason


class RecordedAnswers:
    """The oracle's answers to a set of requests."""

    def __init__(
        self,
        name: str,
        oracle: Callable[[], PlainLoop],
        folder: Path = FOLDER,
        tally: Tally = TALLY,
    ) -> None:
        """`oracle` loads the model; it is called at the first answer that differs, or never."""
        self._path = folder / f"{name}.json"
        self._load_oracle = oracle
        self._tally = tally

    def judge(
        self, work: EngineRequest, tokens: Sequence[int], reason: FinishReason | None
    ) -> Verdict:
        """Law 1 for one answer; `reason` is None where its caller cancelled it.

        A near-tie is excused only by the oracle, for it needs the logits.
        """
        record = self._records.get(_key(work))
        if record is not None and _equal(record, tokens, reason):
            self._tally.num_answers += 1
            self._tally.num_tokens += len(tokens)
            return Verdict(Outcome.EQUAL)
        ((all_tokens, end),) = self._oracle.answers([work])
        expected = all_tokens if reason is not None else all_tokens[: len(tokens)]
        verdict = self._oracle.judge(work, expected, tokens)
        if verdict.ok and verdict.at is None and reason not in (None, end):
            detail = f"{work.request_id}: ended by {reason}, the oracle by {end}"
            return Verdict(Outcome.DIFFERENT, len(tokens), detail)
        return verdict

    def record(self, works: Sequence[EngineRequest], group: int = 16) -> None:
        """Have the oracle answer all of them, and write the file."""
        answers = self._oracle.answers(works, group)
        records = {
            _key(work): {"tokens": tokens, "reason": reason.value}
            for work, (tokens, reason) in zip(works, answers, strict=True)
        }
        write_records(self._path, records)
        self.__dict__.pop("_records", None)

    @cached_property
    def _oracle(self) -> PlainLoop:
        return self._load_oracle()

    @cached_property
    def _records(self) -> dict[str, Answer]:
        return {
            key: Answer(tuple(fields["tokens"]), FinishReason(fields["reason"]))
            for key, fields in read_records(self._path).items()
        }


def _equal(record: Answer, tokens: Sequence[int], reason: FinishReason | None) -> bool:
    if reason is None:
        return record.tokens[: len(tokens)] == tuple(tokens)
    return record.tokens == tuple(tokens) and record.reason is reason


def _key(work: EngineRequest) -> str:
    """A digest of all that decides an answer."""
    s, stop = work.sampling, work.stop
    assert s
    assert stop
    fields = [
        *(work.prompt, work.output, s.temperature, s.top_p, s.top_k, s.min_p),
        *(s.frequency_penalty, s.presence_penalty, s.repetition_penalty, s.seed, s.logit_bias),
        *(stop.max_tokens, stop.min_tokens, sorted(stop.stop_token_ids)),
    ]
    return digest(fields)


def read_records(path: Path) -> dict[str, Any]:
    """All records of a file by their digests; none where there is no file."""
    records: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return records


def write_records(path: Path, records: Mapping[str, Any]) -> None:
    """Write a file, one line for each record."""
    lines = ",\n".join(f'"{key}": {json.dumps(value)}' for key, value in records.items())
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{{\n{lines}\n}}\n")


def digest(fields: Any) -> str:
    """Of a JSON value."""
    return hashlib.blake2b(json.dumps(fields).encode(), digest_size=12).hexdigest()
