"""A simulator drives the scheduler and the rules of speculation: they import no torch."""

import subprocess
import sys

from tests.support.paths import ROOT

SCHEDULING = ("request", "events", "block_pool", "block_table", "plan", "scheduler", "speculation")
RULES = ("draft_length", "ngram", "verify", "acceptance", "step_cost")


def test_scheduling_imports_no_torch() -> None:
    hashes = [f"engine.scheduling.{module}" for module in SCHEDULING]
    hashes += [f"decode.speculative.{rule}" for rule in RULES]
    code = f"import sys, {', '.join(hashes)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
