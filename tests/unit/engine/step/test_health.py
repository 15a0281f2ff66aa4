"""Numbers that are not finite are the worker's fault, or a peer's blocks': never the request's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry

from engine.attention.batch import Row
from engine.base.errors import InvalidRequest, SelfTestFailed, Unavailable
from engine.base.kv_layout import KVLayout
from engine.base.types import SamplingParams, StopParams
from engine.cache.kv_cache import KVCache
from engine.runner.base import ModelRunner, StepOutput
from engine.sampling import Sampler
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.request import EngineRequest, State
from engine.step.core import EngineCore
from engine.step.health import EngineHealth
from engine.step.self_test import NUM_PROMPT, SelfTest, num_scratch_blocks
from engine.telemetry.metrics import WorkerMetrics
from tests.support.core_bench import SALT, SIZE, Bench, oracle
from tests.support.history_model import VOCAB
from tests.support.invariants import check_pool

GREEDY = SamplingParams()


class Checked:
    """Health as a test sets it."""

    def __init__(self) -> None:
        self.bad_blocks: set[int] = set()
        self.bad_prompts: Callable[[Sequence[Row]], list[int]] = lambda rows: []
        self.failure = ""
        self.num_tests = 0

    def unsound_prompts(self, rows: Sequence[Row]) -> list[int]:
        return self.bad_prompts(rows)

    def damaged(self, blocks: Sequence[int]) -> list[int]:
        return [b for b in blocks if b in self.bad_blocks]

    def self_test(self) -> None:
        self.num_tests += 1
        if self.failure:
            raise SelfTestFailed(self.failure)


class Sick(Bench):
    """A bench whose model gives NaN in the rows that `poison` selects."""

    def __init__(self, native: bool = True, draft_tokens: int = 0) -> None:
        super().__init__(draft_tokens=draft_tokens)
        self.health = Checked()
        sampler = Sampler(VOCAB, torch.device("cpu"), native=native)
        self.registry = CollectorRegistry()
        metrics = WorkerMetrics(self.registry, "test")
        self.core = EngineCore(
            self.scheduler, self.runner, sampler, metrics, lambda: self.now_s, health=self.health
        )
        self.poison: Callable[[Row], bool] = lambda row: False
        run = self.runner.compute

        def poisoned(rows: Sequence[Row]) -> torch.Tensor:
            logits = run(rows)
            first = 0
            for row in rows:
                if self.poison(row):
                    logits[first : first + row.num_logits] = torch.nan
                first += row.num_logits
            return logits

        self.runner.compute = poisoned  # type: ignore[method-assign]

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, {"model_name": "test", **labels}) or 0.0

    def error(self, key: int) -> Unavailable:
        error = self.finished[key].error
        assert isinstance(error, Unavailable)
        return error


def work(name: str, prompt: tuple[int, ...], num_tokens: int = 12) -> EngineRequest:
    return EngineRequest(name, prompt, SALT, GREEDY, StopParams(max_tokens=num_tokens))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_a_row_of_nan_goes_elsewhere_and_its_step_counts_for_none(
    native: bool, draft_tokens: int
) -> None:
    bench = Sick(native, draft_tokens)
    good, bad = work("good", (1, 2, 3)), work("bad", (4, 5))
    keys = [bench.add(good), bench.add(bad)]
    for _ in range(3):
        bench.step()
    before = list(bench.tokens[keys[0]])
    block = next(r for r in bench.scheduler.active if r.work is bad).table.blocks[0]
    bench.poison = lambda row: row.block_ids[0] == block
    bench.step()
    assert bench.error(keys[1]).sick
    assert not bench.error(keys[1]).lost
    assert bench.tokens[keys[0]] == before, "nothing of that step is sent"
    assert bench.core.load().is_degraded(bench.now_s)
    bench.poison = lambda row: False
    bench.run()
    assert bench.tokens[keys[0]] == oracle(good)[0]
    assert bench.tokens[keys[1]] == oracle(bad)[0][: len(bench.tokens[keys[1]])]
    assert bench.health.num_tests == 1
    assert bench.count("diptych_non_finite_requests_total") == 1
    assert bench.count("diptych_self_tests_total", outcome="passed") == 1
    bench.now_s += 61.0
    assert not bench.core.load().is_degraded(bench.now_s)
    bench.at_rest()


def test_a_failed_self_test_ends_the_engine() -> None:
    bench = Sick()
    keys = [bench.add(work(f"r{i}", (i, 2))) for i in range(3)]
    bench.poison = lambda row: True
    bench.health.failure = "the self-test failed"
    with pytest.raises(SelfTestFailed):
        bench.step()
    ended = {e.key: e for e in bench.core.take_events()}
    assert sorted(ended) == keys
    assert bench.count("diptych_self_tests_total", outcome="failed") == 1


def test_a_step_that_raises_is_followed_by_a_self_test() -> None:
    bench = Sick()
    bench.add(work("a", (1, 2)))
    bench.runner.fail_next = 1
    bench.step()
    assert bench.health.num_tests == 1


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_that_forbids_every_token_is_its_own_fault(
    native: bool, temperature: float
) -> None:
    """Biases of -inf, and stop ids that min_tokens forbids: the others do not notice."""
    bench = Sick(native)
    good = work("good", (1, 2, 3))
    minus = SamplingParams(
        temperature=temperature, logit_bias=tuple((t, float("-inf")) for t in range(VOCAB))
    )
    huge = replace(minus, logit_bias=((7, float("inf")),))
    banned = StopParams(max_tokens=5, min_tokens=3, stop_token_ids=frozenset(range(VOCAB)))
    keys = [
        bench.add(good),
        bench.add(replace(good, request_id="minus", sampling=minus)),
        bench.add(replace(good, request_id="huge", sampling=huge)),
        bench.add(replace(good, request_id="banned", stop=banned)),
    ]
    bench.run()
    assert bench.tokens[keys[0]] == oracle(good)[0]
    fields = []
    for key in keys[1:]:
        error = bench.finished[key].error
        assert isinstance(error, InvalidRequest)
        fields.append(error.field)
    assert fields == ["sampling.logit_bias", "sampling.logit_bias", "sampling"]
    assert not bench.core.load().is_degraded(bench.now_s)
    assert bench.health.num_tests == 0
    bench.at_rest()


def test_both_kinds_in_one_step() -> None:
    """The request's own error comes when the step is computed again."""
    bench = Sick()
    minus = SamplingParams(logit_bias=tuple((t, float("-inf")) for t in range(VOCAB)))
    keys = [
        bench.add(work("good", (1, 2, 3))),
        bench.add(replace(work("own", (3, 4)), sampling=minus)),
        bench.add(work("sick", (5, 6, 7))),
    ]
    bench.poison = lambda row: list(row.token_ids[:2]) == [5, 6]
    bench.run()
    assert bench.tokens[keys[0]] == oracle(work("good", (1, 2, 3)))[0]
    assert isinstance(bench.finished[keys[1]].error, InvalidRequest)
    assert bench.error(keys[2]).sick


