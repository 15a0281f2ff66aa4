"""The fence under a race: blocks are overwritten with poison while they are read, over real NIXL
between two processes.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest

from kvtransfer.fence import Fence
from tests.faults.scenario import NOTES
from tests.support.paths import ROOT

pytestmark = pytest.mark.timeout(1800)
_FOLDER = ROOT / "tests" / "system"


def _race() -> ModuleType:
    """The race of the transfer tests; its writer process finds its helper by the path."""
    sys.path.insert(0, str(_FOLDER))
    spec = importlib.util.spec_from_file_location("fence_race", _FOLDER / "test_kvtransfer.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["fence_race"] = module
    spec.loader.exec_module(module)
    return module


def test_poison_under_reads_in_flight(full: bool) -> None:
    """Leases mean nothing here: the owner reuses the block whenever it likes, its generation
    first. Every try that tore is refused, every one that passed has exactly the old bytes.
    """
    tries = 10_000 if full else 200  # and 1,000 in tests/system/test_kvtransfer.py
    outcome = _race().race(fence=Fence(), min_tries=tries, share=0.2, limit_s=1500 if full else 60)
    torn, clean = outcome.num_torn / outcome.num_tries, outcome.num_clean / outcome.num_tries
    NOTES.setdefault("poison_under_reads_in_flight", []).append(
        f"{outcome.num_tries} tries, torn {torn:.0%}, passed {clean:.0%},"
        f" poison passed {outcome.num_poisoned}"
    )
    assert outcome.num_tries >= tries
    assert outcome.num_torn >= 0.2 * outcome.num_tries
    assert outcome.num_clean >= 0.2 * outcome.num_tries
    assert outcome.num_poisoned == 0
