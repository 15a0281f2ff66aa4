"""What an architecture is: one file of this folder, which is found by its place.

    engine/models/<arch>.py   ARCHITECTURES = (Architecture(...), ...)
        gguf_keys     metadata of a GGUF file -> the architecture's own keys of config.json
        read_config   config.json -> ModelConfig
        tensors       the one list of the tensors of a checkpoint
        forward       the forward pass, of layers that are handed in

What derives from the list: the torch loader and the random weights (engine/runner/loader.py), the
packer (engine/checkpoint/packed.py), the names, shapes and row order of a GGUF file
(engine/checkpoint/gguf_weights.py) and the structs of the C decoder
(engine/runner/native_model.py). No torch is imported here: a coordinator reads configurations, and
a forward pass needs only the operators of the tensors that are handed in.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

from engine.models.config import ConfigReader, ModelConfig
from engine.models.gguf_metadata import GGUFMetadata, no_keys

if TYPE_CHECKING:
    from torch import Tensor


# How names of a wrapper's text model begin, by age of the checkpoint.
_TEXT_MODELS = ("model.language_model.", "language_model.", "model.text_model.")


@dataclass(frozen=True, slots=True)
class FusedPart:
    """Where a file in Hugging Face layout may hold a tensor: in one of all experts."""

    hf_name: str
    expert: int  # along axis 0
    outputs: tuple[int, int, int]  # start, stop and step of this tensor's outputs
    transposed: bool = False  # [inputs, outputs] of an expert


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a checkpoint."""

    name: str  # "3.q"
    hf_name: str  # "model.layers.3.self_attn.q_proj.weight"
    gguf_name: str  # "blk.3.attn_q.weight"
    shape: tuple[int, ...]  # [outputs, inputs] of a matrix, [size] of a vector
    joined: str  # "3.qkv": parts of one tensor follow one another, joined along axis 0
    shard_axis: int | None  # split along this axis by tensor parallelism; None: on every rank
    permuted_heads: int = 0  # a GGUF file has its rows in llama.cpp's rotary order, by head
    # A file in Hugging Face layout holds the values less this number; a GGUF file holds the values.
    offset: float = 0.0
    expert: int = -1  # along axis 0 of a GGUF file's tensor, which is of all experts; -1: none
    fused: FusedPart | None = None
    exact: bool = False  # held in fp32, whatever the model's precision
    # In files the first so many rows of each head turn in pairs (0 1), (2 3), ...; here a head's
    # pairs are its halves. 0: they are halves in files too.
    paired_rows: int = 0
    num_heads: int = 0  # of paired rows

    def row_order(self) -> list[int] | None:
        """Row i of the joined tensor is this row of the file; None: they are alike."""
        if not self.paired_rows:
            return None
        size = self.shape[0] // self.num_heads
        turned = range(self.paired_rows)
        head = [*turned[::2], *turned[1::2], *range(self.paired_rows, size)]
        return [h * size + row for h in range(self.num_heads) for row in head]


# A projection or a norm: [T, inputs] -> [T, outputs].
Op = Callable[["Tensor"], "Tensor"]
# A layer's operators by the name of their (joined) tensor.
Layer = Mapping[str, Op]


class Step(Protocol):
    """What a forward pass needs of the step that it computes: T tokens, S logits."""

    def embed(self) -> Tensor:
        """Embeddings of the step's tokens, scaled: [T, hidden]."""

    def rotated_heads(
        self, layer: int, qkv: Tensor, q_norm: Op | None, k_norm: Op | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, num_heads, head_dim] and k, v [T, num_kv_heads, head_dim] of joined outputs.

        Each head of q and k is normalised where a norm is given, then turned to its position by
        the layer's rotary table.
        """

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        """Write k and v; attention [T, num_heads * head_dim]. None: nothing reads what follows."""

    def gated(self, gate_up: Tensor) -> Tensor:
        """activation(first half) * second half, [T, intermediate]."""

    def add(self, x: Tensor, part: Tensor, norm: Op | None) -> Tensor:
        """x plus what a part of a layer gives, normalised where a norm is given; scaled."""

    def logits(self, x: Tensor) -> Tensor:
        """Final norm and output head of the tokens that need logits: fp32 [S, vocab].

        Scaled and capped as the configuration has it.
        """

    def no_logits(self) -> Tensor:
        """fp32 [0, vocab]."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A family of checkpoints that one forward pass computes."""

    name: str  # in config.json's `architectures`
    model_type: str  # in config.json, for files that leave `architectures` out
    read_config: Callable[[ConfigReader], ModelConfig]
    tensors: Callable[[ModelConfig], Iterator[TensorSpec]]
    forward: Callable[[Step, Sequence[Layer]], Tensor]
    gguf: str = ""  # a GGUF file's general.architecture; "": such files are not read
    gguf_keys: Callable[[GGUFMetadata], dict[str, Any]] = no_keys  # beside the shared ones
    gguf_experts: bool = False  # such a file has experts: `llama` names two architectures
    native: bool = True  # decoder.c computes this forward pass, where it knows all tensors
    quantisations: tuple[str, ...] = ()  # `quant_method` of files in Hugging Face layout
    # Hugging Face names of tensors that files have and the forward pass does not use
    left_out: Callable[[ModelConfig, str], bool] = lambda config, name: False


