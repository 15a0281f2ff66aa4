"""In fp32 the default model writes what transformers wrote (`tests/data/greedy_fp32.json`)."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from engine.checkpoint.source import resolve, weights
from engine.runner.loader import load_model
from engine.runner.torch_model import TorchModel
from tests.support.paged import CPU, Bench, Sequence_
from tests.support.paths import DATA

ORACLE: list[dict[str, Any]] = json.loads((DATA / "greedy_fp32.json").read_text())
NUM_TOKENS = 64
CHUNK = 128

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def model() -> TorchModel:
    checkpoint = resolve("smollm2")
    shards = weights(checkpoint, "float32")
    return load_model(checkpoint.config, shards, torch.float32, CPU)


def generate(model: TorchModel, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy answers: a step takes a chunk of each unfinished prompt and a token of the others."""
    bench = Bench(model, block_size=16, num_blocks=600)
    sequences = [bench.sequence(prompt, room=NUM_TOKENS) for prompt in prompts]

    def done(i: int) -> bool:
        return len(sequences[i].token_ids) == len(prompts[i]) + NUM_TOKENS

    while running := [i for i in range(len(prompts)) if not done(i)]:
        work: list[tuple[Sequence_, int, int]] = []
        for i in running:
            s = sequences[i]
            left = len(s.token_ids) - s.num_cached
            work.append((s, min(left, CHUNK), 1 if left <= CHUNK else 0))
        tokens = bench.step(*work).argmax(-1).tolist()
        for s, token in zip([s for s, _, wanted in work if wanted], tokens, strict=True):
            s.token_ids.append(token)
    return [s.token_ids[len(prompt) :] for s, prompt in zip(sequences, prompts, strict=True)]


@pytest.mark.parametrize("first", range(3))
def test_eight_at_a_time(model: TorchModel, first: int) -> None:
    cases = ORACLE[first::3]  # short and long ones together
    assert len(cases) == 8
    answers = generate(model, [case["prompt"] for case in cases])
    for case, answer in zip(cases, answers, strict=True):
        assert answer == case["tokens"], f"prompt of {len(case['prompt'])} tokens"


@pytest.mark.parametrize("index", [0, 19], ids=lambda i: f"{len(ORACLE[i]['prompt'])} tokens")
def test_alone(model: TorchModel, index: int) -> None:
    assert generate(model, [ORACLE[index]["prompt"]]) == [ORACLE[index]["tokens"]]


def test_each_alone_as_one_long_draft(model: TorchModel) -> None:
    """If each position's best token is the answer's next one, greedy decoding writes the answer."""
    for case in ORACLE:
        prompt, answer = case["prompt"], case["tokens"]
        bench = Bench(model, block_size=16, num_blocks=128)
        s = bench.sequence([*prompt, *answer[:-1]])
        if len(prompt) > 1:
            bench.step((s, len(prompt) - 1, 0))
        best = bench.step((s, NUM_TOKENS, NUM_TOKENS)).argmax(-1).tolist()
        assert best == answer, f"prompt of {len(prompt)} tokens"
