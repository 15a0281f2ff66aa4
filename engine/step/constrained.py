"""Constrained answers in the step loop: their masks, and which of them stay out of a step.

    look             after a step: start the masks of the next
    held             before a step: the answers that are not ready
    begin ... wait   around the forward pass: the masks of drafts

A step waits at most LATE_S for a mask: an answer whose mask is late keeps its position, and the
others go on. The time that a step spends on letting matchers take tokens is bounded over all
answers: slow ones take turns. An answer beyond its own budget ends, see constraints/matcher.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from engine.base.errors import InvalidRequest
from engine.base.types import FinishReason
from engine.constraints import Masks, Matcher
from engine.constraints.masks import Batch, MaskRequest
from engine.constraints.matcher import Rows
from engine.scheduling.plan import PlannedRow
from engine.scheduling.request import Request, State
from engine.step.lifecycle import Lifecycle
from engine.telemetry.log import get_logger
from engine.telemetry.metrics import WorkerMetrics

_log = get_logger(__name__)

LATE_S = 0.01
# Time of one step for the matchers of all answers; one that takes longer has a step of its own.
_SLOW_S = 0.005
_IDLE_S = 0.002  # a message waits at most that long


class ConstrainedAnswers:
    """Owned by the engine thread."""

    def __init__(self, vocab_size: int, metrics: WorkerMetrics, lifecycle: Lifecycle) -> None:
        self._vocab_size = vocab_size
        self._metrics = metrics
        self._lifecycle = lifecycle
        self._masks: Masks | None = None  # made for the first of them
        self._looks: list[Batch] = []
        self._drafts: Batch = []
        self._has_any = False  # in the step under way

    def look(self, active: Iterable[Request]) -> None:
        """Start to compute the next masks that are neither there nor under way."""
        if not self._has_any:
            return
        places = {
            request.key: MaskRequest(matcher, ())
            for request, matcher in _running(active)
            if matcher.mask is None and not matcher.busy
        }
        if places:
            self._masks = self._masks or Masks(self._vocab_size)
            self._looks.append(self._masks.begin(places))

    def held(self, active: Iterable[Request]) -> set[int]:
        """Keys of the answers that could go on, and stay out of the next step.

        Waits for their masks, as long as a step may, and ends the answers whose constraint failed.
        """
        constrained = [request for request in active if request.work.matcher is not None]
        self._has_any = bool(constrained or self._looks)
        if not self._has_any:
            return set()
        self.look(constrained)
        if self._masks is not None:
            for batch in self._looks:
                self._masks.wait(batch, LATE_S)
            self._looks = []
            self._masks.replace_slow_threads()
        for request in constrained:
            self.end_if_failed(request)
        matchers = {request.key: matcher for request, matcher in _running(constrained)}
        late = {key for key, matcher in matchers.items() if not matcher.is_ready}
        if late:
            self._metrics.constraint_masks_late.inc(len(late))
        return late | self._too_slow({k: m for k, m in matchers.items() if k not in late})

    @staticmethod
    def _too_slow(matchers: Mapping[int, Matcher]) -> set[int]:
        """Keys of those that do not fit in this step's time; they come first in a later one."""
        held, left_s = set(), _SLOW_S
        for key in sorted(matchers, key=lambda key: -matchers[key].num_steps_skipped):
            matcher = matchers[key]
            if matcher.advance_cost_s > left_s and left_s < _SLOW_S:
                held.add(key)
                matcher.num_steps_skipped += 1
            else:
                left_s -= matcher.advance_cost_s
                matcher.num_steps_skipped = 0
        return held

    def end_if_failed(self, request: Request) -> None:
        """End a request whose constraint is of no more use."""
        matcher = request.work.matcher
        if matcher is None or matcher.busy or not (reason := matcher.error):
            return
        if matcher.is_too_costly:
            self._metrics.constraints_too_costly.inc()
        _log.warning("constraint failed", request_id=request.work.request_id, reason=reason)
        error = InvalidRequest("constraint", reason)
        self._lifecycle.finish(request, FinishReason.ABORTED, error)

    def wait_for_late(self) -> None:
        """For a step that has nothing else to do."""
        if self._masks is not None:
            self._masks.wait_for_late(_IDLE_S)

    def begin(self, plan: Sequence[PlannedRow]) -> None:
        """Have the masks of drafts computed while the model computes."""
        self._drafts = []
        if self._masks is None or not self._has_any:
            return
        places = {
            planned.request.key: MaskRequest(planned.request.work.matcher, planned.draft)
            for planned in plan
            if planned.request.work.matcher is not None and planned.draft
        }
        if places:
            self._drafts = self._masks.begin(places)

    def wait(self, plan: Sequence[PlannedRow]) -> tuple[Mapping[int, Rows], set[int]]:
        """(masks by request key of the rows that may give tokens, keys of the late ones)."""
        rows: dict[int, Rows] = {}
        late: set[int] = set()
        if not self._has_any:
            return rows, late
        found = self._masks.wait(self._drafts, LATE_S) if self._masks else {}
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


def _running(active: Iterable[Request]) -> Iterator[tuple[Request, Matcher]]:
    """The constrained answers among them that are written."""
    for request in active:
        matcher = request.work.matcher
        if matcher is not None and request.state is State.RUNNING:
            yield request, matcher
