"""Seeds are stable, spread, and need no torch."""

from __future__ import annotations

import subprocess
import sys

from engine.base.seeds import choice_seed, default_seed


def test_values_never_change() -> None:
    """Other values would change the outputs of requests that retry across an upgrade."""
    assert default_seed("request-1") == 0x7829144C549D6281
    assert choice_seed(42, 1) == 0x760261BAACC8EB0C
    assert choice_seed(42, 0) == 42


def test_all_differ_and_fit_64_bits() -> None:
    seeds = [default_seed(f"r{i}") for i in range(1000)]
    seeds += [choice_seed(s, i) for s in (0, 1, 2**64 - 1) for i in range(64)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_no_torch() -> None:
    code = "import sys, engine.base.seeds; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
