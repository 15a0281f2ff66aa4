"""An aborted process leaves no core, or a core without the KV pool if allowed."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

CRASH = """
import os, resource, sys
from engine.cache.kv_cache import zeroed_pages
from engine.process.core_dumps import forbid_core_dumps

# Tests of commands may have forbidden dumps in the parent.
open("/proc/self/coredump_filter", "w").write("0x33")
hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
if "allowed" not in sys.argv:
    forbid_core_dumps()
if "piped" in sys.argv:  # as if a handler behind a pipe ignored the limit
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
pool = zeroed_pages(1 << 20)
heap = b"".join(b"prompt-%d" % i for i in (4711, 4712))
block = b"".join(b"kv-block-%d" % i for i in (4711, 4712))
pool[4096:4096 + len(block)] = __import__("torch").frombuffer(bytearray(block), dtype=pool.dtype)
del block
print(open("/proc/self/smaps").read().count(" dd"))
sys.stdout.flush()
os.abort()
"""
HEAP, POOL = b"prompt-4711prompt-4712", b"kv-block-4711kv-block-4712"
PATTERN = Path("/proc/sys/kernel/core_pattern")


def crash(folder, *words):
    """The core file, if there is one."""
    done = subprocess.run(
        [sys.executable, "-c", CRASH, *words],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == -6, done.stderr
    assert int(done.stdout) >= 1, "the pool is marked"
    files = list(folder.iterdir())
    return files[0].read_bytes() if files else b""


needs_files = pytest.mark.skipif(
    not PATTERN.exists()
    or PATTERN.read_text()[0] in "|/"
    or resource.getrlimit(resource.RLIMIT_CORE)[1] == 0,
    reason="this machine writes no core into the working folder",
)


@needs_files
def test_no_core_by_default(tmp_path):
    assert crash(tmp_path) == b""


@needs_files
def test_a_core_for_a_handler_contains_no_memory(tmp_path):
    core = crash(tmp_path, "piped")
    assert HEAP not in core and POOL not in core
    assert len(core) < 1 << 20


@needs_files
def test_an_allowed_core_does_not_contain_the_pool(tmp_path):
    core = crash(tmp_path, "allowed")
    assert HEAP in core
    assert POOL not in core