def test_a_prompt_whose_kv_is_not_finite_is_not_announced() -> None:
    bench = Sick()
    prompt = tuple(range(6 * SIZE))
    kv = EngineRequest("kv", prompt, SALT, announce_from=0)
    bench.health.bad_prompts = lambda rows: [0] if rows[0].start else []
    key = bench.add(kv)
    bench.run()
    announced = sum(len(e.block_ids) for e in bench.announced.get(key, ()))
    for event in bench.announced.get(key, ()):
        bench.core.unpin(event.block_ids)
    assert announced == 4, "the first chunk alone"
    assert bench.error(key).sick
    assert bench.pool.num_cached == 4
    bench.at_rest()


def fetched(bench: Sick, name: str, prompt: tuple[int, ...], peer: str) -> int:
    """A request whose whole blocks have come from a peer."""
    key = bench.add(replace(work(name, prompt), fetch=True, source=peer))
    bench.step()
    event = next(e for e in bench.fetches if e.key == key)
    for i, block in enumerate(event.block_ids):
        first = (event.first_block + i) * SIZE
        bench.write([block], event.token_ids[first : first + SIZE])
    bench.core.blocks_arrived(key, event.first_block + len(event.block_ids))
    bench.core.fetch_ended(key)
    return key


def test_damaged_blocks_of_a_peer_and_all_that_was_computed_from_them_are_forgotten() -> None:
    bench = Sick()
    clean = bench.add(work("clean", tuple(range(20, 31)), 6))
    bench.run()
    num_clean = bench.pool.num_cached
    first = fetched(bench, "first", tuple(range(9)), "P1")
    bench.run()
    assert bench.pool.num_cached > num_clean + 2, "its answer's blocks follow those of P1"
    second = fetched(bench, "second", tuple(range(30, 39)), "P1")
    damaged = next(r for r in bench.scheduler.active if r.key == second).table.blocks[0]
    bench.health.bad_blocks = {damaged}
    bench.poison = lambda row: damaged in row.block_ids
    bench.step()
    assert bench.error(second).lost == "prefill"
    assert bench.error(second).sick
    assert bench.pool.num_cached == num_clean
    assert not bench.core.load().is_degraded(bench.now_s), "it is the peer's fault"
    assert bench.count("diptych_kv_blocks_forgotten_total") > 2
    other = fetched(bench, "other", tuple(range(30, 39)), "P2")
    bench.poison = lambda row: False
    bench.run()
    assert bench.tokens[other] == oracle(work("other", tuple(range(30, 39))))[0]
    assert bench.finished[clean].error is None
    assert bench.finished[first].error is None
    bench.at_rest()


