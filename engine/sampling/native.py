"""The sampler in C: packs a step's rows and calls kernels/sampling.c once.

Little is packed anew in a step: a request's parameters once, its tokens as they come, its bans
once. A plain greedy row costs a look-up and its share of one join of bytes.

    record of a row, 176 bytes: [ parameters 104 | position 8 | history, draft, bans, mask 64 ]
"""

from __future__ import annotations

import ctypes
import math
import struct
import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from engine.base.types import SamplingParams
from engine.kernels import Kernels, kernels
from engine.sampling.filters import MAX_TEMPERATURE
from engine.scheduling.rows import SampleRow, UnusableLogits

_PARAMETERS = struct.Struct("=6dQ3q3q")
_HISTORY = struct.Struct("=8q")
_REST = bytes(8 + _HISTORY.size)  # of a record: its position, and no history
_ALIGNMENT = 64
_64_BITS = 2**64 - 1
_NO_SUCH_TOKEN = -3
_BROKEN = -1
_REASONS = {_BROKEN: "not a number, infinite, or -inf throughout", -2: "no token is left"}
_Source = TypeVar("_Source")
_Value = TypeVar("_Value")


class _PerBatch(Generic[_Source, _Value]):
    """Values kept by the identity of their source from one batch to the next, and no longer.

    The source is kept too, so that no other object can take its id.
    """

    def __init__(self) -> None:
        self._last: dict[int, tuple[_Source, _Value]] = {}
        self._now: dict[int, tuple[_Source, _Value]] = {}

    def turn(self) -> None:
        """A new batch begins."""
        self._last, self._now = self._now, {}

    def get(self, source: _Source) -> _Value | None:
        """The value kept for `source`, if this batch or the last one had it."""
        key = id(source)
        if (entry := self._now.get(key) or self._last.get(key)) is None:
            return None
        self._now[key] = entry
        return entry[1]

    def put(self, source: _Source, value: _Value) -> _Value:
        """Keep `value` for `source`."""
        self._now[id(source)] = (source, value)
        return value


_Biases = tuple["array[int]", "array[float]"]  # token ids and what is added to their logits
_NO_BIAS: _Biases = (array("i"), array("f"))


@dataclass(frozen=True, slots=True)
class _Parameters:
    record: bytes  # with room for what differs from row to row
    penalizes: bool
    pointed_at: _Biases  # by the record


