"""Counts, as tables; and what is wrong."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from tests.ecosystem.conformance.answers import Answer
from tests.ecosystem.conformance.offline import Grammar

# The first that is found in a reason names its kind.
_KINDS = {
    r"oneOf constraints": "`oneOf` whose branches are not told apart",
    r"Unknown format": "a format that is not known",
    r"Resource .* is not present|Invalid URI": "a document that is not at hand",
    r"regex parse error|look-?around|not disjoint": "a pattern that is not supported",
    r"to choose from": "too large, or circular",
    r"minProperties|min/maxProperties": "a count of members",
    r"Unsatisfiable|schema is false": "nothing is valid",
    r"too many digits|cannot be written|too large: ": "a constant or bound that cannot be held",
    r"too large|at most|level exceeded|longer than|fuel|circular": "too large, or circular",
    r"must be an object": "no schema",
}


@dataclass
class Results:
    """Of one source."""

    grammars: list[Grammar]
    answers: list[Answer] = field(default_factory=list)


def kind(reason: str) -> str:
    """What sort of reason for a refusal it is."""
    if found := re.search(r"Unimplemented keys: \[(.*?)\]", reason):
        keys = found[1].replace('"', "").split(", ")
        return f"`{keys[0]}`" if len(keys) == 1 else "several: `" + "`, `".join(keys) + "`"
    for pattern, name in _KINDS.items():
        if re.search(pattern, reason):
            return name
    return f"other: {reason[:60]}"


def share(part: int, whole: int) -> str:
    """As a person reads it."""
    return f"{part} of {whole}" + (f" ({100 * part / whole:.1f} %)" if whole else "")


def offline_table(name: str, grammars: Sequence[Grammar]) -> str:
    """What grammars do without a model."""
    compiled = [g for g in grammars if not g.refused]
    lines = [
        f"## {name}: grammars",
        f"compiled: {share(len(compiled), len(grammars))}",
        *_counts("refused", Counter(kind(g.refused) for g in grammars if g.refused)),
    ]
    taken = [row for g in compiled for row in g.taken]
    if taken:
        valid = [fits for is_valid, fits, _ in taken if is_valid]
        invalid = [not fits for is_valid, fits, _ in taken if not is_valid]
        lines += [
            f"valid instances taken: {share(sum(valid), len(valid))}",
            *_counts("not taken", Counter(why for _, _, why in taken if why)),
            f"invalid instances not taken: {share(sum(invalid), len(invalid))}",
        ]
    drawn, wrong = sum(g.num_drawn for g in compiled), sum(len(g.wrong) for g in compiled)
    lines += [
        f"texts drawn: {drawn}, cut off: {sum(g.num_cut for g in compiled)}, not valid: {wrong}",
        *_counts("not checked", Counter(g.not_checked for g in compiled if g.not_checked)),
    ]
    return "\n".join(lines)


def answers_table(name: str, answers: Sequence[Answer]) -> str:
    """What came of the requests."""
    cases = {a.case for a in answers}
    served = {a.case for a in answers if a.outcome in ("finished", "cut")}
    ended = {a.case for a in answers if a.outcome == "finished"}
    refused = {a.case: a.reason for a in answers if a.outcome == "refused"}
    finished = [a for a in answers if a.outcome == "finished"]
    checked = [a for a in finished if not a.not_checked]
    num_valid = sum(not a.fault for a in checked)
    num_strict = sum(not a.format_fault for a in checked)
    lines = [
        f"## {name}: answers",
        f"schemas asked: {len(cases)}, served: {share(len(served), len(cases))}, "
        f"with a finished answer: {len(ended)}",
        *_counts("refused", Counter(map(kind, refused.values()))),
        *_counts("requests", Counter(f"{a.way}: {a.outcome}" for a in answers)),
        f"finished answers that are valid: {share(num_valid, len(checked))}",
        f"and with formats checked: {share(num_strict, len(checked))}",
        *_counts("not checked", Counter(a.not_checked for a in finished if a.not_checked)),
        *_counts("failed", Counter(a.reason for a in answers if a.outcome == "failed")),
    ]
    return "\n".join(lines)


def problems(results: Results) -> Iterator[str]:
    """One line for each thing that should not be."""
    refused = {g.name: g.refused for g in results.grammars}
    for grammar in results.grammars:
        yield from (f"DRAWN {grammar.name}: {wrong}" for wrong in grammar.wrong)
        if any(fits and not valid for valid, fits, _ in grammar.taken):
            yield f"TAKEN {grammar.name}: an instance that is not valid"
    for answer in results.answers:
        if answer.fault:
            yield f"NOT VALID {answer.case}: {answer.text}: {answer.fault}"
        if answer.outcome == "failed":
            yield f"FAILED {answer.case}: {answer.reason}: {answer.text}"
        if answer.outcome != "failed" and (answer.outcome == "refused") != bool(
            refused.get(answer.case)
        ):
            yield f"DIFFERS {answer.case}: {answer.outcome}, but offline: {refused[answer.case]!r}"


def _counts(what: str, counter: Counter[str]) -> Iterable[str]:
    return [f"  {what}: {count:4d}  {name}" for name, count in counter.most_common()]