def test_several_that_read_damaged_blocks_in_one_step() -> None:
    """Each blames the peer, also that which shares its blocks, and the worker none of it on itself;
    an answer on other blocks of that peer begins anew.
    """
    bench = Sick()
    prompt = tuple(range(30, 39))
    keys = [fetched(bench, "a", prompt, "P1")]
    keys.append(bench.add(replace(work("b", prompt), fetch=True, source="P1")))  # hits
    keys.append(fetched(bench, "c", tuple(range(9)), "P1"))
    well = fetched(bench, "d", tuple(range(11, 20)), "P1")
    tables = {r.key: r.table.blocks for r in bench.scheduler.active}
    bench.health.bad_blocks = {tables[keys[0]][0], tables[keys[2]][1]}
    bad = set(bench.health.bad_blocks)
    bench.poison = lambda row: bool(bad & set(row.block_ids))
    bench.step()
    assert [bench.error(key).lost for key in keys] == ["prefill"] * 3
    assert not bench.core.load().is_degraded(bench.now_s)
    assert bench.pool.num_cached == 0
    (waiting,) = bench.scheduler.waiting
    assert waiting.key == well
    bench.core.abort(well)
    bench.step()
    bench.at_rest()


def test_a_peer_that_is_reported_sick_takes_its_blocks_from_running_answers() -> None:
    """They begin anew behind their tokens, and their next answers do not hit what was there."""
    bench = Sick()
    key = fetched(bench, "a", tuple(range(9)), "P1")
    plain = bench.add(work("plain", (1, 2, 3), 20))
    for _ in range(4):
        bench.step()
    fetching = bench.add(replace(work("f", tuple(range(11, 20))), fetch=True, source="P1"))
    bench.step()
    bench.core.forget("P1")
    assert bench.count("diptych_kv_blocks_forgotten_total") >= 2
    request = next(r for r in bench.scheduler.waiting if r.key == key)
    assert request.state is State.WAITING
    bench.core.blocks_arrived(fetching, 2)
    bench.core.fetch_ended(fetching)
    bench.run()
    assert bench.error(key).lost == bench.error(fetching).lost == "prefill"
    assert bench.tokens[plain] == oracle(work("plain", (1, 2, 3), 20))[0]
    assert bench.pool.match([]) == []
    bench.at_rest()


def test_hashes_and_sources_of_a_pool() -> None:
    pool = BlockPool(6)
    blocks = pool.take(5)
    pool.set_hash(blocks[0], b"own")
    pool.set_hash(blocks[1], b"p1", frozenset({"P1"}))
    pool.set_hash(blocks[2], b"both", frozenset({"P1", "P2"}))
    pool.set_hash(blocks[3], b"p2", frozenset({"P2"}))
    assert pool.sources(blocks) == {"P1", "P2"}
    pool.release(blocks[:2])
    assert pool.forget("P1", for_good=True) == 2
    check_pool(pool)
    assert (pool.num_cached, pool.num_held) == (1, 3)
    assert pool.match([b"p1"]) == pool.match([b"both"]) == []
    assert pool.match([b"p2"]) == [blocks[3]]
    pool.set_hash(blocks[4], b"late", frozenset({"P1"}))
    assert pool.match([b"late"]) == []
    pool.release(blocks[2:])
    check_pool(pool)
    assert pool.num_cached == 2
    assert pool.hide([blocks[0], blocks[1]]) == 1
    check_pool(pool)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), float("-inf")])