class NativeSampler:
    """Samples a batch's tokens on the CPU. Safe to share: one call at a time."""

    def __init__(self, library: Kernels, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        # Logits, elements from one row to the next, vocab_size, records, first row, one after the
        # last, tokens (int32), scratch.
        self._sample = library.function("diptych_sample", "pqipiipp")
        num_bytes = library.library["diptych_sample_scratch"]
        num_bytes.restype = ctypes.c_size_t
        self._memory = ctypes.create_string_buffer(num_bytes(vocab_size) + _ALIGNMENT)  # zeros
        start = ctypes.addressof(self._memory)
        self._scratch = start + -start % _ALIGNMENT
        self._parameters: _PerBatch[SamplingParams, _Parameters] = _PerBatch()
        self._biases: _PerBatch[Sequence[tuple[int, float]], _Biases] = _PerBatch()
        self._tokens: _PerBatch[Sequence[int], array[int]] = _PerBatch()
        self._banned: _PerBatch[frozenset[int], array[int]] = _PerBatch()
        self._plain_params: list[SamplingParams] = []  # of the last plain batch
        self._plain_records: list[_Parameters] = []
        self._plain = np.empty((0, 0), np.uint8)  # the same as one array
        self._lock = threading.Lock()

    def sample(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
        """The token of each row; logits float32 [len(rows), vocab_size], left as they are.

        Raises UnusableLogits naming every row without a token, IndexError if a row bans, biases or
        has seen a token beyond the vocabulary.
        """
        drafts: list[array[int]] = []
        with self._lock:
            tokens: list[int] = self._run(logits, self._pack(rows, drafts)).tolist()
            return tokens

    def sample_plain(
        self,
        logits: torch.Tensor,
        params: Sequence[SamplingParams],
        positions: NDArray[np.int64],
        counts: NDArray[np.int64],
    ) -> NDArray[np.int32]:
        """The token of each row, which depends on nothing else; see `Sampler.sample_plain`."""
        with self._lock:
            if params != self._plain_params:  # equal ones are packed alike
                before = dict(zip(map(id, self._plain_params), self._plain_records, strict=True))
                self._plain_records = [before.get(id(p)) or _packed(p, _NO_BIAS) for p in params]
                self._plain_params = list(params)
                joined = bytearray().join([packed.record for packed in self._plain_records])
                self._plain = np.frombuffer(joined, np.uint8).reshape(len(params), -1)
            records = self._plain
            if len(positions) != len(params):
                records = np.repeat(records, counts, axis=0)
            return self._run(logits, _placed(records, positions))

    def _run(self, logits: torch.Tensor, records: NDArray[np.uint8]) -> NDArray[np.int32]:
        if logits.stride(1) != 1:
            logits = logits.contiguous()
        tokens = np.empty(len(records), np.int32)
        self._sample(
            logits.data_ptr(),
            logits.stride(0),
            self.vocab_size,
            records.ctypes.data,
            0,
            len(records),
            tokens.ctypes.data,
            self._scratch,
        )
        if tokens.min() < 0:
            _raise(tokens.tolist())
        return tokens

    def _pack(self, rows: Sequence[SampleRow], drafts: list[array[int]]) -> NDArray[np.uint8]:
        """The rows' records [R, 176]; they point at arrays in `drafts` and in this object."""
        for kept in (self._parameters, self._biases, self._tokens, self._banned):
            kept.turn()
        records: list[bytes] = []
        histories: list[tuple[int, bytes]] = []
        for i, row in enumerate(rows):
            params = self._parameters.get(row.params)
            if params is None:
                packed = _packed(row.params, self._biases_of(row.params.logit_bias))
                params = self._parameters.put(row.params, packed)
            elif row.params.logit_bias:
                self._biases.get(row.params.logit_bias)  # for choices that begin later
            records.append(params.record)
            if params.penalizes or row.banned or row.mask is not None:
                histories.append((i, self._history(row, params.penalizes, drafts)))
        joined = np.frombuffer(bytearray(b"".join(records)), np.uint8).reshape(len(rows), -1)
        buffer = _placed(joined, np.array([row.position for row in rows], np.int64))
        for i, history in histories:
            buffer[i, _PARAMETERS.size + 8 :] = np.frombuffer(history, np.uint8)
        return buffer

    def _biases_of(self, pairs: Sequence[tuple[int, float]]) -> _Biases:
        """As arrays, made once for all choices of a request, which share the pairs."""
        biases = self._biases.get(pairs)
        if biases is None:
            last = dict(pairs)  # of a token that occurs twice the last counts
            biases = self._biases.put(pairs, (array("i", last.keys()), array("f", last.values())))
        return biases

    def _history(self, row: SampleRow, is_penalized: bool, drafts: list[array[int]]) -> bytes:
        tokens = draft = banned = (0, 0)  # address, length
        if is_penalized:
            tokens = self._mirror(row.tokens).buffer_info()
            if row.draft:
                drafts.append(array("i", row.draft))
                draft = drafts[-1].buffer_info()
        if row.banned:
            ids = self._banned.get(row.banned)
            if ids is None:
                ids = self._banned.put(row.banned, array("i", row.banned))
            banned = ids.buffer_info()
        mask = 0 if row.mask is None else row.mask.ctypes.data
        return _HISTORY.pack(*tokens, row.num_prompt, *draft, *banned, mask)

    def _mirror(self, tokens: Sequence[int]) -> array[int]:
        """`tokens` as int32: those appended since the last batch are appended here."""
        mirror = self._tokens.get(tokens)
        known = len(mirror) if mirror else 0
        if mirror and known <= len(tokens) and mirror[-1] == tokens[known - 1]:
            mirror.extend(tokens[known:])
            return mirror
        return self._tokens.put(tokens, array("i", tokens))


def _placed(records: NDArray[np.uint8], positions: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The records [R, 176] with their positions, in place."""
    at = slice(_PARAMETERS.size, _PARAMETERS.size + 8)
    records[:, at] = positions.view(np.uint8).reshape(-1, 8)
    return records


def _packed(p: SamplingParams, biases: _Biases) -> _Parameters:
    ids, values = biases
    record = _PARAMETERS.pack(
        min(p.temperature, MAX_TEMPERATURE),
        p.top_p,
        math.log(p.min_p) if p.min_p > 0 else -math.inf,
        p.repetition_penalty,
        p.frequency_penalty,
        p.presence_penalty,
        p.seed & _64_BITS,
        p.top_k,
        p.greedy,
        p.penalizes,
        ids.buffer_info()[0],
        values.buffer_info()[0],
        len(ids),
    )
    return _Parameters(record + _REST, p.penalizes, biases)


def _raise(sampled: Sequence[int]) -> None:
    """Raise what the negative ones among `sampled` say."""
    if _NO_SUCH_TOKEN in sampled:
        row = sampled.index(_NO_SUCH_TOKEN)
        raise IndexError(f"row {row} bans, biases or has seen a token beyond the vocabulary")
    reasons = [reason for code, reason in _REASONS.items() if code in sampled]
    raise UnusableLogits(
        [i for i, token in enumerate(sampled) if token < 0],
        "; ".join(reasons),
        [i for i, token in enumerate(sampled) if token == _BROKEN],
    )


def native_sampler(vocab_size: int) -> NativeSampler | None:
    """One for this CPU; None where there are no native kernels."""
    found = kernels()
    return NativeSampler(found, vocab_size) if found else None
