"""Speculation changes no token: drafts of any quality against one token at a time."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence

import pytest
import torch

from decode.speculative.ngram import NgramDrafter
from decode.speculative.verify import verify
from engine.base.types import SamplingParams
from engine.sampling import Sampler, SampleRow
from tests.support.drafting import padded, propose, verified
from tests.support.random_rows import random_params

VOCAB = 23
NUM_TOKENS = 24
Draft = Callable[[list[int], int], list[int]]


def test_accepted_then_recovered_or_bonus() -> None:
    assert verified(verify, [], [7]) == [7]
    assert verified(verify, [1, 2, 3], [1, 2, 3, 4]) == [1, 2, 3, 4]
    assert verified(verify, [1, 2, 3], [1, 9, 3, 4]) == [1, 9]
    assert verified(verify, [1, 2, 3], [9, 2, 3, 4]) == [9]
    drafts = padded([[1, 2, 3], [1], [], [1, 2]], 3)
    sampled = padded([[1, 2, 3, 4], [1, 2, 0, 0], [5, 0, 0, 0], [9, 2, 3, 4]], 4)
    assert verify(drafts, sampled).tolist() == [3, 1, 0, 0]


@pytest.mark.parametrize(
    ("draft", "sampled"), [([1], []), ([], []), ([1, 2], [1, 2]), ([1, 2], [1]), ([1], [1, 2, 3])]
)
def test_lengths_that_decide_nothing_are_refused(draft: list[int], sampled: list[int]) -> None:
    with pytest.raises(ValueError, match="do not decide"):
        verified(verify, draft, sampled)


def fake_logits(history: Sequence[int]) -> torch.Tensor:
    """A model: float32 [VOCAB], a function of the last three tokens."""
    digest = hashlib.blake2b(bytes(history[-3:]), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(VOCAB, generator=generator) * 2.5


def answer(
    prompt: list[int],
    params: SamplingParams,
    min_tokens: int,
    stops: frozenset[int],
    draft: Draft | None = None,
) -> tuple[list[int], int]:
    """The answer's tokens and how many of them were accepted drafts."""
    sampler, tokens, num_accepted = Sampler(VOCAB), list(prompt), 0
    while len(tokens) < len(prompt) + NUM_TOKENS:
        room = len(prompt) + NUM_TOKENS - len(tokens) - 1
        proposed = draft(tokens, min(4, room)) if draft else []
        rows = []
        for i in range(len(proposed) + 1):
            num_answer = len(tokens) + i - len(prompt)
            banned = stops if num_answer < min_tokens else frozenset[int]()
            position = len(tokens) + i
            rows.append(SampleRow(params, position, tokens, len(prompt), proposed[:i], banned))
        logits = torch.stack([fake_logits([*tokens, *row.draft]) for row in rows])
        accepted = verified(verify, proposed, sampler.sample(logits, rows))
        num_accepted += len(accepted) - 1
        tokens += accepted
    return tokens[len(prompt) :], num_accepted


def test_drafts_change_no_token() -> None:
    rng = random.Random(5)
    accepted = dict.fromkeys(("ngram", "noise", "mostly right"), 0)
    for case in range(70):
        params = random_params(rng, VOCAB)
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 30))]
        stops = frozenset(rng.sample(range(VOCAB), 2))
        min_tokens = rng.choice([0, 5, NUM_TOKENS])
        plain, _ = answer(prompt, params, min_tokens, stops)
        whole = [*prompt, *plain]

        def mostly_right(tokens: list[int], size: int, whole: list[int] = whole) -> list[int]:
            right = whole[len(tokens) : len(tokens) + size]
            return [t if rng.random() < 0.8 else rng.randrange(VOCAB) for t in right]

        ngram = NgramDrafter()
        drafts: dict[str, Draft] = {
            "ngram": lambda tokens, size, ngram=ngram: propose(ngram, 0, tokens, size).tokens,
            "noise": lambda _, size: [rng.randrange(VOCAB) for _ in range(rng.randrange(size + 1))],
            "mostly right": mostly_right,
        }
        for name, draft in drafts.items():
            got, num_accepted = answer(prompt, params, min_tokens, stops, draft)
            assert got == plain, (case, name, params)
            accepted[name] += num_accepted
        assert not stops.intersection(plain[:min_tokens])
    assert accepted["mostly right"] > 700
    assert accepted["ngram"] > 50
    assert accepted["noise"] > 0


def test_a_wrong_history_would_be_seen() -> None:
    """The property fails if rows forget that their draft prefix is part of the answer."""

    class Forgetful(Sampler):
        def sample(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
            blind = [SampleRow(r.params, r.position, r.tokens, r.num_prompt) for r in rows]
            return super().sample(logits, blind)

    params = SamplingParams(temperature=1.0, frequency_penalty=2.0, seed=3)
    row = SampleRow(params, 4, [1, 2], 1, [5, 5])
    differs = 0
    for position in range(60):
        logits = torch.zeros(1, VOCAB)
        logits[0, 5] = 3.0
        at = SampleRow(params, position, row.tokens, 1, row.draft)
        differs += Sampler(VOCAB).sample(logits, [at]) != Forgetful(VOCAB).sample(logits, [at])
    assert differs > 5


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_a_draft_is_accepted_as_often_as_rejection_sampling_accepts_it(temperature: float) -> None:
    """With probability p(draft), over seeds."""
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(2))
    expected = torch.softmax(logits / temperature, 0)
    guess, size = int(expected.argmax()), 20_000
    rows = [
        SampleRow(SamplingParams(temperature=temperature, seed=i), 1, [0], 1) for i in range(size)
    ]
    sampled = Sampler(VOCAB).sample(logits.expand(size, -1), rows)
    rate = sum(token == guess for token in sampled) / size
    p = float(expected[guess])
    assert abs(rate - p) < 4 * (p * (1 - p) / size) ** 0.5
