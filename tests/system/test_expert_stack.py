"""Experts and attention sinks through both pools: a tiny gpt-oss with drafts gives the tokens that
one process gives without.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from engine.base.kv_layout import hash_salt
from engine.base.types import SamplingParams, StopParams
from engine.checkpoint.packed import packed_file, read_packed
from engine.checkpoint.source import resolve, weights
from engine.kernels import kernels
from engine.runner.loader import load_model
from engine.runner.native_model import NativeModel
from engine.scheduling.request import EngineRequest
from tests.support import expert_models, gguf_of
from tests.support.near_tie import TALLY
from tests.support.paged import CPU
from tests.support.plain_loop import PlainLoop
from tests.support.stack import Stack

FLAGS = ("--kv-cache-memory", "64MiB", "--drafter", "ngram", "--draft-tokens", "4")
pytestmark = pytest.mark.timeout(600)


def requests() -> list[EngineRequest]:
    """Prompts that repeat themselves, so that there are drafts; half of the answers sampled."""
    rng = random.Random(3)
    found = []
    for i in range(8):
        part = [rng.randrange(2, gguf_of.VOCAB) for _ in range(rng.randint(3, 9))]
        prompt = tuple(part * (rng.choice((40, 80, 120)) // len(part)))
        sampling = SamplingParams(temperature=0.75 if i % 2 else 0.0, seed=rng.getrandbits(64))
        stop = StopParams(max_tokens=60)
        found.append(EngineRequest(f"r{i}", prompt, hash_salt(digest="x"), sampling, stop))
    return found


def test_a_stack_answers_as_one_process_does(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    gguf_of.random_file(path, expert_models.CASES["gpt-oss"])
    checkpoint, library = resolve(str(path)), kernels()
    works, dtype = requests(), ("--dtype", "bfloat16" if library else "float32")

    def ask(work: EngineRequest) -> list[int]:
        assert work.sampling and work.stop
        tokens, _, _ = stack.generate(
            work.prompt,
            temperature=work.sampling.temperature,
            seed=work.sampling.seed,
            max_tokens=work.stop.max_tokens,
            ignore_eos=True,
        )
        return tokens

    with Stack(tmp_path, "--model", str(path), *FLAGS, *dtype) as stack:
        with ThreadPoolExecutor(len(works)) as pool:
            answers = list(pool.map(ask, works))
        decode = stack.metrics("decode")
    if library:
        packed = read_packed(packed_file(checkpoint, "auto"), checkpoint.config)
        oracle = PlainLoop(NativeModel(checkpoint.config, packed, library), 256)
    else:
        shards = weights(checkpoint, "float32")
        oracle = PlainLoop(load_model(checkpoint.config, shards, torch.float32, CPU), 256)
    for work, (expected, _), got in zip(works, oracle.answers(works), answers, strict=True):
        if library:
            assert got == expected
        else:
            verdict = oracle.judge(work, expected, got)
            assert verdict.ok, verdict.detail
    # How many are accepted depends on when the controller drafts, which depends on time.
    assert decode["diptych_spec_decode_num_draft_tokens_total"] > 0
    assert decode["diptych_kv_transfer_blocks_total"] > 10
    print(TALLY)
