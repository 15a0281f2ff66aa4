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
from tests.support.stack import EXACT, Stack, until

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


@contextmanager
def flipping(folder: Path, *flags: str) -> Iterator[tuple[Stack, Flips]]:
    """A prefill worker, and a decode worker that reads with flipped bits; `flags` are its own."""
    flips = Flips(folder / "flips")
    secret = folder / "token"
    secret.write_text("a token that both sides know\n".replace(" ", "-"))
    secret.chmod(0o600)
    common = (*EXACT, "--cluster-token-file", str(secret))
    with Stack(folder, *common, prefill=1, decode=0, wait=False) as stack:
        command = [sys.executable, "-m", "tests.support.flip_worker", str(flips.path), "start"]
        command += [*common, "--coordinator", stack.address, "--worker-id", "flipping"]
        command += ["--log-format", "json"]
        with (folder / "flipping.log").open("wb") as log:
            worker = subprocess.Popen([*command, *flags], stdout=log, stderr=log, cwd=ROOT)
        try:
            stack.num_workers = 2
            until(stack.ready, 180, "the stack is ready", 0.1)
            yield stack, flips
            stack.assert_at_rest()
        finally:
            worker.terminate()
            try:
                worker.wait(20)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()


def test_a_flipped_bit_is_found_and_the_answer_is_right(tmp_path: Path) -> None:
    with flipping(tmp_path, "--kv-checksums") as (stack, flips):
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


def test_without_checksums_the_same_flip_is_computed_with(tmp_path: Path) -> None:
    """So the test above can fail: nothing else notices."""
    with flipping(tmp_path) as (stack, flips):
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
