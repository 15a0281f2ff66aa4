"""The shapes that are run before a worker listens, and the largest step that can come."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from engine.attention.batch import Row
from engine.base.types import SamplingParams, StopParams
from engine.runner.base import ModelRunner, StepOutput
from engine.sampling import Sampler, UnusableLogits
from engine.sampling import sampler as sampler_module
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.block_table import BlockTable
from engine.scheduling.plan import Budgets
from engine.scheduling.request import EngineRequest, Request
from engine.scheduling.rows import SampleRow
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.speculation import Draft, DraftInputs, Drafts, Speculation
from engine.step.warmup import Shape, step_shapes, warm_up
from tests.support.drafting import as_drafts

GPU = Budgets(8192, 256, num_logits=1024)


def num_logits(shape: Shape) -> int:
    return sum(row.num_logits for row in shape.rows)


def test_shapes_are_as_large_as_the_budgets_let_a_step_be() -> None:
    shapes = {
        s.name: s for s in step_shapes(GPU, draft_window=16, block_size=16, max_model_len=8192)
    }
    assert list(shapes) == ["prompt chunk", "decode", "verify", "mixed", "largest"]
    assert (shapes["prompt chunk"].num_tokens, num_logits(shapes["prompt chunk"])) == (8192, 1)
    assert (shapes["decode"].num_tokens, num_logits(shapes["decode"])) == (256, 256)
    assert num_logits(shapes["verify"]) == shapes["verify"].num_tokens == 48 * 17
    assert [len(row.token_ids) for row in shapes["mixed"].rows] == [32, 17, 1]
    largest = shapes["largest"]
    assert largest.num_tokens == 8192 + 48 * 17 + 208
    assert num_logits(largest) == 256 + 48 * 17 + 208
    for shape in shapes.values():
        for row in shape.rows:
            assert row.start + len(row.token_ids) <= len(row.block_ids) * 16


@pytest.mark.parametrize("max_model_len", [1, 7, 100])
@pytest.mark.parametrize("window", [0, 1, 16])
def test_short_contexts_and_no_drafts(max_model_len: int, window: int) -> None:
    shapes = step_shapes(GPU, draft_window=window, block_size=16, max_model_len=max_model_len)
    names = [shape.name for shape in shapes]
    assert ("verify" in names) == (window > 0 and max_model_len > 1)
    assert max(len(row.token_ids) for shape in shapes for row in shape.rows) <= max(
        max_model_len, 1
    )


@pytest.mark.parametrize(("max_model_len", "num_prompts"), [(2048, 4), (3000, 3), (16, 256)])
def test_short_contexts_fill_the_largest_step_together(
    max_model_len: int, num_prompts: int
) -> None:
    """A step computes 8,192 tokens of any number of prompts: the memory of them all is needed."""
    shapes = step_shapes(GPU, draft_window=0, block_size=16, max_model_len=max_model_len)
    largest = next(shape for shape in shapes if shape.name == "largest")
    prompts = largest.rows[:-256]
    assert len(prompts) == num_prompts
    assert sum(len(row.token_ids) for row in prompts) == min(8192, num_prompts * max_model_len)
    assert sum(row.num_logits for row in prompts) == 256
    assert all(row.context_len <= max_model_len for row in prompts)


class Model(ModelRunner):
    """Logits that are no numbers, as over a scratch cache they may be."""

    def launch(self, rows: Sequence[Row]) -> StepOutput:
        self.logits = torch.full((sum(row.num_logits for row in rows), 97), torch.nan)
        return StepOutput(self.logits)


class Watched(Sampler):
    """Notes where the logits lie that it samples from."""

    def __init__(self) -> None:
        super().__init__(97, native=False)
        self.places: set[int] = set()

    def sample(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
        self.places.add(logits.data_ptr())
        return super().sample(logits, rows)


def test_what_is_sampled_is_a_copy_as_beside_a_prompt_that_is_scored() -> None:
    """Half a GiB for 1,024 rows of 128,256 tokens, which the largest step needs too."""
    shapes = step_shapes(Budgets(8, 2), draft_window=2, block_size=16, max_model_len=64)
    model, sampler = Model(), Watched()
    warm_up(shapes[-1:], [model], sampler)
    assert sampler.places and model.logits.data_ptr() not in sampler.places


class Eager:
    """Drafts as many tokens as it may."""

    name = "eager"
    has_kv = False
    acceptance = (1.0,)

    def propose(self, inputs: DraftInputs) -> Drafts:
        return as_drafts([Draft([1] * limit, [0] * limit) for limit in inputs.limits.tolist()])

    def materialize(self, rows: object) -> None: ...

    def observe(self, output: object, rows: object) -> dict[int, int]:
        return {}

    def produced(self, ids: object, tokens: object, counts: object) -> None: ...

    def finish(self, draft_id: int) -> None: ...


def test_no_step_has_more_logits_than_were_warmed_up() -> None:
    pool = BlockPool(400)
    budgets = Budgets(64, 8, num_logits=20)
    speculation = Speculation(Eager(), lambda draft, sampled: None, 6)  # type: ignore[arg-type,return-value]
    scheduler = Scheduler(pool, 16, budgets, speculation, 200)
    for key in range(8):
        work = EngineRequest(str(key), (1, 2), b"", SamplingParams(), StopParams(100))
        scheduler.add(Request(key, work, BlockTable(pool, 16), 0.0))
    scheduler.admit(0.0)
    assert len(scheduler.plan(0.0)) == 8
    for request in scheduler.active:
        request.tokens.append(3)
        scheduler.advance(request, 2)
    plan = scheduler.plan(0.0)
    assert not plan.rows and plan.slots.num_draft.tolist() == [6, 6] + [0] * 6
    assert plan.num_slot_logits == budgets.num_logits


def test_sampling_in_slices_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, where copies, sorts and noise of all rows would not fit."""
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(11, 97)).astype(np.float32))
    rows = [
        SampleRow(SamplingParams(0.9 * (i % 2), top_p=0.9, seed=i), i + 2, [3, 4], 1)
        for i in range(11)
    ]
    sampler = Sampler(97, native=False)
    whole = sampler.sample(logits, rows)
    monkeypatch.setattr(sampler_module, "MAX_ROWS", 4)
    assert sampler.sample(logits, rows) == whole
    logits[1] = logits[9] = torch.nan
    with pytest.raises(UnusableLogits) as caught:
        sampler.sample(logits, rows)
    assert caught.value.rows == (1, 9)
