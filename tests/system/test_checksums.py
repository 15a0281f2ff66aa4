"""--kv-checksums over real NIXL between real workers, one of which has a memory that flips bits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from engine.base.errors import DiptychError
from tests.support.greedy import greedy
from tests.support.paths import ROOT
from tests.support.stack import EXACT, Stack

LONG, OTHER = (greedy(300), greedy(512))
NUM_BLOCKS = 299 // 16  # that travel
NUM_TOKENS = 24
pytestmark = pytest.mark.timeout(300)


class Flips:
    """How many bits are still to flip."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left = 0

    @property
    def left(self) -> int:
        return int(self.path.read_text())

    @left.setter
    def left(self, number: int) -> None:
        self.path.write_text(str(number))


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A coordinator with a prefill worker; it is not yet ready."""
    folder = tmp_path_factory.mktemp("checksums")
    secret = folder / "token"
    secret.write_text("a-token-that-both-sides-know\n")
    secret.chmod(0o600)
    flags = (*EXACT, "--cluster-token-file", str(secret))
    with Stack(folder, *flags, prefill=1, decode=0, wait=False) as stack:
        stack.num_workers = 2
        yield stack


@contextmanager
def flipping(front: Stack, *flags: str) -> Iterator[tuple[Stack, Flips]]:
    """With a decode worker that reads with flipped bits; `flags` are its own."""
    flips = Flips(front.folder / "flips")
    command = [sys.executable, "-m", "tests.support.flip_worker", str(flips.path), "start", *EXACT]
    command += ["--cluster-token-file", str(front.folder / "token"), "--log-format", "json"]
    command += ["--coordinator", front.address, "--worker-id", "flipping", *flags]
    with (front.folder / "flipping.log").open("wb") as log:
        worker = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
    try:
        front.until_ready()
        yield front, flips
        front.assert_at_rest()
    finally:
        worker.terminate()
        try:
            worker.wait(20)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def test_a_flipped_bit_is_found_and_the_answer_is_right(front: Stack) -> None:
    with flipping(front, "--kv-checksums") as (stack, flips):
        flips.left = 1
        tokens, _, _ = stack.generate(LONG["prompt"], max_tokens=NUM_TOKENS, request_id="flipped")
        assert tokens == LONG["tokens"][:NUM_TOKENS]
        assert flips.left == 0
        decode = stack.metrics("decode")
        assert decode["diptych_kv_checksum_failures_total"] == 1
        assert decode["diptych_kv_transfer_blocks_total"] > NUM_BLOCKS, "some came twice"
        assert decode["diptych_prompt_tokens_total"] == 300 - 16 * NUM_BLOCKS, "none was computed"
        lines = [line for line in stack.logs()["flipping"].splitlines() if "checksum" in line]
        assert any(json.loads(line)["request_id"] == "flipped" for line in lines if line[0] == "{")

        # A memory that is bad for good: what does not come over in three rounds is computed there.
        flips.left = 1_000
        tokens, _, _ = stack.generate(OTHER["prompt"], max_tokens=NUM_TOKENS)
        assert tokens == OTHER["tokens"][:NUM_TOKENS]
        after = stack.metrics("decode")
        assert after["diptych_kv_checksum_failures_total"] >= 1 + 3
        computed = "diptych_prompt_tokens_total"
        assert after[computed] - decode[computed] >= 512 - 16 * 31 + 16


def test_without_checksums_the_same_flip_is_computed_with(front: Stack) -> None:
    """So the test above can fail: nothing else notices."""
    with flipping(front) as (stack, flips):
        flips.left = 1
        try:
            tokens, _, _ = stack.generate(LONG["prompt"], max_tokens=NUM_TOKENS)
        except (DiptychError, grpc.RpcError):  # a model that computes with it may give no number
            tokens = []
        assert flips.left == 0
        assert tokens != LONG["tokens"][:NUM_TOKENS]
        decode = stack.metrics("decode")
        assert decode["diptych_kv_checksum_failures_total"] == 0
        assert decode["diptych_kv_stale_reads_total"] == 0
