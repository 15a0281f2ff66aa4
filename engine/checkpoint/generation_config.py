"""The sampling that a model's generation_config.json recommends.

It is the default where a request is silent. A value that no request may have is refused at the
start, because it would otherwise change all outputs unnoticed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.base.errors import CheckpointError
from engine.checkpoint.jsonfile import read_json

FILE = "generation_config.json"
_DEFAULT_TEMPERATURE = 1.0  # of transformers, with do_sample
# Key -> lowest, highest; the lowest of a share of probability is excluded.
_RANGES = {
    "temperature": (0.0, math.inf),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-3, 1e3),
}
_ABOVE = ("top_p",)


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Values for fields that a request leaves unset; None: the protocol's own default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def values(self) -> dict[str, float]:
        """Those that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


NO_SAMPLING = SamplingDefaults()


def read_sampling(folder: Path) -> SamplingDefaults:
    """The sampling of a folder; a folder without the file has none.

    Raises CheckpointError naming the file and the key.
    """
    path = folder / FILE
    config = read_json(path) if path.exists() else {}
    numbers = {key: _number(path, key, config.get(key)) for key in _RANGES}
    samples = config.get("do_sample")
    if samples is not None and not isinstance(samples, bool):
        raise _refusal(path, "do_sample", samples, "true or false")
    if samples is False:
        numbers["temperature"] = 0.0
    elif samples and numbers["temperature"] is None:
        numbers["temperature"] = _DEFAULT_TEMPERATURE
    return SamplingDefaults(top_k=_top_k(path, config.get("top_k")), **numbers)


def _number(path: Path, key: str, value: Any) -> float | None:
    if value is None:
        return None
    low, high = _RANGES[key]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_above = key in _ABOVE
    if is_number and low <= value <= high and value < math.inf and (value > low or not is_above):
        return float(value)
    lowest = "above" if is_above else "from"
    upto = "" if high == math.inf else f" to {high:g}"
    raise _refusal(path, key, value, f"a number {lowest} {low:g}{upto}")


def _top_k(path: Path, value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and -1 <= value < 2**31:
        return max(0, value)  # 0 and -1: off
    raise _refusal(path, "top_k", value, "a whole number")


def _refusal(path: Path, key: str, value: Any, expected: str) -> CheckpointError:
    what = f"{path}: {key} is {str(value)[:40]}; expected {expected}"
    return CheckpointError(f"{what}, or --generation-config diptych, which does not read it")