@cache
def architectures() -> tuple[Architecture, ...]:
    """All architectures, in the order of their files' names."""
    package = __name__.rpartition(".")[0]
    path = importlib.import_module(package).__path__
    names = sorted(module.name for module in pkgutil.iter_modules(path))
    modules = (importlib.import_module(f"{package}.{name}") for name in names)
    return tuple(a for module in modules for a in getattr(module, "ARCHITECTURES", ()))


def architecture_of(config: ModelConfig) -> Architecture:
    """The architecture of a configuration that was read by one."""
    return next(a for a in architectures() if a.name == config.architecture)


def listed_name(config: ModelConfig, name: str) -> str | None:
    """The name in the architecture's list of a checkpoint's tensor; None: it is not read.

    Not read are buffers that follow from the configuration, a head that is the embedding, and the
    parts of a wrapper that are not its text model.
    """
    if config.wrapper:
        found = (name.partition(part)[2] for part in _TEXT_MODELS if name.startswith(part))
        inner = next(found, None)
        if inner is not None:
            name = inner if inner.startswith(("model.", "lm_head.")) else f"model.{inner}"
        elif not name.startswith("lm_head."):
            return None
    tied = config.tie_word_embeddings and name == "lm_head.weight"
    if tied or name.endswith("rotary_emb.inv_freq"):
        return None
    return None if architecture_of(config).left_out(config, name) else name


# -- writing a list --------------------------------------------------------------------------------


def layer_tensors(
    layer: int,
    weights: Sequence[TensorSpec],
    biased: frozenset[str] = frozenset(),
    others: Sequence[TensorSpec] = (),
) -> Iterator[TensorSpec]:
    """The tensors of layer `layer`: its weights, and biases of the joined ones in `biased`.

    The names in `weights` lack the layer and the suffix, those in `others` the layer alone.
    """
    for joined, group in groupby(weights, key=lambda w: w.joined):
        parts = [_in_layer(layer, w) for w in group]
        yield from (_named(part, "weight", part.shape) for part in parts)
        if joined in biased:
            yield from (_named(part, "bias", part.shape[:1]) for part in parts)
    yield from (_in_layer(layer, w) for w in others)


def _in_layer(layer: int, w: TensorSpec) -> TensorSpec:
    prefix = f"model.layers.{layer}."
    return replace(
        w,
        name=f"{layer}.{w.name}",
        hf_name=prefix + w.hf_name,
        gguf_name=f"blk.{layer}.{w.gguf_name}",
        joined=f"{layer}.{w.joined}",
        fused=w.fused and replace(w.fused, hf_name=prefix + w.fused.hf_name),
    )


def outer_tensors(c: ModelConfig, norm_offset: float = 0.0) -> Iterator[TensorSpec]:
    """Final norm, embedding, and the head where it is not the embedding."""
    norm, vocabulary = (c.hidden_size,), (c.vocab_size, c.hidden_size)
    yield TensorSpec(
        *("norm", "model.norm.weight", "output_norm.weight", norm, "norm", None), offset=norm_offset
    )
    yield TensorSpec(
        "embedding", "model.embed_tokens.weight", "token_embd.weight", vocabulary, "embedding", 0
    )
    if not c.tie_word_embeddings:
        yield TensorSpec("head", "lm_head.weight", "output.weight", vocabulary, "head", 0)


def _named(w: TensorSpec, kind: str, shape: tuple[int, ...]) -> TensorSpec:
    w = replace(w, hf_name=f"{w.hf_name}.{kind}", gguf_name=f"{w.gguf_name}.{kind}")
    if kind == "weight":
        return w
    if w.fused:
        fused = replace(w.fused, hf_name=f"{w.fused.hf_name}_{kind}", transposed=False)
        w = replace(w, fused=fused)
    axis = 0 if w.shard_axis == 0 else None  # outputs that every rank adds up have one bias
    name, joined = f"{w.name}.bias", f"{w.joined}.bias"
    return replace(w, name=name, joined=joined, shape=shape, shard_axis=axis)
