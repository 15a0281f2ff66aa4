"""Requests over a paged cache, without a scheduler: scattered blocks, and a pool full of NaN.

Every position that was not written is NaN, so that a read of one shows in the logits.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from engine.attention.batch import BlockIds, Row
from engine.base.kv_columns import Columns, deal, first_visible
from engine.base.kv_layout import KVLayout
from engine.cache.kv_cache import KVCache
from engine.models.config import ModelConfig, RopeScaling
from engine.runner.base import ModelRunner, StepOutput
from engine.runner.native_model import NativeModel
from engine.runner.runner import Runner
from engine.runner.torch_model import TorchModel
from tests.support.backends import select_backend

CPU = torch.device("cpu")


def tiny_config(**changes: object) -> ModelConfig:
    """A small Llama with grouped-query attention."""
    values: dict[str, object] = {
        "architecture": "LlamaForCausalLM",
        "num_layers": 2,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 8,
        "vocab_size": 101,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": RopeScaling(),
        "tie_word_embeddings": True,
        "attention_bias": False,
        "output_bias": False,
        "mlp_bias": False,
        "sliding_window": 0,
        "bos_token_id": 0,
        "eos_token_ids": (1,),
    }
    return ModelConfig(**(values | changes))  # type: ignore[arg-type]


def layout_of(
    config: ModelConfig, block_size: int, dtype: str = "float32", *, by_window: bool = True
) -> KVLayout:
    """The layout of a model's cache; `by_window`: with columns for layers with a window."""
    columns = Columns.one(config.num_layers)
    if by_window:
        columns = deal([spec.window for spec in config.attention], config.context)
    sizes = (columns.num_layers, config.num_kv_heads, config.head_dim, block_size)
    return KVLayout(*sizes, dtype, windows=columns.windows, places=columns.places)


@dataclass(slots=True)
class Sequence_:
    """A request: its tokens, and how many of them are in the cache."""

    token_ids: list[int]
    block_ids: list[list[int]]  # of each column
    num_cached: int = 0


@dataclass(frozen=True, slots=True)
class _Native(ModelRunner):
    """Our kernels, on the threads that the process has; each step's logits are kept."""

    model: NativeModel
    kv_cache: KVCache

    def launch(self, rows: Sequence[Row]) -> StepOutput:
        return StepOutput(self.model.forward(rows, self.kv_cache).clone())


@contextmanager
def bfloat16_kv() -> Iterator[None]:
    """Round K and V to bfloat16 as they are written, whatever the cache's dtype."""
    with pytest.MonkeyPatch.context() as patch:
        write = KVCache.write
        patch.setattr(
            KVCache,
            "write",
            lambda self, layer, blocks, offsets, k, v: write(
                self, layer, blocks, offsets, k.bfloat16().float(), v.bfloat16().float()
            ),
        )
        yield


class Bench:
    """A model with its runner, a poisoned pool and a shuffled free list."""

    def __init__(
        self,
        model: TorchModel | NativeModel,
        *,
        block_size: int = 4,
        num_blocks: int = 256,
        seed: int = 0,
    ) -> None:
        config = model.config
        dtype = "bfloat16" if isinstance(model, NativeModel) else str(model.dtype)
        layout = layout_of(config, block_size, dtype.removeprefix("torch."))
        num_blocks *= layout.num_columns
        self.kv_cache = KVCache(layout, num_blocks, CPU)
        self.kv_cache.pool.fill_(float("nan"))
        self.runner: ModelRunner
        if isinstance(model, NativeModel):  # without a pool of threads
            self.runner = _Native(model, self.kv_cache)
        else:
            backend = select_backend(self.kv_cache, config)
            self.runner = Runner(model, self.kv_cache, backend)
        self._layout = layout
        self._free = list(range(num_blocks))
        random.Random(seed).shuffle(self._free)

    def sequence(self, token_ids: Sequence[int], room: int = 0) -> Sequence_:
        """A new request with blocks for its tokens and `room` more."""
        need = self._layout.num_blocks(len(token_ids) + room)
        columns = []
        for _ in self._layout.windows:
            taken, self._free = self._free[:need], self._free[need:]
            assert len(taken) == need, "the test's pool is too small"
            columns.append(taken)
        return Sequence_(list(token_ids), columns)

    def _table(self, seq: Sequence_, end: int) -> BlockIds:
        """The block table as an engine has it: blocks behind a window are gone, and poisoned."""
        used, columns = self._layout.num_blocks(end), []
        for window, blocks in zip(self._layout.windows, seq.block_ids, strict=True):
            first = first_visible(window, seq.num_cached, self._layout.block_size)
            self.kv_cache.pool[blocks[:first]] = float("nan")
            columns.append([*[blocks[first]] * first, *blocks[first:used]])
        return columns[0] if len(columns) == 1 else np.array(columns, np.int32).T

    def step(self, *work: tuple[Sequence_, int, int]) -> torch.Tensor:
        """One step: (sequence, tokens to compute next, logits wanted of the last ones)."""
        rows = []
        for seq, count, num_logits in work:
            end = seq.num_cached + count
            tokens = seq.token_ids[seq.num_cached : end]
            rows.append(Row(tokens, seq.num_cached, self._table(seq, end), num_logits))
            seq.num_cached = end
        return self.runner.run(rows)
