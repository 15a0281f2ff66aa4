"""The C way against the numpy and torch way, token for token; its edges, and what it keeps between
batches.

A difference is allowed only where the near-tie oracle finds that rounding decides (the two ways'
exp may differ in the last bit); such cases are counted and printed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from engine.base.types import SamplingParams
from engine.kernels import kernels
from engine.sampling import Sampler, SampleRow, UnusableLogits
from engine.sampling.filters import edit_logits
from engine.sampling.native import native_sampler
from engine.sampling.philox import gumbel_row
from tests.support.near_tie import possible_tokens
from tests.support.random_rows import VOCAB, mask_of, random_batch, random_mask, random_params

pytestmark = pytest.mark.skipif(kernels() is None, reason="no native kernels on this machine")

GROUP = 250


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _some_minus_inf(x: torch.Tensor) -> torch.Tensor:
    """Nine of ten tokens gone, the first of each row not."""
    gone = torch.rand(x.shape, generator=torch.Generator().manual_seed(x.shape[1])) < 0.9
    gone[:, 0] = False
    return x.masked_fill(gone, float("-inf"))


# What becomes of normal numbers [S, vocab].
SHAPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "normal": lambda x: x * 3,
    "peaked": lambda x: x * 20 + 100,
    "flat": lambda x: x * 0.05 - 7,
    "integers": lambda x: (x * 2).round(),
    "bfloat16": lambda x: (x * 3).bfloat16().float(),
    "two values": lambda x: (x > 1).float(),
    "equal": lambda x: x * 0,
    "minus infinity": lambda x: _some_minus_inf(x * 2),
}
# (vocabulary, groups of GROUP rows of each shape): 8 * 250 * (...) = 202,000 rows.
SIZES = [(1, 1), (2, 2), (3, 3), (15, 5), (16, 5), (17, 5), (64, 8), (65, 8), (331, 40)]
SIZES += [(1023, 8), (1024, 6), (1025, 6), (4099, 4)]


def _row(rng: random.Random, vocab_size: int) -> SampleRow:
    tokens = [rng.randrange(vocab_size) for _ in range(rng.randrange(1, 60))]
    draft = [rng.randrange(vocab_size) for _ in range(rng.randrange(5))]
    params = random_params(rng, vocab_size) if vocab_size > 3 else _tiny_params(rng, vocab_size)
    num_banned = min(2, vocab_size - 1) if rng.random() < 0.3 else 0
    banned = frozenset(rng.sample(range(1, vocab_size), num_banned))
    num_prompt = rng.randrange(1, len(tokens) + 1)
    mask = random_mask(rng, vocab_size) if rng.random() < 0.2 else None
    return SampleRow(params, len(tokens) + len(draft), tokens, num_prompt, draft, banned, mask)


def _tiny_params(rng: random.Random, vocab_size: int) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.5, 1.0, 3.0]),
        top_p=rng.choice([1.0, 0.9, 0.4]),
        top_k=rng.randrange(vocab_size + 2),
        min_p=rng.choice([0.0, 0.2, 1.0]),
        repetition_penalty=rng.choice([1.0, 1.3]),
        presence_penalty=rng.choice([0.0, 0.7]),
        seed=rng.getrandbits(64),
        logit_bias=rng.choice([(), ((0, 2.0),)]),
    )


def _compare(logits: torch.Tensor, rows: list[SampleRow], name: str) -> int:
    """Both ways' tokens of a batch; returns how many differ, each of them excused."""
    vocab_size = logits.shape[1]
    before = logits.clone()
    native = Sampler(vocab_size).sample(logits, rows)
    assert torch.equal(logits, before)
    oracle = Sampler(vocab_size, native=False).sample(logits, rows)
    num_excused = 0
    for i, (token, expected) in enumerate(zip(native, oracle, strict=True)):
        if token != expected:
            possible = possible_tokens(logits[i], rows[i])
            assert {token, expected} <= possible, (name, i, token, expected, rows[i])
            print(f"{name}, row {i}: {token}, not {expected}: a near-tie of {len(possible)} tokens")
            num_excused += 1
    return num_excused


