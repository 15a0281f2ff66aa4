"""A DNS name with several addresses, by /etc/hosts in a mount namespace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

_UNSHARE = ("unshare", "--mount", "sh", "-c")


def namespaces() -> bool:
    """Whether this process may have a private /etc/hosts: only root may."""
    try:
        tried = subprocess.run([*_UNSHARE, "mount --bind /etc/hosts /etc/hosts"], check=False)
    except OSError:
        return False
    return tried.returncode == 0


@pytest.mark.skipif(not namespaces(), reason="needs root and mount namespaces")
def test_calls_are_spread_over_a_name_and_follow_its_changes(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n127.0.0.1 front\n127.0.0.2 front\n")
    script = f"mount --bind {hosts} /etc/hosts && exec {sys.executable} -m"
    command = [*_UNSHARE, f"{script} tests.support.behind_a_name"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert all(found["whole"])
    assert min(found["spread"]) >= 2
    assert found["num_resumed"] == 1
    before, after = found["spread"], found["in_the_end"]
    assert after[0] == before[0] + 1, "the one that vanished is not called again"
    assert after[1] == before[1] + 6
