import subprocess
import sys

from tests.support.paths import ROOT

# In a process of its own, for whoever ends a tree becomes the parent of its orphans.
_SCRIPT = """
import sys, time
from pathlib import Path
from benchmarks import processes

processes.adopt_orphans()
sleep = "import time; time.sleep(60)"
parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleep!r}]); {sleep}"
process = processes.start([sys.executable, "-c", parent], {}, Path("/dev/null"))
while len(tree := processes.descendants([process.pid])) < 2:
    time.sleep(0.05)
seen = processes.snapshot([process.pid], with_pss=True)
assert len(seen["processes"]) == 2, seen
assert seen["rss_bytes"] >= seen["pss_bytes"] > 0, seen
assert seen["num_fds"] > 0, seen
processes.stop([process], grace_s=5.0)
assert not [pid for pid in tree if Path(f"/proc/{pid}").exists()], tree
"""


def test_a_tree_is_seen_and_ended_to_the_last_one():
    root = ROOT
    done = subprocess.run([sys.executable, "-c", _SCRIPT], cwd=root, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
