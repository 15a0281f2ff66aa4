"""Constrained answers in the step loop: their masks, and which of them stay out of a step.

    look: beside the end of a step      held: which are not ready      begin ... wait: drafts' masks

A step waits LATE_S for a mask, not longer: an answer whose mask is late stays where it was, and the
others go on. What answers hold the engine up for, to take their tokens, is bounded over all of them
too: dear ones take turns. An answer beyond its own budget ends, see constraints/matcher.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from engine.constraints import Masks
from engine.constraints.masks import Batch, MaskRequest
from engine.constraints.matcher import Rows
from engine.scheduling.plan import PlannedRow
from engine.scheduling.request import Request, State
from engine.telemetry.metrics import WorkerMetrics

LATE_S = 0.01
# What all answers of a step may hold it up for; one that takes longer goes alone.
_DEAR_S = 0.005
_IDLE_S = 0.002  # messages wait that long


class ConstrainedAnswers:
    """Owned by the engine thread."""

    def __init__(self, vocab_size: int, metrics: WorkerMetrics) -> None:
        self._vocab_size = vocab_size
        self._metrics = metrics
        self._masks: Masks | None = None  # made for the first of them
        self._looks: list[Batch] = []
        self._drafts = Batch([])

    def look(self, active: Iterable[Request]) -> None:
        """Have the next masks computed, where they are not there or under way."""
        places = {
            request.key: MaskRequest(matcher, ())
            for request in active
            if (matcher := request.work.matcher) is not None
            and request.state is State.RUNNING
            and matcher.mask is None
            and not matcher.busy
        }
        if places:
            self._masks = self._masks or Masks(self._vocab_size)
            self._looks.append(self._masks.begin(places))

    def settle(self) -> None:
        """Wait for those masks, as long as a step may."""
        if self._masks is not None:
            for batch in self._looks:
                self._masks.wait(batch, LATE_S)
            self._looks = []
            self._masks.replace_slow_threads()

    def held(self, active: Iterable[Request]) -> set[int]:
        """Keys of the answers that could go on, and stay out of the next step."""
        matchers = {
            request.key: matcher
            for request in active
            if (matcher := request.work.matcher) is not None and request.state is State.RUNNING
        }
        late = {key for key, matcher in matchers.items() if not matcher.is_ready}
        if late:
            self._metrics.constraint_masks_late.inc(len(late))
        waited = sorted(matchers.keys() - late, key=lambda key: -matchers[key].num_steps_skipped)
        held, left_s = set(late), _DEAR_S
        for key in waited:
            matcher = matchers[key]
            if matcher.advance_cost_s > left_s and left_s < _DEAR_S:
                held.add(key)
                matcher.num_steps_skipped += 1
            else:
                left_s -= matcher.advance_cost_s
                matcher.num_steps_skipped = 0
        return held

    def wait_for_late(self) -> None:
        """For a step that has nothing else to do."""
        if self._masks is not None:
            self._masks.wait_for_late(_IDLE_S)

    def begin(self, plan: Sequence[PlannedRow]) -> None:
        """Have the masks of drafts computed while the model computes."""
        places = {
            planned.request.key: MaskRequest(planned.request.work.matcher, planned.draft)
            for planned in plan
            if planned.request.work.matcher is not None and planned.draft
        }
        self._drafts = self._masks.begin(places) if places and self._masks else Batch([])

    def wait(self, plan: Sequence[PlannedRow]) -> tuple[Mapping[int, Rows], set[int]]:
        """(masks by request key of the rows that may give tokens, keys of the late ones)."""
        found = self._masks.wait(self._drafts, LATE_S) if self._masks else {}
        rows: dict[int, Rows] = {}
        late: set[int] = set()
        for planned in plan:
            matcher = planned.request.work.matcher
            if matcher is None or not planned.num_sampled:
                continue
            key = planned.request.key
            mask = found.get(key) if planned.draft else matcher.mask
            if mask is None or not matcher.is_ready:
                late.add(key)
                matcher.draft_was_late = True
            else:
                rows[key] = mask
        if late:
            self._metrics.constraint_masks_late.inc(len(late))
        return rows, late