def test_a_multitude_is_compared() -> None:
    assert GROUP * len(SHAPES) * sum(groups for _, groups in SIZES) >= 200_000


@pytest.mark.parametrize(("vocab_size", "groups"), SIZES)
def test_equals_the_other_way(vocab_size: int, groups: int) -> None:
    num_excused = 0
    for shape, change in SHAPES.items():
        for group in range(groups):
            rng = random.Random(f"{vocab_size} {shape} {group}")
            noise = torch.Generator().manual_seed(rng.getrandbits(32))
            logits = change(torch.randn(GROUP, vocab_size, generator=noise))
            rows = [_row(rng, vocab_size) for _ in range(GROUP)]
            num_excused += _compare(logits, rows, f"vocabulary {vocab_size}, {shape}, {group}")
    num_rows = groups * GROUP * len(SHAPES)
    print(f"vocabulary {vocab_size}: {num_rows} rows compared, {num_excused} near-ties excused")
    assert num_excused <= 1 + num_rows // 10_000


LARGE = [
    {},
    {"temperature": 0.8},
    {"temperature": 1.5},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.5, "top_p": 0.95},
    {"temperature": 3.0, "top_p": 0.999},
    {"temperature": 0.7, "top_k": 50},
    {"temperature": 1.0, "top_k": 384},
    {"temperature": 1.0, "top_k": 385, "top_p": 0.8},
    {"temperature": 2.0, "top_k": 20_000},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 4.0, "min_p": 1e-4},
    {"temperature": 1.2, "top_k": 300, "top_p": 0.9, "min_p": 0.001, "frequency_penalty": 0.4},
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vocab_size", [49_152, 50_257])
def test_large_vocabularies(vocab_size: int, shape: str) -> None:
    rng = random.Random(f"{vocab_size} {shape}")
    rows = []
    for params in LARGE * 2:
        tokens = [rng.randrange(vocab_size) for _ in range(300)]
        penalty = rng.choice([1.0, 1.1])
        sampling = SamplingParams(seed=rng.getrandbits(64), repetition_penalty=penalty, **params)
        rows.append(SampleRow(sampling, 300, tokens, 100))
    noise = torch.Generator().manual_seed(vocab_size)
    logits = SHAPES[shape](torch.randn(len(rows), vocab_size, generator=noise))
    assert _compare(logits, rows, f"vocabulary {vocab_size}, {shape}") <= 1


def test_the_noise_is_the_same_to_the_last_bit() -> None:
    """Two tokens whose scores differ by an ulp or none: the winner shows how noise was rounded."""
    vocab_size, size = 24, 3000
    rng = np.random.default_rng(3)
    logits = np.full((size, vocab_size), -np.inf, np.float32)
    rows, expected = [], []
    for i in range(size):
        seed, position = int(rng.integers(2**63)), int(rng.integers(2**40))
        noise = gumbel_row(seed, position, vocab_size)
        a, b = rng.choice(vocab_size, 2, replace=False)
        logits[i, a] = 0
        logits[i, b] = noise[a] - noise[b]
        for _ in range(int(rng.integers(3))):
            logits[i, b] = np.nextafter(logits[i, b], np.float32(rng.choice([-9, 9])))
        expected.append(int((logits[i] + noise).argmax()))
        rows.append(SampleRow(SamplingParams(temperature=1.0, seed=seed), position, [0], 1))
    assert Sampler(vocab_size).sample(torch.from_numpy(logits), rows) == expected