def test_what_a_prompt_wrote_is_looked_at_and_nothing_else(value: float, dtype: str) -> None:
    layout = KVLayout(num_layers=2, num_kv_heads=1, head_dim=4, block_size=4, dtype=dtype)
    cache = KVCache(layout, 8, torch.device("cpu"))
    limits = torch.finfo(cache.pool.dtype)
    cache.pool[5, 0, 1, 0, 1] = limits.max
    cache.pool[5, 0, 1, 1, 2] = limits.min
    cache.pool[5, 0, 1, 1, 3] = limits.tiny
    health = EngineHealth(cache, ())
    rows = [
        Row([1] * 6, 1, [5, 2], 0),  # positions 1 .. 6
        Row([1], 3, [3], 1),  # an answer: its logits tell
        Row([1] * 4, 4, [1, 6], 1),
    ]
    cache.pool[5, :, 1, :, 0] = value  # position 0: another step's
    cache.pool[2, :, 1, :, 3] = value  # position 7: what an earlier owner left
    cache.pool[3, :, 1] = value
    assert health.unsound_prompts(rows) == []
    cache.pool[2, 0, 1, 1, 2, 3] = value  # position 6
    assert health.unsound_prompts(rows) == [0]
    cache.pool[6, 0, 1, 0, 0, 0] = value
    assert health.unsound_prompts(rows) == [0, 2]
    assert health.unsound_prompts(rows[1:2]) == []
    assert health.damaged([0, 2, 4, 6]) == [2, 6]


class Model(ModelRunner):
    """Its logits depend on the last token and the position; a fault may be put on top."""

    def __init__(self) -> None:
        self.fault: Callable[[torch.Tensor, Row], None] = lambda logits, row: None

    def launch(self, rows: Sequence[Row]) -> StepOutput:
        (row,) = rows
        assert (row.start + len(row.token_ids)) <= 4 * len(row.block_ids)
        out = np.stack(
            [
                np.random.default_rng((token, row.start + i)).standard_normal(97)
                for i, token in enumerate(row.token_ids)
            ]
        )[len(row.token_ids) - row.num_logits :]
        logits = torch.from_numpy(out.astype(np.float32))
        self.fault(logits, row)
        return StepOutput(logits)


def self_test(model: Model, exact: bool = True) -> SelfTest:
    return SelfTest("it", model, block_size=4, vocab_size=97, exact=exact)


def test_a_self_test_passes_again_and_again() -> None:
    test = self_test(Model())
    for _ in range(3):
        test()
    assert num_scratch_blocks(16) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_self_test_finds_what_is_not_finite(value: float) -> None:
    model = Model()
    test = self_test(model)

    def fault(logits: torch.Tensor, row: Row) -> None:
        logits[-1, 5] = value

    model.fault = fault
    with pytest.raises(SelfTestFailed, match="it failed: its logits are not finite"):
        test()
    model.fault = lambda logits, row: None
    test()
    model.fault = fault
    with pytest.raises(SelfTestFailed, match="not finite"):
        test()


def test_a_self_test_finds_kernels_that_do_not_agree_and_numbers_that_change() -> None:
    model = Model()

    def chunks(logits: torch.Tensor, row: Row) -> None:
        if len(row.token_ids) > NUM_PROMPT:
            logits[0, 3] += 9.0

    model.fault = chunks
    with pytest.raises(SelfTestFailed, match="do not agree"):
        self_test(model, exact=False)()
    model.fault = lambda logits, row: None
    exact, near = self_test(model), self_test(model, exact=False)
    exact()
    near()

    def drift(logits: torch.Tensor, row: Row) -> None:
        logits[0, 3] += 1e-3

    model.fault = drift
    near()
    with pytest.raises(SelfTestFailed, match="not those of its start"):
        exact()
