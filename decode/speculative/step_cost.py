"""What a step costs by the number of its rows, learned from the steps that were made.

    log seconds(rows) = level + shape(rows)

A Kalman filter estimates the level, and the shape at some sizes. The level may move at every step:
it is what slows all steps alike (longer contexts, another process on the cores), so that two sizes
seen at different times can be compared. The shape returns to its prior over some thousand steps:
rows are nearly free, and if not, the whole line is steeper. So a longer step is tried early, its
cost teaches all sizes, and after a long time it is tried again. Only the shape matters to a choice.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

CHEAP_ROW = 0.03  # prior cost of a row, of a step of one row
COSTLY_ROW = (
    0.2  # the same if rows are expensive; the line's steepness between the two is one unknown
)
_DENSE = 8  # sizes up to it are all there, above it three an octave
_OCTAVES = 10
_STEEPNESS = 1.5  # prior standard deviations: of the line, from cheap (0) to costly (1)
_BEND = 0.15  # of the shape beside the line, in logs
_REACH = 4.0  # sizes over which a bend extends
_NOISE = 0.08  # of one step, to begin with; then as measured, within these bounds
_NOISE_BOUNDS = (0.05, 0.6)
_NOISE_RATE = 0.02
_DRIFT = 0.06  # of the level, a step
_MEMORY = 3000.0  # steps until the shape is half forgotten, roughly
_OUTLIER = 3.0  # standard deviations that one step may surprise by
_EVERY = 16  # steps from one `_forget` to the next

_SIZES: Floats = np.array(
    [*range(1, _DENSE + 1), *(_DENSE * 2 ** (i / 3) for i in range(1, 3 * _OCTAVES + 1))]
)
_NUM = len(_SIZES)


def _prior() -> tuple[Floats, Floats]:
    """Mean [1 + sizes] and covariance of (level, shape), the level unknown."""
    cheap, costly = np.log1p(CHEAP_ROW * (_SIZES - 1)), np.log1p(COSTLY_ROW * (_SIZES - 1))
    line = _STEEPNESS * (costly - cheap)
    apart = np.abs(np.subtract.outer(np.arange(_NUM), np.arange(_NUM)))
    covariance = np.zeros((1 + _NUM, 1 + _NUM))
    covariance[1:, 1:] = np.outer(line, line) + _BEND**2 * np.exp(-apart / _REACH)
    return np.concatenate([[0.0], cheap]), covariance


_MEAN, _COVARIANCE = _prior()


class StepCost:
    """Owned by one draft length controller."""

    def __init__(self) -> None:
        self.most_rows = 0  # of the steps seen so far
        self._mean = _MEAN.copy()
        self._covariance = _COVARIANCE.copy()
        self._covariance[0, 0] = 100.0
        self._noise = _NOISE**2
        self._num_steps = 0

    def observe(self, num_rows: int, seconds: float) -> None:
        """A step of `num_rows` rows took so long."""
        if num_rows < 1 or not seconds > 0.0:
            return
        self._num_steps += 1
        self.most_rows = max(self.most_rows, num_rows)
        if self._num_steps % _EVERY == 0:
            self._forget()
        mean, covariance = self._mean, self._covariance
        covariance[0, 0] += _DRIFT**2
        at, part = _place(num_rows)
        cross = covariance[0] + covariance[at]
        if part:
            cross += part * (covariance[at + 1] - covariance[at])
        spread = float(cross[0] + (1 - part) * cross[at] + part * cross[at + 1]) + self._noise
        guess = float(mean[0] + (1 - part) * mean[at] + part * mean[at + 1])
        limit = _OUTLIER * math.sqrt(spread)
        surprise = min(max(math.log(seconds) - guess, -limit), limit)
        mean += cross * (surprise / spread)
        covariance -= cross[:, None] * (cross / spread)
        least, most = _NOISE_BOUNDS
        noise = self._noise + _NOISE_RATE * (surprise**2 - spread)
        self._noise = min(max(noise, least**2), most**2)

    @property
    def unit_s(self) -> float:
        """Seconds that one unit of `relative` stands for now; 0 before anything was seen."""
        return math.exp(self._mean[0]) if self._num_steps else 0.0

    def relative(self, num_rows: int, num_more: int) -> Floats:
        """Cost of `num_rows`, `num_rows` + 1, ... `num_rows` + `num_more` rows, in any unit."""
        cost = np.exp(self._mean[1:])
        # More rows never cost less: the mean of the two tightest monotone bounds.
        above = np.maximum.accumulate(cost)
        below = np.minimum.accumulate(cost[::-1])[::-1]
        rows = np.arange(num_rows, num_rows + num_more + 1)
        out: Floats = np.interp(rows, _SIZES, (above + below) / 2)
        return out

    def _forget(self) -> None:
        """Let the shape return towards the prior by `_EVERY` steps' worth."""
        keep = math.exp(-_EVERY / _MEMORY)
        self._mean[1:] += (1 - keep) * (_MEAN[1:] - self._mean[1:])
        self._covariance[1:] *= keep
        self._covariance[:, 1:] *= keep
        self._covariance += (1 - keep**2) * _COVARIANCE


def _place(num_rows: int) -> tuple[int, float]:
    """(i, part): the size lies at (1 - part) of the state's i-th entry and `part` of the next."""
    if num_rows < _DENSE:
        return num_rows, 0.0
    octaves = min(3 * math.log2(num_rows / _DENSE), 3 * _OCTAVES - 1e-9)
    return _DENSE + int(octaves), octaves - int(octaves)