def test_edits_are_the_same_to_the_last_bit() -> None:
    """A token of the history against one that holds its edited logit: a tie, which the id decides,
    whichever comes first."""
    vocab_size, size = 40, 3000
    rng = random.Random(4)
    rows, edited = [], torch.full((size, vocab_size), -500.0)
    for i in range(size):
        params = SamplingParams(
            repetition_penalty=rng.uniform(0.5, 2),
            frequency_penalty=rng.uniform(-2, 2),
            presence_penalty=rng.uniform(-2, 2),
            logit_bias=((20, rng.uniform(-5, 5)),),
        )
        tokens = [20] * rng.randrange(1, 30)
        draft = [20] * rng.randrange(3)
        num_prompt = rng.randrange(len(tokens) + 1)
        rows.append(SampleRow(params, len(tokens) + len(draft), tokens, num_prompt, draft))
        edited[i, 20] = rng.uniform(-20, 20)
    logits = edited.clone()
    edit_logits(edited, rows)
    other = torch.tensor([rng.choice([10, 30]) for _ in rows])
    logits[range(size), other] = edited[:, 20]
    assert Sampler(vocab_size).sample(logits, rows) == other.clamp(max=20).tolist()


@pytest.mark.parametrize("vocab_size", [1, 16, 1023, 1024, 5000])
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf")])
def test_unusable_rows_are_found_wherever_they_hide(vocab_size: int, bad: float) -> None:
    places = sorted({0, 15, 16, 63, 64, 1022, 1023, 1024, vocab_size - 1} & set(range(vocab_size)))
    logits = torch.full((2 * len(places) + 1, vocab_size), -3.0)
    logits[1::4, : vocab_size // 2] = float("-inf")
    for i, place in enumerate(places):
        logits[2 * i, place] = bad
    rows = [SampleRow(SamplingParams(temperature=i % 2), 1, [0], 1) for i in range(len(logits))]
    with pytest.raises(UnusableLogits) as error:
        Sampler(vocab_size).sample(logits, rows)
    assert error.value.rows == tuple(range(0, 2 * len(places), 2))


def test_all_bad_rows_are_named_at_once() -> None:
    logits = torch.zeros(5, 3)
    logits[1, 2] = float("nan")
    banned = frozenset(range(3))
    rows = [SampleRow(SamplingParams(), 1, [0], 1) for _ in range(5)]
    rows[3] = SampleRow(SamplingParams(temperature=1.0), 1, [0], 1, (), banned)
    with pytest.raises(UnusableLogits, match=r"not a number.*; no token is left") as error:
        Sampler(3).sample(logits, rows)
    assert error.value.rows == (1, 3)


def test_huge_logits_are_no_infinities() -> None:
    logits = torch.full((2, 3000), -3e38)
    logits[:, 5:] = 3e38
    logits[1, 7] = float("-inf")
    rows = [SampleRow(SamplingParams(), 1, [0], 1)] * 2
    assert Sampler(3000).sample(logits, rows) == [5, 5]


@pytest.mark.parametrize("temperature", [1e-5, 3.4e38, 1e39, 1e300])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("top_k", [0, 3])
def test_a_temperature_beyond_fp32_gives_a_token(
    temperature: float, masked: bool, top_k: int
) -> None:
    """It is a number that requests may have: no error, and no token that the mask forbids."""
    logits = torch.randn(1, 999, generator=torch.Generator().manual_seed(5)) * 20
    mask = mask_of([3, 500, 990], 999) if masked else None
    params = SamplingParams(temperature=temperature, top_k=top_k, min_p=0.5, seed=11)
    row = SampleRow(params, 3, [1, 2, 3], 3, mask=mask)
    tokens = [Sampler(999, native=native).sample(logits, [row]) for native in (True, False)]
    assert tokens[0] == tokens[1]
    assert not masked or tokens[0][0] in (3, 500, 990)


@pytest.mark.parametrize("where", ["bias", "ban", "prompt", "answer", "draft"])
@pytest.mark.parametrize("token", [100, 2**31 - 1, -1])
def test_tokens_beyond_the_vocabulary_are_refused(where: str, token: int) -> None:
    def rows(token: int) -> list[SampleRow]:
        at = {"bias": 1, "ban": 1, "prompt": 1, "answer": 1, "draft": 1, where: token}
        params = SamplingParams(presence_penalty=1.0, logit_bias=((at["bias"], 1.0),))
        tokens, banned = [at["prompt"], at["answer"]], frozenset({at["ban"]})
        plain = SampleRow(SamplingParams(), 3, tokens, 1)
        return [plain, SampleRow(params, 3, tokens, 1, [at["draft"]], banned)]

    sampler, logits = Sampler(100), torch.arange(200.0).view(2, 100) % 77
    with pytest.raises(IndexError, match="row 1"):
        sampler.sample(logits, rows(token))
    # And nothing of the failed row is left in the scratch.
    assert sampler.sample(logits, rows(76)) == Sampler(100).sample(logits, rows(76))


def test_a_growing_history_is_followed() -> None:
    """The same sampler over a request's life, with gaps, drafts and neighbours: always the tokens
    of a new one."""
    rng = random.Random(7)
    sampler, vocab_size = Sampler(VOCAB), VOCAB
    requests = [
        (random_params(rng, vocab_size), [rng.randrange(vocab_size) for _ in range(5)])
        for _ in range(12)
    ]
    for step in range(60):
        if step % 9 == 8:  # a new request in the place, perhaps at the address, of an old one
            slot = rng.randrange(12)
            requests[slot] = (random_params(rng, vocab_size), [rng.randrange(vocab_size)])
        rows = []
        for params, tokens in rng.sample(requests, rng.randrange(1, 13)):
            draft = [rng.randrange(vocab_size) for _ in range(rng.randrange(4))]
            for ahead in range(len(draft) + 1):
                banned = frozenset({tokens[0]}) if len(tokens) < 9 else frozenset()
                position = len(tokens) + ahead
                rows.append(SampleRow(params, position, tokens, 1, draft[:ahead], banned))
        logits = torch.randn(len(rows), vocab_size, generator=torch.Generator().manual_seed(step))
        sampled = sampler.sample(logits, rows)
        assert sampled == Sampler(vocab_size).sample(logits, rows)
        for row, token in zip(rows, sampled, strict=True):
            if rng.random() < 0.7 and not row.draft:
                list.append(row.tokens, token)  # type: ignore[arg-type]


def test_a_history_that_was_cut_is_read_anew() -> None:
    """Not allowed, but it must not go unnoticed where it is so easily seen."""
    params = SamplingParams(repetition_penalty=3.0)
    logits, tokens = torch.tensor([[2.0, 1.9, 1.8, 1.7]]), [0, 1, 2]
    sampler = Sampler(4)
    assert sampler.sample(logits, [SampleRow(params, 3, tokens, 1)]) == [3]
    del tokens[1:]
    assert sampler.sample(logits, [SampleRow(params, 1, tokens, 1)]) == [1]
    tokens[0] = 1
    assert sampler.sample(logits, [SampleRow(params, 1, tokens, 1)]) == [0]


def test_strides() -> None:
    sampler = Sampler(VOCAB)
    logits, rows = random_batch(9, 30)
    expected = sampler.sample(logits, rows)
    wide = torch.full((30, 2 * VOCAB), float("nan"))
    wide[:, 7 : 7 + VOCAB] = logits
    assert sampler.sample(wide[:, 7 : 7 + VOCAB], rows) == expected
    wide[:, 1::2] = logits
    assert sampler.sample(wide[:, 1::2], rows) == expected
    one = [sampler.sample(logits[:1], [row])[0] for row in rows]
    assert sampler.sample(logits[0].expand(30, -1), rows) == one
    tall = torch.cat([wide[:, 1::2], logits]).t().contiguous().t()
    assert sampler.sample(tall[30:], rows) == expected


def test_threads_may_share_a_sampler() -> None:
    sampler, vocab_size = Sampler(3001), 3001
    batches = []
    for i in range(4):
        rng = random.Random(i)
        logits = torch.randn(20, vocab_size, generator=torch.Generator().manual_seed(i))
        batches.append((logits, [_row(rng, vocab_size) for _ in range(20)]))
    expected = [sampler.sample(*batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            assert list(pool.map(lambda batch: sampler.sample(*batch), batches)) == expected


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_what_the_mask_allows_is_drawn(native: bool, temperature: float) -> None:
    logits = 3 * torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(4))
    allowed = [3, 77, 330]
    params = [SamplingParams(temperature, seed=i, logit_bias=((5, 100.0),)) for i in range(40)]
    rows = [SampleRow(p, 1, [1], 1, mask=mask_of(allowed)) for p in params]
    sampled = Sampler(VOCAB, native=native).sample(logits, rows)
    assert set(sampled) <= set(allowed)
    if not temperature:
        assert sampled == [max(allowed, key=lambda t: float(row[t])) for row in logits]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bans_give_way_where_a_mask_leaves_nothing_else(native: bool, temperature: float) -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(5))
    params = SamplingParams(temperature, repetition_penalty=1.2)

    def row(allowed: list[int], banned: set[int]) -> SampleRow:
        return SampleRow(params, 1, [2], 1, (), frozenset(banned), mask_of(allowed))

    rows = [row([9], {9}), row([9, 10], {9}), row([9, 10], {9, 10}), row([2], {1, 2})]
    sampled = Sampler(VOCAB, native=native).sample(logits, rows)
    assert sampled[:2] == [9, 10]
    assert sampled[2] in (9, 10)
    assert sampled[3] == 2
    with pytest.raises(UnusableLogits, match=r"row 1 .* no token is left"):
        Sampler(VOCAB, native=native).sample(logits[:2], [rows[0], row([], {9})])


def test_choices_of_a_request_share_its_biases() -> None:
    """Also those that begin in a later batch."""
    sampler = native_sampler(VOCAB)
    assert sampler is not None
    biases = tuple((i, 0.5) for i in range(VOCAB))
    rows = [SampleRow(SamplingParams(1.0, seed=i, logit_bias=biases), 1, [3], 1) for i in range(6)]
    logits = torch.zeros(6, VOCAB)
    for size in (2, 3, 6):
        sampled = sampler.sample(logits[:size], rows[:size])
        assert sampled == Sampler(VOCAB).sample(logits[:size], rows[:size])
    kept = [sampler._parameters.get(row.params) for row in rows]
    assert len({id(entry.pointed_at) for entry in kept if entry}) == 1
    assert None not in kept


@pytest.mark.parametrize("native", [True, False])
def test_plain_rows_get_the_tokens_of_whole_rows(native: bool) -> None:
    """Over batches whose requests enter, leave and change places, as those of an engine."""
    rng, sampler = random.Random(4), Sampler(331, native=native)
    params: list[SamplingParams] = []
    for number in range(40):
        if params and rng.random() < 0.5:
            params[rng.randrange(len(params))] = params[-1]
            params.pop()
        for _ in range(rng.randrange(3)):
            top_k, top_p = rng.choice([0, 8]), rng.choice([1.0, 0.9])
            temperature, min_p = rng.choice([0.0, 0.7, 1.0]), rng.choice([0.0, 0.1])
            seed = rng.getrandbits(64)
            params.append(SamplingParams(temperature, top_p, top_k, min_p, seed=seed))
        counts = np.array([rng.choice([1, 1, 3]) for _ in params], np.int64)
        owners = [p for p, count in zip(params, counts, strict=True) for _ in range(count)]
        logits = 3 * torch.randn(len(owners), 331, generator=torch.Generator().manual_seed(number))
        positions = np.array([rng.randrange(1, 9000) for _ in owners], np.int64)
        rows = [SampleRow(p, int(at), [1] * 3, 2) for p, at in zip(owners, positions, strict=True)]
        tokens = sampler.sample_plain(logits, params, positions, counts)
        assert tokens.tolist() == sampler.sample(logits, rows)
    logits[1] = torch.nan
    with pytest.raises(UnusableLogits) as error:
        sampler.sample_plain(logits, params, positions, counts)
    assert error.value.rows == error.value.broken == (1,)
    with pytest.raises(ValueError, match="float32"):
        sampler.sample_plain(logits[1:], params, positions, counts)
