"""The drafter that proposes nothing. The contract is `engine.scheduling.speculation.Drafter`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.scheduling.plan import PlannedRow
from engine.scheduling.speculation import NO_DRAFT, Draft, StepResult


class NoDrafter:
    """Proposes nothing: one token a step."""

    name = "none"
    has_kv = False
    acceptance: Sequence[float] = ()

    def propose(self, request_id: str, tokens: Sequence[int], max_tokens: int) -> Draft:
        """Nothing."""
        return NO_DRAFT

    def materialize(self, rows: Sequence[PlannedRow]) -> list[PlannedRow]:
        """The rows as they are: no draft of it is pending."""
        return list(rows)

    def observe(self, output: StepResult, rows: Sequence[PlannedRow]) -> Mapping[int, int]:
        """Nothing: it has no KV."""
        return {}

    def finish(self, request_id: str) -> None:
        """Nothing is held."""
