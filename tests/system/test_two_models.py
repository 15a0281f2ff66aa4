"""Weights that differ in one byte never answer together: real processes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.base.errors import DiptychError
from engine.base.options import cache_dir
from tests.support import tiny_gguf
from tests.support.paths import ROOT
from tests.support.stack import Stack, until
from tests.support.timeouts import CLUSTER

FLAGS = ("--dtype", "float32", "--kv-cache-memory", "64MiB")


@contextmanager
def worker(role: str, model: Path, stack: Stack) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "worker.cli", role, "start", *FLAGS, "--model", str(model)]
    command += ["--model-name", "m", "--coordinator", stack.address, "--worker-id", role]
    command += ["--num-threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def test_prefill_and_decode_of_two_models_refuse_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = cache_dir() / "native"
    if kernels.exists():  # else they are compiled anew, which takes longer than all else here
        shutil.copytree(kernels, tmp_path / "cache" / "native")
    monkeypatch.setenv("DIPTYCH_CACHE_DIR", str(tmp_path / "cache"))
    ours, theirs = tmp_path / "a" / "m.gguf", tmp_path / "b" / "m.gguf"
    for path in (ours, theirs):
        path.parent.mkdir()
    tiny_gguf.tiny(ours)
    data = bytearray(ours.read_bytes())
    data[-5000] ^= 1  # in a tensor
    theirs.write_bytes(data)
    shutil.copystat(ours, theirs)
    front = ("--workers", "external", "--worker-wait-s", "1", "--model", str(ours))
    with (
        Stack(tmp_path, *front, "--model-name", "m", prefill=0, decode=0, wait=False) as stack,
        worker("prefill", ours, stack),
    ):
        until(
            lambda: bool(stack.workers("prefill")),
            CLUSTER.start_s,
            "the prefill worker is ready",
            0.2,
        )
        with worker("decode", theirs, stack) as refused:
            _, said = refused.communicate(timeout=CLUSTER.start_s)
            assert refused.returncode == 2
            assert "numeric_profile" in said
            assert " is not " in said
            with pytest.raises(DiptychError):
                list(stack.client.generate("hello world", max_tokens=3, timeout_s=5))
        with worker("decode", ours, stack):
            until(
                lambda: bool(stack.workers("decode")),
                CLUSTER.start_s,
                "the decode worker is ready",
                0.2,
            )
            assert len(list(stack.client.generate("hello world", max_tokens=3))) > 1
